"""Prefilling: the sequences whose prompts are not computed completely yet, found by what they compute next."""

from __future__ import annotations

from collections.abc import Iterator

from allocator.prefix import Extent, common_blocks
from allocator.sequence import KVSequence


class Prefilling:
    """Such sequences, listed at their anchor under the key of the block that they are going to fill next.

    A lookup that passes an anchor so finds those which compute what it lacks, and looks at no others.
    """

    def __init__(self) -> None:
        self._places: dict[KVSequence, tuple[Extent, bytes] | None] = {}
        self._at: dict[Extent, dict[bytes, dict[KVSequence, None]]] = {}

    def __contains__(self, sequence: KVSequence) -> bool:
        return sequence in self._places

    def __iter__(self) -> Iterator[KVSequence]:
        return iter(self._places)

    def begins(self, root: Extent, key: bytes) -> bool:
        """Return whether a listed sequence is going to fill a first block with this key."""
        keys = self._at.get(root)
        return keys is not None and key in keys

    def put(self, sequence: KVSequence) -> None:
        """List a sequence, or list it anew where its prefill has got to."""
        if sequence in self._places:
            self.discard(sequence)
        history, start = sequence.settled_history, sequence.anchored
        if start >= sequence.num_prompt_tokens // history.tokens_per_block:
            self._places[sequence] = None  # what it still computes fills no block
            return
        anchor, key = sequence.anchor, history.keys(start, start + 1)
        self._places[sequence] = anchor, key
        self._at.setdefault(anchor, {}).setdefault(key, {})[sequence] = None

    def discard(self, sequence: KVSequence) -> None:
        """Forget a sequence that is listed."""
        place = self._places.pop(sequence)
        if place is None:
            return
        anchor, key = place
        keys = self._at[anchor]
        del keys[key][sequence]
        if not keys[key]:
            del keys[key]
            if not keys:
                del self._at[anchor]

    def ahead(
        self, root: Extent, walked: list[tuple[Extent, int]], keys: bytes
    ) -> tuple[int, KVSequence | None]:
        """Return up to which block of a prompt somebody is going to compute what it needs, and who; 0 if nobody.

        root, walked  the extents that the prompt's `keys` lead through, and how many blocks of each
        """
        best: tuple[int, KVSequence | None] = (0, None)
        if not self._at:
            return best
        width = root.width
        whole = [root, *(extent for extent, blocks in walked if blocks == extent.num_blocks)]
        for anchor in whole:
            start = anchor.end
            for sequence in self._at.get(anchor, {}).get(keys[start * width : (start + 1) * width], ()):
                history = sequence.settled_history
                theirs = history.keys(start, sequence.num_prompt_tokens // history.tokens_per_block)
                end = start + common_blocks(theirs, keys, start, width)
                if end > best[0]:
                    best = end, sequence
        return best

    def check(self) -> None:
        """Raise AssertionError if a sequence is not listed where it is."""
        for sequence, place in self._places.items():
            history, start = sequence.settled_history, sequence.anchored
            assert sequence.num_tokens < sequence.num_prompt_tokens, f"{sequence} is not prefilling"
            if place is None:
                assert start >= sequence.num_prompt_tokens // history.tokens_per_block
            else:
                assert place == (sequence.anchor, history.keys(start, start + 1)), (
                    f"{sequence} is listed elsewhere"
                )
                assert sequence in self._at[place[0]][place[1]]
        listed = sum(len(found) for keys in self._at.values() for found in keys.values())
        assert listed == sum(place is not None for place in self._places.values())
