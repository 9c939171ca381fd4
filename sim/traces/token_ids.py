"""Traces made from ShareGPT conversations, with the token ids themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sim.traces.fields import PS_PER_NS, FieldError, Row, id_list, number_ps, required, tokens
from sim.traces.formats import JsonLinesFormat


class TokenIdsFormat(JsonLinesFormat):
    """JSON Lines: arrival_time_ns, input_toks, output_toks, input_tok_ids; output_tok_ids where it is there.

    The shape in which LLMServingSim (Cho et al., IISWC 2024) takes ShareGPT workloads.
    """

    name = "sharegpt"
    describes = "ShareGPT-style traces"
    arrival_field = "arrival_time_ns"
    keys: ClassVar[frozenset[str]] = frozenset({"input_toks", "output_toks", "arrival_time_ns"})
    needs: ClassVar[Mapping[str, str]] = {
        "arrival_time_ns": "nanoseconds",
        "input_toks": "tokens of the prompt",
        "output_toks": "tokens of the answer",
        "input_tok_ids": "list of the prompt's token ids, one a token",
    }
    takes: ClassVar[Mapping[str, str]] = {"output_tok_ids": "the same of the answer"}

    def parse(self, record: dict[str, Any]) -> Row:
        prompt = tokens("input_toks", required(record, "input_toks"))
        output = tokens("output_toks", required(record, "output_toks"))
        ids = _token_ids("input_tok_ids", required(record, "input_tok_ids"), prompt)
        if record.get("output_tok_ids"):
            ids = np.concatenate([ids, _token_ids("output_tok_ids", record["output_tok_ids"], output)])
        return Row(
            number_ps("arrival_time_ns", required(record, "arrival_time_ns"), PS_PER_NS),
            prompt,
            output,
            token_ids=ids,
            named_tokens=len(ids),
        )


def _token_ids(field: str, value: object, count: int) -> NDArray[np.int32]:
    ids = id_list(field, value, 2**31 - 1)
    if len(ids) != count:
        raise FieldError(field, f"({len(ids)} ids) must have {count}, one a token")
    return np.array(ids, dtype=np.int32)
