"""Which page belongs to whom: a free list, reference counts, and an index of shared prefixes.

Pages are numbers here; gpu_poor/kv_cache/ keeps what they hold.
"""

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class PageAllocator:
    """Pages 0 to ``n_pages - 1``. A page is held by one or more owners, idle, or free.

    An owner that will write must be the only one: :meth:`writable`. Complete pages may be published
    under their tokens; they stay findable when nobody holds them any more (idle), until their
    memory is wanted, the least recently used first.

    Nothing is set up for pages that were never used, so ``n_pages`` may be millions. Owners in
    several threads take ``lock`` around what they do. A finalizer may run amid that and take it
    again: all that one does is release, which nothing here is harmed by.
    """

    def __init__(self, n_pages: int):
        if n_pages < 1:
            raise ValueError(f"n_pages must be >= 1, got {n_pages}")
        self.n_pages, self.lock = n_pages, threading.RLock()
        #: Everyone who holds pages, weakly, and the rows of them, by their id: for :meth:`recount`.
        self.tables: dict[int, tuple[weakref.ref, list[list[int]]]] = {}
        self._owners: list[int] = []  # of each page that was ever used
        self._free: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()
        # A prefix is a chain: (number of the entry before it, tokens of a page) -> (number, page).
        # A dict compares the tokens, not their hash alone; numbers are never used twice.
        self._index: dict[tuple[int, tuple], tuple[int, int]] = {}
        self._keys: dict[int, tuple[int, tuple]] = {}  # of published pages
        self._entries = 0

    @property
    def n_free(self) -> int:
        """Pages that :meth:`allocate` can give: free, idle and never used ones."""
        return self.n_pages - len(self._owners) + len(self._free) + len(self._idle)

    @property
    def n_held(self) -> int:
        """Pages with an owner."""
        return self.n_pages - self.n_free

    def owners(self, page: int) -> int:
        return self._owners[page] if page < len(self._owners) else 0

    def allocate(self, n: int) -> list[int]:
        """n pages for one owner.

        Raises:
            MemoryError: there are fewer; then none is given.
        """
        if n > self.n_free:
            raise MemoryError(f"{n} pages are wanted, {self.n_free} of {self.n_pages} are free")
        return [self._one() for _ in range(n)]

    def _one(self) -> int:
        if self._free:
            page = self._free.pop()
        elif len(self._owners) < self.n_pages:
            page = len(self._owners)
            self._owners.append(0)
        else:
            page, _ = self._idle.popitem(last=False)
            self._withdraw(page)
        self._owners[page] = 1
        return page

    def hold(self, pages: Iterable[int]) -> None:
        """One more owner for each."""
        for page in pages:
            if self._owners[page] == 0:
                del self._idle[page]  # a free page would be a bug: KeyError
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner less for each.

        The last first: idle pages are taken back in that order, and a prefix without its beginning
        cannot be found.
        """
        for page in reversed(pages):
            if self._owners[page] < 1:
                raise ValueError(f"page {page} is released, but nobody holds it")
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def published(self, page: int) -> bool:
        return page in self._keys

    def writable(self, page: int) -> bool:
        """Whether its one owner may write: nobody else holds it, nobody can find it."""
        return self._owners[page] == 1 and page not in self._keys

    def publish(self, tokens: Sequence[tuple], pages: Sequence[int]) -> None:
        """Let others find held pages by the tokens of each; what is known already stays."""
        before = 0
        for key, page in zip(tokens, pages, strict=True):
            entry = self._index.get((before, key))
            if entry is None and page not in self._keys:
                self._entries += 1
                entry = self._entries, page
                self._index[before, key], self._keys[page] = entry, (before, key)
            elif entry is None:  # published under another beginning
                return
            before = entry[0]

    def find(self, tokens: Sequence[tuple]) -> list[int]:
        """The published pages of the longest beginning of ``tokens``. They are not held yet."""
        pages, before = [], 0
        for key in tokens:
            entry = self._index.get((before, key))
            if entry is None:
                break
            before, page = entry
            pages.append(page)
        return pages

    def _withdraw(self, page: int) -> None:
        del self._index[self._keys.pop(page)]

    def recount(self) -> None:
        """Nobody but the rows in ``tables`` holds a page, if who has them is still there.

        So it is already, unless an exception that may come anywhere, as KeyboardInterrupt does,
        came between two steps of what this class does.
        """
        self.tables = {
            k: (owner, rows) for k, (owner, rows) in self.tables.items() if owner() is not None
        }
        held = Counter(page for _, rows in self.tables.values() for row in rows for page in row)
        known = [(key, entry) for key, entry in self._index.items()]
        self._index = {key: entry for key, entry in known if self._keys.get(entry[1]) == key}
        self._keys = {page: key for key, (_, page) in self._index.items()}
        self._owners = [held[page] for page in range(len(self._owners))]
        unheld = [page for page, owners in enumerate(self._owners) if not owners]
        order = [page for page in self._idle if page in self._keys and not self._owners[page]]
        order += [page for page in unheld if page in self._keys]
        self._idle = OrderedDict.fromkeys(order)
        self._free = [page for page in unheld if page not in self._keys]

    def check(self) -> None:
        """Raises AssertionError unless every page is held, idle or free, exactly one of them."""
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle
        for page, owners in enumerate(self._owners):
            assert owners >= 0 and (owners == 0) == (page in free or page in idle), page
        assert idle <= self._keys.keys() and not free & self._keys.keys()
        assert {page: key for key, (_, page) in self._index.items()} == self._keys
        assert self.n_held == sum(owners > 0 for owners in self._owners)
