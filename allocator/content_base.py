"""The contracts of contents: what a prompt says, and what a sequence says while it grows.

See allocator.content for what they describe, and for what keys, units and streams are.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from array import array
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

from numpy.typing import NDArray

from allocator.checks import as_int

_MAX_STREAM = 2**31 - 1
_streams = itertools.count(1)


def new_stream() -> int:
    """Return a number that no other run of unnamed tokens has; it decides equality only, never an order."""
    stream = next(_streams)
    if stream > _MAX_STREAM:
        raise OverflowError(f"stream ({stream}) must be at most {_MAX_STREAM} to fit a token id's 32 bits")
    return stream


class Content(ABC):
    """What a prompt says. Immutable; one object may be looked up and admitted any number of times."""

    __slots__ = ("num_prompt_tokens",)

    num_prompt_tokens: int
    """Tokens of the prompt: what admission has to compute or to find in the cache."""

    def __init__(self, num_prompt_tokens: int) -> None:
        if type(num_prompt_tokens) is not int or num_prompt_tokens < 1:
            num_prompt_tokens = as_int("num_prompt_tokens", num_prompt_tokens, 1)
        self.num_prompt_tokens = num_prompt_tokens

    def is_unheard(self) -> bool:
        """Return whether no key of it has been told, so that nobody can have cached any of it."""
        return False

    @abstractmethod
    def family(self) -> Hashable:
        """Return what must be equal for two contents to be comparable at all."""

    @abstractmethod
    def history(self, tokens_per_block: int) -> History:
        """Return the growing history of a sequence that starts with this prompt."""

    def prompt_keys(self, tokens_per_block: int) -> bytes:
        """Return the keys of the prompt's full blocks, one after the other."""
        return self.history(tokens_per_block).keys(0, self.num_prompt_tokens // tokens_per_block)

    def first_key(self, tokens_per_block: int) -> bytes:
        """Return the key of the prompt's first block, if that is full: what a cache is asked for first."""
        return self.history(tokens_per_block).keys(0, 1)

    @abstractmethod
    def block_units(self, tokens_per_block: int, block: int) -> tuple[bytes, int]:
        """Return the keys of those units of a block that lie in the prompt, and the bytes of one unit's key.

        A unit is what can be told apart within a block: tokens_per_block · bytes / key_width tokens.
        """


class History(ABC):
    """A sequence's content while it grows: the prompt, then what was generated, sequence by sequence.

    `key_width` is the number of bytes that identify one block, `nameable` whether tokens can be named one by one.
    """

    __slots__ = ("key_width", "tokens_per_block")

    key_width: int
    tokens_per_block: int
    nameable: ClassVar[bool] = False

    @abstractmethod
    def keys(self, first: int, last: int) -> bytes:
        """Return the keys of blocks first … last − 1, `key_width` bytes each."""

    def check_nameable(self) -> None:
        """Raise ValueError unless tokens can be named one by one."""

    def record(self, position: int, token_ids: Sequence[int]) -> None:
        """Name the tokens written from `position` on."""
        self.record_packed(position, array("i", token_ids).tobytes())

    @abstractmethod
    def record_packed(self, position: int, token_ids: bytes) -> None:
        """Name the tokens written from `position` on, int32 each."""

    @abstractmethod
    def diverge(self, position: int) -> History:
        """Return a history equal to this one up to `position` and unlike any other from there on."""

    @abstractmethod
    def content(self, num_tokens: int) -> Content:
        """Return the first `num_tokens` tokens as a prompt, for a sequence that is to be computed again."""


def require_integers(name: str, ids: NDArray[Any]) -> None:
    """Raise ValueError unless `ids` is a row of integers."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} (an array of {ids.dtype}, {ids.ndim} axes) must be a row of integers")
