"""Request: one row of a trace, as the simulator sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from allocator.content import ChunkContent, Content, TokenContent, UniqueContent
from allocator.field_docs import with_field_docs

PS_PER_S = 10**12
"""Picoseconds of a second: every time in the simulator is an integer number of them."""

MAX_TOKENS = 10**8
"""Longest prompt, and longest output, that is believed: ten times the longest context window sold."""

MAX_GRANULARITY = 2**20
"""Most tokens that one content id may stand for: the allocator cuts even a short prompt's chunk whole into units."""

MAX_TIME_PS = 9 * 10**18
"""Latest time that is believed, 104 days: times are kept as 64-bit integers."""


@with_field_docs
@dataclass(slots=True, frozen=True, eq=False)
class Request:
    """Describe what one caller asked for and when. Immutable, compared by identity.

    The prompt's content is given as `token_ids`, or as `chunk_ids` of `granularity` tokens each, or not at all:
    then nothing is known of it and no other request shares it. Ids may go on beyond the prompt, to name the
    tokens that will be generated; `named_tokens` says how many of the sequence's tokens they name.

    Raises ValueError when a field breaks its rule.
    """

    request_id: int
    """Row in the trace, from 0."""
    arrival_ps: int
    """Picoseconds since the start of the trace."""
    prompt_tokens: int
    """Tokens of the prompt."""
    output_tokens: int
    """Tokens generated, by each sample."""
    chunk_ids: NDArray[np.int64] | None = None
    """int64 [⌈named_tokens / granularity⌉], not negative: equal ids behind equal prefixes, equal content."""
    granularity: int = 0
    """Tokens a chunk id stands for; 0 without chunk ids."""
    token_ids: NDArray[np.int32] | None = None
    """int32 [named_tokens], not negative."""
    named_tokens: int = 0
    """Tokens, from the first, that the ids name: at least the prompt when there are ids, else 0."""
    num_samples: int = 1
    """Outputs generated from the one prompt."""
    beam_width: int = 1
    """Beams kept by a beam search for the output, 1 for none; each comes to output_tokens. A search has one sample,
    and ids name no token that it generates: which beam wins is not known before."""
    parent: int = -1
    """Request id of the session's previous turn, which must have finished first; -1 for none."""
    think_ps: int = 0
    """Picoseconds between the previous turn's end and this one's arrival, at least."""
    priority: int = 0
    """Larger is more urgent."""
    salt: str = ""
    """Requests with different salts share no cached content."""
    num_sequences: int = field(init=False)
    """Sequences that its one prompt comes to: samples, or beams."""

    def __post_init__(self) -> None:
        if self.request_id < 0:
            raise ValueError(f"request_id ({self.request_id}) must not be negative")
        if not 0 <= self.arrival_ps <= MAX_TIME_PS:
            raise ValueError(f"arrival_ps ({self.arrival_ps}) must be in 0..{MAX_TIME_PS}")
        if not 0 <= self.think_ps <= MAX_TIME_PS:
            raise ValueError(f"think_ps ({self.think_ps}) must be in 0..{MAX_TIME_PS}")
        for name, value in (
            ("prompt_tokens", self.prompt_tokens),
            ("output_tokens", self.output_tokens),
            ("num_samples", self.num_samples),
            ("beam_width", self.beam_width),
        ):
            if not 1 <= value <= MAX_TOKENS:
                raise ValueError(f"{name} ({value}) must be in 1..{MAX_TOKENS}")
        if self.beam_width > 1 and self.num_samples > 1:
            raise ValueError(
                f"num_samples ({self.num_samples}) must be 1 with beam_width ({self.beam_width})"
            )
        if self.beam_width > 1 and self.named_tokens > self.prompt_tokens:
            raise ValueError(
                f"named_tokens ({self.named_tokens}) must be at most prompt_tokens ({self.prompt_tokens}) "
                f"with beam_width ({self.beam_width})"
            )
        if not -1 <= self.parent < self.request_id:
            raise ValueError(f"parent ({self.parent}) must be -1 or an earlier request of {self.request_id}")
        self._check_content()
        object.__setattr__(self, "num_sequences", self.num_samples * self.beam_width)

    def __reduce__(self) -> tuple[type[Request], tuple[object, ...]]:
        """Say how to copy and pickle it: by making another, as nothing of this one can be set."""
        return type(self), tuple(getattr(self, each.name) for each in fields(self) if each.init)

    def _check_content(self) -> None:
        if self.chunk_ids is not None and self.token_ids is not None:
            raise ValueError("chunk_ids and token_ids must not be given together")
        if self.chunk_ids is None and self.granularity:
            raise ValueError(f"granularity ({self.granularity}) must be 0 without chunk_ids")
        if self.chunk_ids is None and self.token_ids is None:
            if self.named_tokens:
                raise ValueError(f"named_tokens ({self.named_tokens}) must be 0 without ids")
            return
        sequence = self.prompt_tokens + self.output_tokens
        if not self.prompt_tokens <= self.named_tokens <= sequence:
            raise ValueError(
                f"named_tokens ({self.named_tokens}) must be in {self.prompt_tokens}..{sequence}: "
                "the prompt at least, the whole sequence at most"
            )
        if self.token_ids is not None:
            if len(self.token_ids) != self.named_tokens:
                raise ValueError(
                    f"token_ids ({len(self.token_ids)} of them) must be as many as named_tokens "
                    f"({self.named_tokens})"
                )
        elif self.chunk_ids is not None:
            if self.granularity < 1:
                raise ValueError(f"granularity ({self.granularity}) must be at least 1")
            if self.granularity > MAX_GRANULARITY:
                raise ValueError(f"granularity ({self.granularity}) must be at most {MAX_GRANULARITY}")
            chunks = -(-self.named_tokens // self.granularity)
            if len(self.chunk_ids) != chunks:
                raise ValueError(
                    f"chunk_ids ({len(self.chunk_ids)} of them) must be {chunks} for {self.named_tokens} tokens "
                    f"at granularity {self.granularity}"
                )

    def content(self) -> Content:
        """Return the prompt as the allocator wants it described.

        A prompt of which nothing is known equals itself only, so look it up and admit it with one and the same
        object: each call describes a prompt of its own.
        """
        if self.token_ids is not None:
            return TokenContent(self.token_ids, self.prompt_tokens)
        if self.chunk_ids is not None:
            return ChunkContent(self.chunk_ids, self.granularity, self.prompt_tokens, self.named_tokens)
        return UniqueContent(self.prompt_tokens)
