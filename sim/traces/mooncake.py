"""The Mooncake traces (Qin et al., FAST 2025; Apache-2.0): arrival, lengths, and the content in 512-token chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sim.traces.fields import PS_PER_MS, Row, chunk_ids, number_ps, required, tokens
from sim.traces.formats import JsonLinesFormat

TOKENS_PER_HASH = 512


class MooncakeFormat(JsonLinesFormat):
    """JSON Lines: timestamp (milliseconds), input_length, output_length, hash_ids.

    A hash id stands for 512 tokens and all that precede them; the prompt's last chunk may be shorter, and its id
    stands for just that much.
    """

    name = "mooncake"
    describes = "Mooncake traces"
    arrival_field = "timestamp"
    keys: ClassVar[frozenset[str]] = frozenset({"input_length", "output_length", "hash_ids"})
    needs: ClassVar[Mapping[str, str]] = {
        "timestamp": "milliseconds",
        "input_length": "tokens",
        "output_length": "tokens",
        "hash_ids": f"list of integers, one for each {TOKENS_PER_HASH} tokens of the prompt",
    }

    def parse(self, record: dict[str, Any]) -> Row:
        arrival = number_ps("timestamp", required(record, "timestamp"), PS_PER_MS)
        prompt = tokens("input_length", required(record, "input_length"))
        output = tokens("output_length", required(record, "output_length"))
        ids = chunk_ids("hash_ids", required(record, "hash_ids"), prompt, TOKENS_PER_HASH)
        return Row(arrival, prompt, output, chunk_ids=ids, granularity=TOKENS_PER_HASH, named_tokens=prompt)
