"""Small trace files of every format, and how to compare what was read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sim.request import Request
from sim.traces import Trace

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319601,3180,8\r\n"
    "2023-11-17 18:17:04,110,27"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45.25,GPT-4,1087,230,1317,API log\n"
    "118.0,ChatGPT,417,276,693,Conversation log\n"
)
BURSTGPT_SESSIONS = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,12,3.5,ChatGPT,472,18,490,Conversation log\n"
    "45,,,ChatGPT,1087,230,1317,API log\n"
)
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 1030, "output_length": 52, "hash_ids": [46, 47, 2353]}\n'
    '{"timestamp": 27482, "input_length": 1024, "output_length": 26, "hash_ids": [46, 47]}\n'
    '{"timestamp": 30535.5, "input_length": 513, "output_length": 3, "hash_ids": [46, 9223372036854775807]}\n'
)
BAILIAN = (
    '{"chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 33, "output_length": 132, '
    '"type": "text", "turn": 2, "hash_ids": [1089, 1090, 1091]}\n'
    '{"chat_id": 160, "parent_chat_id": -1, "timestamp": 62, "input_length": 32, "output_length": 7, '
    '"type": "search", "turn": 1, "hash_ids": [1089, 1092]}\n'
    '{"chat_id": 161, "parent_chat_id": 159, "timestamp": 70.000001, "input_length": 40, "output_length": 1, '
    '"type": "text", "turn": 3, "hash_ids": [1089, 1090]}\n'
)
SHAREGPT = (
    '{"input_toks": 3, "output_toks": 2, "arrival_time_ns": 1000, "input_tok_ids": [1, 2, 3]}\n'
    '{"input_toks": 2, "output_toks": 2, "arrival_time_ns": 3501, "input_tok_ids": [1, 2], '
    '"output_tok_ids": [2147483647, 0]}\n'
)
ANY_CSV = "when,in,what,out,urgency\n10.5,7,x,3,0\n11,8,y,4,-2\n"

TEXTS = {
    "azure": AZURE,
    "burstgpt": BURSTGPT,
    "mooncake": MOONCAKE,
    "bailian": BAILIAN,
    "sharegpt": SHAREGPT,
}


def write(folder: Path, text: str | bytes, name: str = "trace.txt") -> Path:
    """Write a file, bytes as they are."""
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def as_values(request: Request) -> dict[str, Any]:
    """Return what a request was made of as values that compare."""
    found = {field.name: getattr(request, field.name) for field in fields(request) if field.init}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}


def same_requests(left: Trace, right: Trace) -> bool:
    """Return whether two traces ask for the same, field by field."""
    return [as_values(request) for request in left] == [as_values(request) for request in right]
