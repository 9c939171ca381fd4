"""PrefixIndex: the tree of extents against a plain dict of prefixes."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.prefix import Extent, PrefixIndex, common_blocks

words = st.text("ab", min_size=1, max_size=8)


class Forest:
    """An index under one root beside a dict of prefixes; blocks are numbered as they come."""

    def __init__(self, ghosts: int, width: int) -> None:
        self.index = PrefixIndex(ghosts)
        self.root = self.index.root("tokens", "", width)
        self.root.references = 1
        self.width = width
        self.live: dict[str, int] = {}
        self.ghosts: dict[str, None] = {}
        self.next = 0

    def keys(self, word: str) -> bytes:
        return b"".join(letter.encode() * self.width for letter in word)

    def insert(self, word: str) -> None:
        ids = array("i", range(self.next, self.next + len(word)))
        self.next += len(word)
        at = 0
        for extent, is_new in self.index.insert(self.root, self.keys(word), ids, self.index.split):
            assert extent.start == at
            for i, block in enumerate(extent.ids, at):
                prefix = word[: i + 1]
                assert is_new == (prefix not in self.live)
                if is_new:
                    self.live[prefix] = ids[i]
                    self.ghosts.pop(prefix, None)
                assert self.live[prefix] == block
            at = extent.end
        assert at == len(word)

    def evict(self, choice: int, count: int) -> None:
        """Evict up to `count` blocks from the tail of an extent without live children."""
        leaves = [e for e in self.index.extents() if e.ids and not e.live_children]
        if not leaves:
            return
        extent = leaves[choice % len(leaves)]
        word = self.word(extent)
        count = min(count, len(extent.ids))
        gone = self.index.trim(extent, count)
        for length, block in zip(range(len(word), len(word) - count, -1), reversed(gone), strict=True):
            assert self.live.pop(word[:length]) == block
            self.ghosts[word[:length]] = None
        while len(self.ghosts) > self.index.ghost_capacity:
            del self.ghosts[next(iter(self.ghosts))]

    def word(self, extent: Extent) -> str:
        keys = b"".join(bytes(e.keys) for e in reversed(list(extent.path())))
        return keys[:: self.width].decode()

    def check(self) -> None:
        live: dict[str, int] = {}
        ghosts: set[str] = set()
        for extent in self.index.extents():
            word = self.word(extent)
            for i in range(extent.num_blocks):
                prefix = word[: extent.start + i + 1]
                if extent.ids:
                    live[prefix] = extent.ids[i]
                else:
                    ghosts.add(prefix)
            assert extent.live_children == sum(bool(c.ids) for c in (extent.children or {}).values())
        assert live == self.live
        assert ghosts == set(self.ghosts)
        assert self.index.ghost_blocks == len(ghosts)

    def match(self, word: str) -> None:
        path = self.index.match(self.root, self.keys(word))
        found = [
            i for extent, blocks in path for i in (extent.ids[:blocks] if extent.ids else [None] * blocks)
        ]
        expected = []
        for length in range(1, len(word) + 1):
            if word[:length] not in self.live and word[:length] not in self.ghosts:
                break
            expected.append(self.live.get(word[:length]))
        assert found == expected


@given(
    width=st.sampled_from([1, 4]),
    ghosts=st.sampled_from([0, 3, 100]),
    steps=st.lists(st.tuples(st.sampled_from("iiem"), words, st.integers(0, 9)), max_size=25),
)
def test_the_tree_is_a_dict_of_prefixes(width: int, ghosts: int, steps: list[tuple[str, str, int]]) -> None:
    forest = Forest(ghosts, width)
    for what, word, number in steps:
        if what == "i":
            forest.insert(word)
        elif what == "e":
            forest.evict(number, 1 + number % 4)
        forest.match(word)
        forest.check()


@given(st.text("ab", max_size=12), st.text("ab", max_size=12), st.integers(0, 12), st.sampled_from([1, 3]))
def test_common_blocks(one: str, other: str, at: int, width: int) -> None:
    at = min(at, len(other))
    expected = 0
    while expected < min(len(one), len(other) - at) and one[expected] == other[at + expected]:
        expected += 1
    first, second = (b"".join(letter.encode() * width for letter in word) for word in (one, other))
    assert common_blocks(bytearray(first), second, at, width) == expected


def test_the_tail_of_a_split_is_the_known_object() -> None:
    forest = Forest(8, 1)
    forest.insert("abab")
    (whole,) = forest.index.extents()
    whole.references, whole.sealed = 3, True
    head = forest.index.split(whole, 1)
    assert (head.start, head.end, whole.start, whole.end) == (0, 1, 1, 4)
    assert (head.references, head.sealed, head.live_children) == (3, True, 1)
    assert list(whole.path()) == [whole, head]


def test_every_change_makes_matches_stale() -> None:
    forest = Forest(8, 1)
    version = forest.index.version

    def changed() -> bool:
        nonlocal version
        before, version = version, forest.index.version
        return version != before

    forest.insert("abab")
    assert changed()
    (extent,) = forest.index.extents()
    forest.index.split(extent, 2)
    assert changed()
    forest.index.trim(extent, 1)
    assert changed()
    forest.index.trim(extent, 2)
    assert changed()
    forest.index.match(forest.root, b"ab")
    assert not changed()


@pytest.mark.parametrize("ghosts", [0, 4])
def test_unused_roots_are_forgotten(ghosts: int) -> None:
    forest = Forest(ghosts, 1)
    forest.insert("ab")
    (extent,) = forest.index.extents()
    forest.root.references = 0
    forest.index.discard_if_unused(forest.root)
    assert forest.index.roots, "it has an extent"
    forest.index.remove(extent)
    assert not forest.index.roots


def test_ghosts_evicted_in_a_row_share_a_node() -> None:
    forest = Forest(100, 1)
    forest.insert("abababab")
    (extent,) = forest.index.extents()
    for _ in range(8):
        forest.index.trim(extent, 1)
    assert len(list(forest.index.extents())) == 1
    assert forest.index.ghost_blocks == 8
    assert not forest.index.forgot


def test_the_ghost_evicted_first_is_forgotten_first() -> None:
    forest = Forest(3, 1)
    forest.insert("aaaa")
    forest.insert("bb")
    forest.evict(0, 2)
    forest.evict(1, 2)
    forest.check()
    assert forest.index.forgot
