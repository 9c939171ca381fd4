"""Histories of sequences whose prompts name content chunks, or nothing: chunk ids, and streams behind them.

See allocator.content for what units and streams are.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from math import gcd
from struct import Struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from allocator.content_base import Content, History

_Layers = tuple[tuple[int, int], ...]

UNIT_BYTES: Final = 8
"""Of the key of a unit in a content of chunks."""

_NO_IDS: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
_streams: Final = itertools.count(1)
"""As new_stream, but of 63 bits: no content of token ids meets one of chunks."""


_pack: Final = Struct("<q").pack  # half the time of int.to_bytes


def stream_key(stream: int) -> bytes:
    """Return the key of a unit in which `stream` wrote."""
    return _pack(-stream)


def new_key() -> bytes:
    """Return the key of a unit in which a new stream wrote."""
    return _pack(-next(_streams))


def stream_of(key: bytes) -> int:
    """Return the stream of a key that `stream_key` made."""
    return -int.from_bytes(key, "little", signed=True)


def expand(ids: NDArray[np.int64], granularity: int, num_tokens: int, unit: int) -> bytes:
    """Return the keys of all units that end within the first `num_tokens` tokens, which chunk ids name."""
    repeats = granularity // unit
    if repeats > 1:
        ids = ids.repeat(repeats)  # half the time of np.repeat
    return ids[: num_tokens // unit].tobytes()


def _refuse_names() -> None:
    raise ValueError("tokens cannot be named one by one in a content of chunks: pass None for them")


class UniqueHistory(History):
    """A unique prompt, and what was generated after it: two streams, of which one writes a block, or ends it."""

    __slots__ = ("_full", "_num_prompt_tokens", "_prompt_key", "_tail_key")

    def __init__(self, prompt_key: bytes, num_prompt_tokens: int, tokens_per_block: int) -> None:
        self._prompt_key = prompt_key
        self._num_prompt_tokens = num_prompt_tokens
        self._full = num_prompt_tokens // tokens_per_block
        self._tail_key = b""  # until it is asked for
        self.tokens_per_block = tokens_per_block
        self.key_width = UNIT_BYTES

    def keys(self, first: int, last: int) -> bytes:
        full = self._full
        if last <= full:
            return self._prompt_key * (last - first)
        tail = self._tail_key
        if not tail:
            tail = self._tail_key = new_key()
        if first >= full:
            return tail * (last - first)
        return self._prompt_key * (full - first) + tail * (last - full)

    def check_nameable(self) -> None:
        _refuse_names()

    def record_packed(self, position: int, token_ids: bytes) -> None:
        _refuse_names()

    def _layered(self) -> ChunkHistory:
        """Return an equal history that can diverge anywhere."""
        self._tail_key = self._tail_key or new_key()
        layers = ((0, stream_of(self._prompt_key)), (self._num_prompt_tokens, stream_of(self._tail_key)))
        return ChunkHistory(_NO_IDS, 0, 0, layers, self.tokens_per_block)

    def diverge(self, position: int) -> ChunkHistory:
        return self._layered().diverge(position)

    def content(self, num_tokens: int) -> Content:
        return self._layered().content(num_tokens)


class ChunkHistory(History):
    """Chunk ids, then layers: (position, stream) pairs, each overriding all before it from there on."""

    __slots__ = ("_granularity", "_ids", "_layers", "_named", "_tail", "named_keys", "unit")

    def __init__(
        self, ids: NDArray[np.int64], granularity: int, named: int, layers: _Layers, tokens_per_block: int
    ) -> None:
        self._ids = ids
        self._granularity = granularity
        self._layers = layers
        self.tokens_per_block = tokens_per_block
        self.unit = gcd(granularity, tokens_per_block)
        self.key_width = 8 * (tokens_per_block // self.unit)
        self._named = min(named, layers[0][0]) if layers else named
        self.named_keys: bytes | None = None
        self._tail: tuple[int, bytes] | None = (
            None  # first block written by the last stream alone, and its key
        )

    def keys(self, first: int, last: int) -> bytes:
        """Return the keys of blocks first … last − 1.

        A unit has the id of its chunk if it ends within the named tokens, else the stream of the last layer
        that begins before its end.
        """
        named, end = self.named_keys, last * self.key_width
        if named is not None and end <= len(named):  # in the prompt
            return named[first * self.key_width : end]
        tail = self._tail  # while decoding
        if tail is None:
            start, stream = self._last_layer()
            tail = self._tail = (
                -(-start // self.tokens_per_block),
                stream_key(stream) * (self.key_width // 8),
            )
        if first >= tail[0]:
            return tail[1] * (last - first)
        if self.named_keys is None:
            self.named_keys = expand(self._ids, self._granularity, self._named, self.unit)
        return self._tail_keys(first, last)

    def _last_layer(self) -> tuple[int, int]:
        if not self._layers:
            self._layers = ((self._named, next(_streams)),)
        return self._layers[-1]

    def _tail_keys(self, first: int, last: int) -> bytes:
        units = self.tokens_per_block // self.unit
        begin, end = first * units, last * units
        keys = bytearray((self.named_keys or b"")[begin * UNIT_BYTES : end * UNIT_BYTES])
        for position, stream in self._layers:
            first_unit = position // self.unit  # the first that ends beyond `position`
            if first_unit < begin:
                first_unit = begin
            keys[(first_unit - begin) * UNIT_BYTES :] = stream_key(stream) * (end - first_unit)
        return bytes(keys)

    def record_packed(self, position: int, token_ids: bytes) -> None:
        _refuse_names()

    def check_nameable(self) -> None:
        _refuse_names()

    def diverge(self, position: int) -> ChunkHistory:
        if position > self._named:
            self._last_layer()
        layers = (*(layer for layer in self._layers if layer[0] < position), (position, next(_streams)))
        return ChunkHistory(self._ids, self._granularity, self._named, layers, self.tokens_per_block)

    def content(self, num_tokens: int) -> Content:
        self._last_layer()
        return _ResumedContent(self, num_tokens)

    def _resume(self, position: int) -> ChunkHistory:
        """Return a history equal to this one up to `position`, and beyond it as far as tokens are named."""
        if position >= self._named:
            return self.diverge(position)
        return ChunkHistory(self._ids, self._granularity, self._named, (), self.tokens_per_block)


class _ResumedContent(Content):
    """The prompt and the answer so far of a preempted sequence; what follows is unlike anything else."""

    __slots__ = ("_source",)

    def __init__(self, source: ChunkHistory, num_tokens: int) -> None:
        super().__init__(num_tokens)
        self._source = source

    def family(self) -> Hashable:
        return self._source._granularity

    def history(self, tokens_per_block: int) -> ChunkHistory:
        return self._source._resume(self.num_prompt_tokens)

    def prompt_keys(self, tokens_per_block: int) -> bytes:
        return self._source.keys(0, self.num_prompt_tokens // tokens_per_block)

    def first_key(self, tokens_per_block: int) -> bytes:
        return self._source.keys(0, 1)

    def block_units(self, tokens_per_block: int, block: int) -> tuple[bytes, int]:
        units = self.num_prompt_tokens // self._source.unit - block * (tokens_per_block // self._source.unit)
        return self._source.keys(block, block + 1)[: units * UNIT_BYTES], UNIT_BYTES
