"""The Qwen-Bailian traces (Wang et al., USENIX ATC 2025; Apache-2.0): sessions, and content in 16-token chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from sim.traces.fields import PS_PER_S, FieldError, Row, id_list, number_ps, required, tokens, whole
from sim.traces.formats import JsonLinesFormat

TOKENS_PER_HASH = 16
_FIRST_UNSEEN_ID = 2**62


class BailianFormat(JsonLinesFormat):
    """JSON Lines: chat_id, parent_chat_id (−1 for a session's first turn), timestamp (seconds), input_length,
    output_length, hash_ids; type and turn are not needed.

    A hash id stands for 16 tokens, whatever precedes them. A file may or may not give an id to the prompt's last
    chunk where it is shorter; where it does not, nobody shares that chunk. A parent that the file does not hold,
    because it began before it, counts as none.
    """

    name = "bailian"
    describes = "Qwen-Bailian traces"
    arrival_field = "timestamp"
    keys: ClassVar[frozenset[str]] = frozenset({"chat_id", "parent_chat_id"})
    needs: ClassVar[Mapping[str, str]] = {
        "chat_id": "integer",
        "parent_chat_id": "the chat_id of the session's turn before, or -1",
        "timestamp": "seconds",
        "input_length": "tokens",
        "output_length": "tokens",
        "hash_ids": f"list of integers, one for each {TOKENS_PER_HASH} tokens of the prompt",
    }

    def __init__(self) -> None:
        self._unseen = _FIRST_UNSEEN_ID

    def parse(self, record: dict[str, Any]) -> Row:
        prompt = tokens("input_length", required(record, "input_length"))
        parent = whole("parent_chat_id", required(record, "parent_chat_id"))
        ids = id_list("hash_ids", required(record, "hash_ids"), _FIRST_UNSEEN_ID - 1)
        chunks = -(-prompt // TOKENS_PER_HASH)
        if len(ids) == prompt // TOKENS_PER_HASH < chunks:
            ids = [*ids, self._unseen]
            self._unseen += 1
        if len(ids) != chunks:
            raise FieldError(
                "hash_ids",
                f"({len(ids)} ids) must have {chunks} for {prompt} tokens in chunks of {TOKENS_PER_HASH}",
            )
        return Row(
            number_ps("timestamp", required(record, "timestamp"), PS_PER_S),
            prompt,
            tokens("output_length", required(record, "output_length")),
            chunk_ids=np.array(ids, dtype=np.int64),
            granularity=TOKENS_PER_HASH,
            named_tokens=prompt,
            key=whole("chat_id", required(record, "chat_id")),
            parent_key=None if parent == -1 else parent,
        )
