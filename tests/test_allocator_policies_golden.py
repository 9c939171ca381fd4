"""Each policy on a sequence of requests short enough to follow by hand, with the evictions to expect written out.

A request's prompt is written as letters, a block each, and a block by all letters up to it: "AB" has the blocks A and
AB. Requests come one after the other. One more token, in a block of its own that is never cached, lets every letter
be hit; `cached` is how many blocks there are besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from allocator.content import TokenContent
from allocator.event_log import EVICTED
from allocator.eviction import (
    FIFO,
    GDSF,
    LFU,
    LRU,
    MRU,
    S3FIFO,
    SIEVE,
    SLRU,
    Belady,
    EvictionPolicy,
    Priority,
)
from allocator.manager import KVCacheManager
from allocator.retention import RetentionConfig

Wish = tuple[int, int | None]
"""Priority, and duration if it is not for good."""


def content_of(letters: str) -> TokenContent:
    return TokenContent([2 * ord(letter) + i for letter in letters for i in (0, 1)] + [0])


class Replay:
    """A manager with a policy, and the names of the blocks that it cached."""

    def __init__(self, policy: EvictionPolicy, cached: int) -> None:
        self.manager = KVCacheManager(cached + 1, 2, policy=policy, events=True)
        self._names: dict[int, str] = {}
        self._seen = 0

    def request(self, letters: str, wish: Wish | None = None) -> list[str]:
        """Serve a request; return what was evicted for it, in order."""
        manager, content = self.manager, content_of(letters)
        retention = None if wish is None else RetentionConfig.whole(*wish)
        match = manager.lookup(content)
        sequence = manager.admit(
            content, content.num_prompt_tokens - match.hit_tokens, match, retention=retention
        )
        log = manager.events
        assert log is not None
        evicted = [
            self._names.pop(block)
            for event in log.events(self._seen)
            if event.kind == EVICTED
            for block in event.blocks
        ]
        self._seen = len(log)
        table = sequence.block_table[: len(letters)]
        self._names.update((int(block), letters[: i + 1]) for i, block in enumerate(table))
        manager.release(sequence)
        manager.check_invariants()
        return evicted


def evictions(policy: EvictionPolicy, cached: int, requests: str) -> list[str]:
    """Return "request: what was evicted for it" for each request that something was evicted for."""
    return served(policy, cached, requests.split())


def served(policy: EvictionPolicy, cached: int, steps: Sequence[Any]) -> list[str]:
    """As `evictions`, of steps: a time, or a prompt, or a prompt and what its request wishes."""
    replay = Replay(policy, cached)
    found = []
    for step in steps:
        if isinstance(step, int):
            replay.manager.now = step
            continue
        letters, wish = (step, None) if isinstance(step, str) else step
        evicted = replay.request(letters, wish)
        if evicted:
            found.append(f"{letters}: {' '.join(evicted)}")
    return found


def test_lru() -> None:
    """A is used again, so B is the least recently used."""
    assert evictions(LRU(), 3, "A B C A D E") == ["D: B", "E: C"]


def test_lru_gives_up_a_prefix_from_its_end() -> None:
    """ABC is one extent of three blocks; the two that are least recently used are its last ones."""
    assert evictions(LRU(), 4, "ABC D EF") == ["EF: ABC AB"]


def test_fifo() -> None:
    """That A is used again does not count."""
    assert evictions(FIFO(), 3, "A B C A D E") == ["D: A", "E: B"]


def test_mru() -> None:
    """The last one used goes: A, and then the D that came in its place."""
    assert evictions(MRU(), 3, "A B C A D E") == ["D: A", "E: D"]


def test_lfu() -> None:
    """
    request   hits so far
    D         A 1  B 1  C 0     C goes
    E         A 1  B 1  D 0     D goes
    D         A 1  B 1  E 0     E goes; D begins at 0 again
    F         A 1  B 1  D 2     A and B are equal, A was used less recently
    G         B 1  D 2  F 0     F goes
    """
    requests = "A A B C B D E D D D F G"
    assert evictions(LFU(), 3, requests) == ["D: C", "E: D", "D: E", "F: A", "G: F"]


def test_slru() -> None:
    """Two of five blocks may be protected.

    request     on probation  protected
    B (second)  C D           A B
    E           D E           A B       C goes, the first on probation
    D           E A           B D       D is hit; A, the first of three that are protected, is demoted
    F           A F           B D       E goes
    A           F B           D A       A is hit again; B is demoted
    G           B G           D A       F goes
    H           G H           D A       B goes
    """
    requests = "A B C D A B E D F A G H"
    assert evictions(SLRU(0.5), 4, requests) == ["E: C", "F: E", "G: F", "H: B"]


def test_sieve() -> None:
    """
    request  from old to new, * where it was hit, > where the hand is
    C (2nd)  >A* B C* D
    E        A >C* D E      A is spared, B goes
    F        A C >E F       C is spared, D goes
    G        A C >F G       E goes
    H        A C >G H       F goes
    G, H     A C >G* H*
    I        >C G H I       G and H are spared, and from the start again, A goes
    J        >G H I J       C goes
    """
    requests = "A B C D A C E F G H G H I J"
    assert evictions(SIEVE(), 4, requests) == ["E: B", "F: D", "G: E", "H: F", "I: A", "J: C"]


def test_s3_fifo() -> None:
    """The small queue has two of five places, the main one three, and so many are the ghosts.

    request  small      main       ghosts     (each from old to new, with the number of hits)
    D        A B C D
    E        B C D E               A          A goes
    B B C    B2 C1 D E             A
    F        D E F      B          A C        B was hit twice, and moves; C, hit once, goes
    A        E F        B A        C D        D goes; A was a ghost
    G        F G        B A        C D E      E goes
    D        G          B A D      E F        F goes, and C is forgotten; D was a ghost
    H        G H        A D        E F        the small queue has less than its share: B goes, and leaves no ghost
    A        G H        A1 D       E F
    I        H I        A1 D       E F G      G goes
    F        I          A1 D F     G H        H goes, and E is forgotten; F was a ghost
    J        I J        F A        G H        A was hit, and gets another round; D goes
    """
    requests = "A B C D E B B C F A G D H A I F J"
    assert evictions(S3FIFO(0.4), 4, requests) == [
        *("E: A", "F: C", "A: D", "G: E", "D: F"),
        *("H: B", "I: G", "F: H", "J: D"),
    ]


def test_gdsf() -> None:
    """A block costs 1 + its depth, and is worth the clock's reading when it was used last + uses · cost.

    request  worth, of the blocks without children     clock
    E        ABC 3  D 1                     D goes     1
    F        ABC 3  E 1 + 1                 E goes     2
    G        ABC 3  F 2 + 1                 ABC goes, less recently used; 3
    H        AB 2  F 3  G 3 + 1             AB goes
    I        A 1  F 3  G 4  H 4             A goes
    F        F 3 + 2 · 1
    J        F 5  G 4  H 4  I 4             G goes
    """
    requests = "ABC D E F G H I F J"
    assert evictions(GDSF(1), 4, requests) == ["E: D", "F: E", "G: ABC", "H: AB", "I: A", "J: G"]


def test_priority() -> None:
    """
    time  request  priorities, from the least to the most recently used
    0     D        A 80  B 35  C 10           C goes
    0     B        A 80  D 35  B 90 until 5
    0     E        A 80  D 35  B 90           D goes
    6     F        A 80  E 35  B 35           B has expired, as if it had been used at 5: E goes
    6     G        A 80  B 35  F 35           B goes
    6     H        A 80  F 35  G 35           F goes
    """
    steps = [("A", (80, None)), "B", ("C", (10, None)), "D", ("B", (90, 5)), "E", 6, "F", "G", "H"]
    assert served(Priority(), 3, steps) == ["D: C", "E: D", "F: E", "G: B", "H: F"]


def test_priority_of_a_child_keeps_its_parents() -> None:
    """A has the lowest priority of all, and cannot go while AB builds on it."""
    steps = [("A", (0, None)), ("AB", (35, None)), "C", "D", "E"]
    assert served(Priority(), 3, steps) == ["D: AB", "E: A"]


@pytest.mark.parametrize(
    ("cached", "requests", "expected"),
    [
        # B is used after A; then neither C nor A is used again, and C was used less recently
        (2, "A B C A B", ["C: B", "B: C"]),
        # D is used last, though it was used last before, too
        (4, "ABC D E ABC D", ["E: D", "D: E"]),
        # AB is used again, and before D, but ABC is not
        (4, "ABC D E AB D", ["E: ABC"]),
    ],
)
def test_belady(cached: int, requests: str, expected: list[str]) -> None:
    policy = Belady()
    replay = Replay(policy, cached)
    prompts = requests.split()
    numbers = [policy.foresee(content_of(letters), 2) for letters in prompts]
    found = []
    for number, letters in zip(numbers, prompts, strict=True):
        policy.begin(number)
        evicted = replay.request(letters)
        if evicted:
            found.append(f"{letters}: {' '.join(evicted)}")
    assert found == expected
