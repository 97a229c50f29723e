"""The allocator under random operations: every page is held, idle or free, and counted right."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_poor.paging import PageAllocator

#: Random operations of all examples together.
OPERATIONS, EXAMPLES = 1_000_000, 40


class Model:
    """What the allocator should be, by the simplest means: lists of pages that owners hold."""

    def __init__(self, n_pages: int, rng: random.Random):
        self.allocator, self.n_pages, self.rng = PageAllocator(n_pages), n_pages, rng
        # Pages, and all the tokens; the first of them may have no page any more.
        self.sequences: list[tuple[list[int], list[tuple]]] = []
        self.contents: dict[int, tuple] = {}  # page: tokens of it and all before it
        self.owners = [0] * n_pages

    def take(self, pages):
        """These are held by one more; what the allocator gave counts too."""
        for page in pages:
            self.owners[page] += 1

    def give_back(self, pages):
        self.allocator.release(pages)
        for page in pages:
            self.owners[page] -= 1

    def held(self) -> Counter:
        return Counter(page for pages, _ in self.sequences for page in pages)

    def new(self):
        tokens = [(self.rng.randrange(3),) for _ in range(self.rng.randrange(1, 6))]
        found = self.allocator.find(tokens)
        for i, page in enumerate(found):
            assert self.contents[page] == tuple(tokens[: i + 1]), "found what others wrote"
        self.allocator.hold(found)
        self.take(found)
        self.sequences.append((list(found), tokens[: len(found)]))
        for token in tokens[len(found) :]:
            self.grow(self.sequences[-1], token)

    def grow(self, sequence, token=None):
        pages, tokens = sequence
        free = self.allocator.n_free
        try:
            (page,) = self.allocator.allocate(1)
        except MemoryError:
            assert free == 0
            return
        assert free > 0 and not self.owners[page], "given to two"
        self.take([page])
        pages.append(page)
        tokens.append((self.rng.randrange(3),) if token is None else token)
        self.contents[page] = tuple(tokens)

    def fork(self, sequence):
        pages, tokens = sequence
        self.allocator.hold(pages)
        self.take(pages)
        self.sequences.append((list(pages), list(tokens)))

    def write(self, sequence):
        """Copy on write of a random page."""
        pages, tokens = sequence
        if not pages:
            return
        i = self.rng.randrange(len(pages))
        alone = self.owners[pages[i]] == 1
        if self.allocator.writable(pages[i]):
            assert alone and not self.allocator.published(pages[i])
        elif self.allocator.n_free:
            (page,) = self.allocator.allocate(1)
            self.take([page])
            self.give_back([pages[i]])
            pages[i] = page
        else:
            return
        left = len(tokens) - len(pages)
        tokens[left + i] = (self.rng.randrange(3, 6),)
        for j in range(i, len(pages)):  # what follows has another beginning now
            if self.owners[pages[j]] == 1 and not self.allocator.published(pages[j]):
                self.contents[pages[j]] = tuple(tokens[: left + j + 1])

    def cut(self, sequence):
        pages, tokens = sequence
        n, left = self.rng.randrange(len(pages) + 1), len(tokens) - len(pages)
        self.give_back(pages[n:])
        del pages[n:], tokens[left + n :]

    def leave(self, sequence):
        """The first pages have left the window."""
        pages, _ = sequence
        n = self.rng.randrange(len(pages) + 1)
        self.give_back(pages[:n])
        del pages[:n]

    def publish(self, sequence):
        pages, tokens = sequence
        if len(pages) == len(tokens) and all(
            self.contents[p] == tuple(tokens[: i + 1]) for i, p in enumerate(pages)
        ):
            self.allocator.publish(tokens, pages)

    def drop(self, sequence):
        self.sequences.remove(sequence)
        self.give_back(sequence[0])

    def step(self):
        if not self.sequences or self.rng.random() < 0.15:
            return self.new()
        sequence = self.rng.choice(self.sequences)
        crowded = len(self.sequences) > 12
        actions = [self.grow, self.write, self.cut, self.leave, self.publish, self.drop]
        self.rng.choice([*actions, self.drop if crowded else self.fork])(sequence)

    def check(self):
        self.allocator.check()
        held = self.held()
        assert self.allocator.n_held == len(held)
        assert all(self.allocator.owners(p) == held[p] == n for p, n in enumerate(self.owners))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n_pages=st.integers(1, 40))
def test_a_million_operations_keep_the_invariants(seed, n_pages):
    model = Model(n_pages, random.Random(seed))
    for i in range(OPERATIONS // EXAMPLES):
        model.step()
        if i % 256 == 0:
            model.check()
    while model.sequences:
        model.drop(model.sequences[-1])
    model.check()
    assert model.allocator.n_free == n_pages and model.allocator.n_held == 0
    assert len(model.allocator.allocate(n_pages)) == n_pages, "idle pages are taken back"


def test_more_than_there_is_gives_nothing():
    allocator = PageAllocator(3)
    allocator.allocate(2)
    with pytest.raises(MemoryError, match="2 pages are wanted, 1 of 3 are free"):
        allocator.allocate(2)
    assert allocator.n_free == 1
    with pytest.raises(ValueError, match="n_pages"):
        PageAllocator(0)


def test_a_page_cannot_be_released_twice():
    allocator = PageAllocator(3)
    pages = allocator.allocate(1)
    allocator.release(pages)
    with pytest.raises(ValueError, match="nobody holds"):
        allocator.release(pages)
    with pytest.raises(KeyError):
        allocator.hold(pages)


def test_prefixes_are_found_by_all_their_tokens():
    allocator = PageAllocator(8)
    first, second = allocator.allocate(2), allocator.allocate(2)
    allocator.publish([(1, 2), (3, 4)], first)
    allocator.publish([(1, 2), (5, 6)], second)  # its first page is known already
    assert allocator.find([(1, 2), (3, 4), (9, 9)]) == first
    assert allocator.find([(1, 2), (5, 6)]) == [first[0], second[1]] or not allocator.published(
        second[0]
    )
    assert allocator.find([(3, 4)]) == [] and allocator.find([(2, 1)]) == []
    # Equal hashes are not enough: -1 and -2 hash alike.
    third = allocator.allocate(1)
    allocator.publish([(-1,)], third)
    assert allocator.find([(-2,)]) == [] and allocator.find([(-1,)]) == third


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning():
    allocator = PageAllocator(4)
    old, new = allocator.allocate(2), allocator.allocate(2)
    allocator.publish([(1,), (2,)], old)
    allocator.publish([(3,), (4,)], new)
    allocator.release(old)
    allocator.release(new)
    assert allocator.n_free == 4 and allocator.find([(1,), (2,)]) == old
    allocator.allocate(1)
    assert allocator.find([(1,), (2,)]) == old[:1]
    allocator.hold(allocator.find([(1,)]))  # in use again: not to be taken
    allocator.allocate(2)
    assert allocator.find([(1,)]) == old[:1] and allocator.find([(3,)]) == []
