"""Which pages the sequences of one cache lie in: block tables, sharing, copy-on-write, windows."""

import math
import weakref
from collections import Counter

import torch
from torch import Tensor

from gpu_poor.kv_cache.pool import PagePool
from gpu_poor.paging import PageAllocator


class Sequences:
    """The block tables of a batch. All sequences have the same number of tokens, padding included.

    Cache and layers have it in common, and nothing that it holds refers back to it: when the last
    of them is gone, its pages are free again, whatever exception was on the way.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        #: Pages of each sequence, but for the first ``left`` ones, which its windows have left:
        #: those are given back.
        self.rows: list[list[int]] = []  # always this object: the finalizer has it
        self.left = 0
        #: Whether pages stay until the next crop, which may go back that far.
        self.keeps_past = False
        self.table = torch.zeros(0, 0, dtype=torch.int32)
        self.starts: Tensor | None = None
        self.handed_out: int | None = None  # layer whose keys its attention has not asked for yet
        self._lengths: dict[int, Tensor] = {}
        pool.allocator.tables[id(self.rows)] = weakref.ref(self), self.rows
        weakref.finalize(self, _release_all, pool.allocator, self.rows).atexit = False

    def lengths(self, tokens: int) -> Tensor:
        """int32 ``[B]`` of that number; the last ones are kept."""
        found = self._lengths.get(tokens)
        if found is None or len(found) != len(self.rows):
            if len(self._lengths) > 8:
                self._lengths.clear()
            found = torch.full((len(self.rows),), tokens, dtype=torch.int32)
            self._lengths[tokens] = found
        return found

    def reserve(self, batch: int, begin: int, end: int) -> None:
        """Pages for slots [begin, end) of ``batch`` sequences, which nobody else holds.

        Those that the token at ``begin`` no longer sees are given back before.

        Raises:
            ValueError: another batch than before. MemoryError: too few pages; what is stored stays.
        """
        if self.rows and batch != len(self.rows):
            raise ValueError(f"the cache holds {len(self.rows)} sequences, got {batch}")
        with self.pool.allocator.lock:
            if self.rows and not self.keeps_past and self._leave(begin):
                self.refresh()
            if self._grow(batch, begin, end):
                self.refresh()

    def first_seen(self, slot: int) -> int:
        """The first page that a token in this slot sees something of."""
        window, size = self.pool.window, self.pool.page_size
        return max(0, slot + 1 - window) // size if window else 0

    def _leave(self, slot: int) -> bool:
        """Give back what the token in this slot does not see any more; whether that was a page."""
        n = self.first_seen(slot) - self.left
        if n <= 0:
            return False
        self.left += n
        for row in self.rows:
            gone = row[:n]
            del row[:n]
            self.pool.allocator.release(gone)
        return True

    def _grow(self, batch: int, begin: int, end: int) -> bool:
        """What :meth:`reserve` does; whether the tables have changed."""
        pool, size = self.pool, self.pool.page_size
        first, last = begin // size - self.left, math.ceil(end / size) - self.left
        rows = self.rows or [[] for _ in range(batch)]
        missing = sum(max(0, last - len(row)) for row in rows)
        written = [(row, i) for row in rows for i in range(first, min(last, len(row)))]
        copies = self._copies(written)
        if missing + copies == 0 and rows is self.rows:
            return False
        pool.require(missing + copies, f"a cache of {batch} sequences of {end} tokens")
        self.rows[:] = rows
        self._copy_shared(written)
        for row in rows:
            row += pool.allocator.allocate(max(0, last - len(row)))
        return True

    def _copies(self, written: list[tuple[list[int], int]]) -> int:
        """How many of these pages will be copied. The last holder of a page needs no copy."""
        allocator, n = self.pool.allocator, 0
        for page, ours in Counter(row[i] for row, i in written).items():
            kept = not allocator.published(page) and allocator.owners(page) == ours
            n += ours - kept
        return n

    def _copy_shared(self, written: list[tuple[list[int], int]]) -> None:
        allocator = self.pool.allocator
        for row, i in written:
            if not allocator.writable(row[i]):
                (page,) = allocator.allocate(1)
                self.pool.copy([row[i]], [page])
                shared, row[i] = row[i], page
                allocator.release([shared])

    def keep(self, tokens: int) -> None:
        """Release the pages beyond so many tokens.

        Raises:
            ValueError: the token after them would see what has been given back.
        """
        if tokens and self.first_seen(tokens) < self.left:
            size, window = self.pool.page_size, self.pool.window
            raise ValueError(
                f"the cache can't go back to {tokens} tokens: the next one sees {window - 1} of "
                f"them, and of those before {self.left * size} the pages are given back. "
                "activate_past_recording() before they come keeps them until the next crop"
            )
        n = math.ceil(tokens / self.pool.page_size) - self.left if tokens else 0
        with self.pool.allocator.lock:
            for row in self.rows:
                gone = row[n:]
                del row[n:]
                self.pool.allocator.release(gone)
            if tokens == 0:
                self.rows.clear()
                self.left, self.starts = 0, None
            elif self.keeps_past:
                self._leave(tokens)
            self.refresh()

    def select(self, indices: list[int]) -> None:
        """Row i becomes what row ``indices[i]`` was; only tables move."""
        if not self.rows:
            return
        if not all(-len(self.rows) <= i < len(self.rows) for i in indices):
            raise IndexError(f"rows {indices} of a cache of {len(self.rows)} sequences")
        with self.pool.allocator.lock:
            before, chosen = list(self.rows), [list(self.rows[i]) for i in indices]
            for row in chosen:
                self.pool.allocator.hold(row)
            self.rows[:] = chosen
            for row in before:
                self.pool.allocator.release(row)
        if self.starts is not None:
            self.starts = self.starts[indices].contiguous()
        self.refresh()

    def take_over(self, rows: list[list[int]]) -> None:
        """Hold these pages, too; for an empty table, and under the allocator's lock."""
        for row in rows:
            self.pool.allocator.hold(row)
        self.rows[:] = [list(row) for row in rows]
        self.refresh()

    def refresh(self) -> None:
        """Write the tables. Their width doubles, so that a new page seldom makes a new tensor.

        -1, which no kernel takes for a page, stands where there is none (any more).
        """
        batch, width = len(self.rows), self.left + max(map(len, self.rows), default=0)
        if self.table.shape[0] != batch or self.table.shape[1] < width:
            width_of_table = 1 << max(3, (width - 1).bit_length())
            self.table = torch.empty(batch, width_of_table, dtype=torch.int32)
        self.table.fill_(-1)
        if self.rows:
            self.table[:, self.left : width] = torch.tensor(self.rows, dtype=torch.int32)

    def __deepcopy__(self, memo) -> "Sequences":
        """Another table of the same pages, which the first of both to write to one copies."""
        twin = Sequences(self.pool)
        twin.left, twin.keeps_past, twin.starts = self.left, self.keeps_past, self.starts
        with self.pool.allocator.lock:
            twin.take_over(self.rows)
        return twin

    def __reduce__(self):
        raise TypeError("a cache in pages can't be pickled: its pages belong to a pool")


def _release_all(allocator: PageAllocator, rows: list[list[int]]) -> None:
    with allocator.lock:
        if allocator.tables.pop(id(rows), None) is not None:  # else they were counted already
            for row in rows:
                allocator.release(row)
        rows.clear()
