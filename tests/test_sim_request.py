"""Request: what it refuses, and how it describes its content to the allocator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from allocator.content import ChunkContent, TokenContent, UniqueContent
from sim.request import MAX_TIME_PS, MAX_TOKENS, Request


def request(**fields: Any) -> Request:
    return Request(**{"request_id": 3, "arrival_ps": 0, "prompt_tokens": 40, "output_tokens": 10} | fields)


def ids(count: int, dtype: Any = np.int64) -> Any:
    return np.arange(count, dtype=dtype)


def test_content_without_ids_is_unique() -> None:
    content = request().content()
    assert isinstance(content, UniqueContent)
    assert content.num_prompt_tokens == 40
    assert content.prompt_keys(8) != request().content().prompt_keys(8)


def test_content_of_chunks_may_go_on_beyond_the_prompt() -> None:
    content = request(chunk_ids=ids(3), granularity=16, named_tokens=45).content()
    assert isinstance(content, ChunkContent)
    assert (content.num_prompt_tokens, content.num_named_tokens, content.granularity) == (40, 45, 16)
    other = request(chunk_ids=ids(3), granularity=16, named_tokens=40).content()
    assert content.prompt_keys(8) == other.prompt_keys(8)


def test_content_of_token_ids_covers_the_prompt() -> None:
    content = request(token_ids=ids(45, np.int32), named_tokens=45).content()
    assert isinstance(content, TokenContent)
    assert content.num_prompt_tokens == 40
    assert content.prompt_keys(8) == request(
        token_ids=ids(40, np.int32), named_tokens=40
    ).content().prompt_keys(8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"request_id": -1}, r"^request_id \(-1\) must not be negative$"),
        ({"arrival_ps": -1}, r"^arrival_ps \(-1\) must be in 0\.\."),
        ({"arrival_ps": MAX_TIME_PS + 1}, r"^arrival_ps \(9000000000000000001\) must be in 0\.\."),
        ({"think_ps": -5}, r"^think_ps \(-5\) must be in 0\.\."),
        ({"prompt_tokens": 0}, r"^prompt_tokens \(0\) must be in 1\.\."),
        ({"output_tokens": 0}, r"^output_tokens \(0\) must be in 1\.\."),
        ({"output_tokens": MAX_TOKENS + 1}, r"^output_tokens \(100000001\) must be in 1\.\."),
        ({"num_samples": 0}, r"^num_samples \(0\) must be in 1\.\."),
        ({"beam_width": 0}, r"^beam_width \(0\) must be in 1\.\."),
        ({"beam_width": 4, "num_samples": 2}, r"^num_samples \(2\) must be 1 with beam_width \(4\)$"),
        (
            {"beam_width": 2, "token_ids": ids(41), "named_tokens": 41},
            r"^named_tokens \(41\) must be at most prompt_tokens \(40\) with beam_width \(2\)$",
        ),
        ({"parent": 3}, r"^parent \(3\) must be -1 or an earlier request of 3$"),
        ({"parent": -2}, r"^parent \(-2\) must be -1 or an earlier request of 3$"),
        ({"named_tokens": 40}, r"^named_tokens \(40\) must be 0 without ids$"),
        ({"granularity": 16}, r"^granularity \(16\) must be 0 without chunk_ids$"),
        (
            {"chunk_ids": ids(3), "granularity": 16, "named_tokens": 39},
            r"^named_tokens \(39\) must be in 40\.\.50: the prompt at least, the whole sequence at most$",
        ),
        (
            {"chunk_ids": ids(4), "granularity": 16, "named_tokens": 51},
            r"^named_tokens \(51\) must be in 40\.\.50",
        ),
        (
            {"chunk_ids": ids(4), "granularity": 16, "named_tokens": 40},
            r"^chunk_ids \(4 of them\) must be 3 for 40 tokens at granularity 16$",
        ),
        (
            {"chunk_ids": ids(2), "granularity": 16, "named_tokens": 40},
            r"^chunk_ids \(2 of them\) must be 3 for 40 tokens at granularity 16$",
        ),
        ({"chunk_ids": ids(3), "named_tokens": 40}, r"^granularity \(0\) must be at least 1$"),
        (
            {"chunk_ids": ids(1), "granularity": 2**20 + 1, "named_tokens": 40},
            r"^granularity \(1048577\) must be at most 1048576$",
        ),
        (
            {"token_ids": ids(41, np.int32), "named_tokens": 40},
            r"^token_ids \(41 of them\) must be as many as named_tokens \(40\)$",
        ),
        (
            {"token_ids": ids(40, np.int32), "chunk_ids": ids(3), "granularity": 16, "named_tokens": 40},
            r"^chunk_ids and token_ids must not be given together$",
        ),
    ],
)
def test_impossible_requests_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**fields)
