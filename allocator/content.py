"""Content: what a sequence says, described well enough to tell equal blocks from different ones.

A prefix cache compares blocks, so a content answers one question: which bytes identify block i, given
everything before it? Three kinds of request traces answer it at three resolutions:

    TokenContent    the token ids themselves
    ChunkContent    one id for every `granularity` tokens (a trace's content chunks)
    UniqueContent   nothing: no other sequence says the same

Block size and granularity are independent. Both are cut into units of gcd(granularity, tokens_per_block)
tokens; a block's key is the row of its units' ids, and the position within a chunk needs no place in the key,
because keys are only ever compared at the same depth behind the same prefix.

Tokens that nobody named (generated ones, above all) belong to a *stream*: a number that one sequence, from
one position on, has for itself. A unit with such a token in it carries its stream in place of an id, as a
negative number; as the stream fixes all the tokens before, that is an exact identity too. No key is a hash.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Hashable, Iterable, Sequence
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.checks import as_int
from allocator.chunk_history import UNIT_BYTES, ChunkHistory, UniqueHistory, expand, new_key
from allocator.content_base import Content, History, new_stream, require_integers

__all__ = ["ChunkContent", "Content", "History", "TokenContent", "UniqueContent", "are_token_ids"]


_INT64 = np.dtype(np.int64)


class TokenContent(Content):
    """Token ids, int32 and not negative.

    `token_ids` may go on beyond `num_prompt_tokens` (default: all of them): the tokens that will be
    generated, where a trace names them. Raises ValueError for an id that is negative or does not fit, or too few.
    """

    __slots__ = ("_ids",)

    def __init__(
        self, token_ids: Iterable[int] | NDArray[np.integer], num_prompt_tokens: int | None = None
    ) -> None:
        ids = _packed_array(token_ids) if isinstance(token_ids, np.ndarray) else _packed(token_ids)
        named = len(ids) // 4
        super().__init__(named if num_prompt_tokens is None else num_prompt_tokens)
        if named < self.num_prompt_tokens:
            raise ValueError(f"token_ids ({named} of them) must cover the prompt ({self.num_prompt_tokens})")
        self._ids = ids

    @classmethod
    def _resumed(cls, ids: bytes, num_prompt_tokens: int) -> TokenContent:
        """Wrap ids that may include streams (negative numbers) of the sequence that is being resumed."""
        content = cls.__new__(cls)
        Content.__init__(content, num_prompt_tokens)
        content._ids = ids
        return content

    def family(self) -> Hashable:
        return "tokens"

    def history(self, tokens_per_block: int) -> TokenHistory:
        return TokenHistory(self._ids, tokens_per_block)

    def prompt_keys(self, tokens_per_block: int) -> bytes:
        full = self.num_prompt_tokens - self.num_prompt_tokens % tokens_per_block
        return self._ids[: 4 * full]

    def first_key(self, tokens_per_block: int) -> bytes:
        return self._ids[: 4 * tokens_per_block]

    def block_units(self, tokens_per_block: int, block: int) -> tuple[bytes, int]:
        end = min((block + 1) * tokens_per_block, self.num_prompt_tokens)
        return self._ids[4 * block * tokens_per_block : 4 * end], 4


def _packed(token_ids: Iterable[int]) -> bytes:
    """Return token ids as int32, one after the other."""
    try:
        ids = token_ids if isinstance(token_ids, list) else list(token_ids)
        try:
            packed = struct.Struct(f"<{len(ids)}I").pack(*ids)  # half the time of array or ndarray
        except struct.error:
            packed = array("i", ids).tobytes()  # says what is wrong, but takes negative numbers
    except TypeError as error:
        raise ValueError(f"token_ids must be integers: {error}") from None
    except OverflowError:
        raise ValueError("token_ids must all be less than 2**31, and none negative") from None
    if not are_token_ids(packed):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        rule = "must not be negative" if wrong < 0 else "must be less than 2**31"
        raise ValueError(f"token_ids ({wrong}) {rule}")
    return packed


def are_token_ids(packed: bytes) -> bool:
    """Return whether 32-bit numbers, least byte first, are all less than 2**31: then their last bytes are ASCII."""
    return packed[3::4].isascii()


def _packed_array(token_ids: NDArray[Any]) -> bytes:
    """Return token ids as int32, one after the other."""
    require_integers("token_ids", token_ids)
    if token_ids.size and token_ids.max() >= 2**31:
        raise ValueError(f"token_ids ({token_ids.max()}) must be less than 2**31")
    if token_ids.size and token_ids.min() < 0:
        raise ValueError(f"token_ids ({token_ids.min()}) must not be negative")
    return np.ascontiguousarray(token_ids, dtype=np.int32).tobytes()


class TokenHistory(History):
    """Token ids of a sequence, int32 each; unnamed tokens hold the negated stream.

    _first   ids shared with the content and with other histories: never changed
    _rest    ids beyond
    """

    __slots__ = ("_first", "_rest", "_stream")

    nameable = True

    def __init__(self, ids: bytes, tokens_per_block: int) -> None:
        self._first = ids
        self._rest = bytearray()
        self._stream = 0  # drawn when the first unnamed token is met
        self.tokens_per_block = tokens_per_block
        self.key_width = 4 * tokens_per_block

    def _bytes(self, begin: int, end: int) -> bytes:
        """Return bytes begin … end − 1 of the ids, as far as there are any."""
        first = self._first
        shared = len(first)
        if end <= shared:
            return first[begin:end]
        if begin >= shared:
            return bytes(self._rest[begin - shared : end - shared])
        return first[begin:] + self._rest[: end - shared]

    def _fill(self, num_tokens: int) -> None:
        missing = num_tokens - (len(self._first) + len(self._rest)) // 4
        if missing > 0:
            if not self._stream:
                self._stream = new_stream()
            self._rest += struct.pack("i", -self._stream) * missing

    def keys(self, first: int, last: int) -> bytes:
        end = last * self.key_width
        if end > len(self._first):
            self._fill(last * self.tokens_per_block)
        return self._bytes(first * self.key_width, end)

    def record_packed(self, position: int, token_ids: bytes) -> None:
        if len(self._first) + len(self._rest) == 4 * position:  # they come next, as a rule
            self._rest += token_ids
            return
        self._fill(position)
        begin = 4 * position - len(self._first)
        if begin < 0:  # ids that the content named already
            self._rest[:0] = self._first[begin:]
            self._first = self._first[:begin]
            begin = 0
        self._rest[begin : begin + len(token_ids)] = token_ids

    def diverge(self, position: int) -> TokenHistory:
        self._fill(position)
        return TokenHistory(self._bytes(0, 4 * position), self.tokens_per_block)

    def content(self, num_tokens: int) -> TokenContent:
        self._fill(num_tokens)
        return TokenContent._resumed(self._first + self._rest, num_tokens)


class ChunkContent(Content):
    """Content ids at a trace's own granularity.

    chunk_ids          int64 [>= ceil(num_named_tokens / granularity)], not negative; two sequences that agree
                       on the ids of a prefix say the same in it
    granularity        tokens an id stands for
    num_prompt_tokens  tokens of the prompt; the last chunk may be cut short
    num_named_tokens   tokens that the ids name, default the prompt; more where a trace (a session whose next
                       turn repeats the answer) names generated tokens

    Raises ValueError for a negative id, too few ids, or fewer named tokens than the prompt has.
    """

    __slots__ = ("_expanded", "chunk_ids", "granularity", "num_named_tokens")

    def __init__(
        self,
        chunk_ids: Sequence[int] | NDArray[np.integer],
        granularity: int,
        num_prompt_tokens: int,
        num_named_tokens: int | None = None,
    ) -> None:
        super().__init__(num_prompt_tokens)
        granularity = as_int("granularity", granularity, 1)
        named = num_prompt_tokens if num_named_tokens is None else num_named_tokens
        if named < num_prompt_tokens:
            raise ValueError(f"num_named_tokens ({named}) must cover the prompt ({num_prompt_tokens})")
        ids: Any = chunk_ids
        if type(ids) is not np.ndarray or ids.dtype is not _INT64 or ids.ndim != 1:  # a trace's ids are that
            ids = np.asarray(ids)
            require_integers("chunk_ids", ids)
            ids = ids.astype(np.int64, copy=False)
        if ids.size * granularity < named:
            raise ValueError(f"chunk_ids ({ids.size}) must cover {named} tokens in chunks of {granularity}")
        if not ids.tobytes()[7::8].isascii():  # half the time of min()
            raise ValueError(f"chunk_ids ({ids.min()}) must not be negative")
        self.chunk_ids: NDArray[np.int64] = ids
        self.granularity = granularity
        self.num_named_tokens = named
        self._expanded = 0, b"", 0  # what `_keys` returned last

    def family(self) -> Hashable:
        return self.granularity

    def history(self, tokens_per_block: int) -> ChunkHistory:
        history = ChunkHistory(self.chunk_ids, self.granularity, self.num_named_tokens, (), tokens_per_block)
        history.named_keys = self._keys(tokens_per_block)[1]
        return history

    def _keys(self, tokens_per_block: int) -> tuple[int, bytes, int]:
        """Return tokens_per_block, the keys of all units that end within the named tokens, and a block's key width."""
        expanded = self._expanded
        if expanded[0] != tokens_per_block:
            unit = gcd(self.granularity, tokens_per_block)
            keys = expand(self.chunk_ids, self.granularity, self.num_named_tokens, unit)
            expanded = self._expanded = (tokens_per_block, keys, tokens_per_block // unit * UNIT_BYTES)
        return expanded

    def prompt_keys(self, tokens_per_block: int) -> bytes:
        _, keys, width = self._keys(tokens_per_block)
        return keys[: self.num_prompt_tokens // tokens_per_block * width]

    def first_key(self, tokens_per_block: int) -> bytes:
        _, keys, width = self._keys(tokens_per_block)
        return keys[:width]

    def block_units(self, tokens_per_block: int, block: int) -> tuple[bytes, int]:
        history = self.history(tokens_per_block)
        assert history.named_keys is not None
        end = self.num_prompt_tokens // history.unit * UNIT_BYTES
        first = block * history.key_width
        return history.named_keys[first : min(first + history.key_width, end)], UNIT_BYTES


class UniqueContent(Content):
    """A prompt of which nothing is known: it equals itself (when looked up again) and nothing else."""

    __slots__ = ("_key",)

    def __init__(self, num_prompt_tokens: int) -> None:
        Content.__init__(self, num_prompt_tokens)  # super() would be a third of the time
        self._key = b""  # until somebody asks

    def is_unheard(self) -> bool:
        return not self._key

    def family(self) -> Hashable:
        return 0

    def history(self, tokens_per_block: int) -> UniqueHistory:
        key = self._key = self._key or new_key()
        return UniqueHistory(key, self.num_prompt_tokens, tokens_per_block)

    def prompt_keys(self, tokens_per_block: int) -> bytes:
        return self.first_key(tokens_per_block) * (self.num_prompt_tokens // tokens_per_block)

    def first_key(self, tokens_per_block: int) -> bytes:
        self._key = self._key or new_key()
        return self._key

    def block_units(self, tokens_per_block: int, block: int) -> tuple[bytes, int]:
        # One stream says the whole block: it is one unit.
        whole = (block + 1) * tokens_per_block <= self.num_prompt_tokens
        return self.first_key(tokens_per_block) if whole else b"", UNIT_BYTES
