"""Readers against what was written: rows are made up, written out by hand in each format, and must come back.

The file is built from the values, with all the freedom that the format leaves (order of columns, further columns,
decimal places, blank lines, line ends), so the expectation owes nothing to the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from different_cases import different_examples
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import as_values, write

from sim.traces import read_trace, write_trace

PS = 10**12


@dataclass(frozen=True)
class Made:
    """A file, how to read it, and what must come out: a request's fields by name, all else at its default."""

    text: str
    arguments: dict[str, Any]
    expected: list[dict[str, Any]]


@st.composite
def arrivals(draw: st.DrawFn, digits: int) -> list[Fraction]:
    """Draw times in seconds that do not decrease, with so many decimal places."""
    steps = draw(st.lists(st.integers(0, 3 * 10**digits), min_size=1, max_size=6))
    return [Fraction(sum(steps[: count + 1]), 10**digits) for count in range(len(steps))]


def decimal(value: Fraction, digits: int) -> str:
    """Write a number with at most so many decimal places, without a trailing point."""
    units = int(value * 10**digits)
    whole, part = divmod(units, 10**digits)
    return f"{whole}.{part:0{digits}d}" if part or digits == 1 else str(whole)


def lengths(draw: st.DrawFn, count: int, most: int = 90) -> list[tuple[int, int]]:
    return [(draw(st.integers(1, most)), draw(st.integers(1, most))) for _ in range(count)]


def table(draw: st.DrawFn, columns: dict[str, list[Any]]) -> str:
    """Write columns as CSV: in any order, others among them, values in quotes or not."""
    rows = len(next(iter(columns.values())))
    if draw(st.booleans()):
        columns = {**columns, "Other": [draw(st.sampled_from(["", "x", '"a, b"'])) for _ in range(rows)]}
    names = draw(st.permutations(list(columns)))
    end = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
    quote = draw(st.sampled_from(["", '"']))
    lines = [",".join(names)]
    for row in range(rows):
        values = (columns[name][row] for name in names)
        lines.append(
            ",".join(str(value) if str(value)[:1] == '"' else f"{quote}{value}{quote}" for value in values)
        )
    return end.join(lines) + draw(st.sampled_from(["", end]))


def objects(draw: st.DrawFn, records: list[dict[str, Any]]) -> str:
    """Write objects as JSON Lines: keys in any order, others among them, with spaces or without.

    A value given as (text,) is written as that text, without quotes.
    """
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    lines = []
    for record in records:
        if draw(st.booleans()):
            record = {**record, "note": draw(st.sampled_from([None, "é", [1], {"a": 2}]))}
        parts = []
        for name in draw(st.permutations(list(record))):
            value = record[name]
            shown = value[0] if isinstance(value, tuple) else json.dumps(value, separators=separators)
            parts.append(f"{json.dumps(name)}{separators[1]}{shown}")
        lines.append("{" + separators[0].join(parts) + "}")
    return draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines)


def requests(times: list[Fraction], sizes: list[tuple[int, int]], **more: list[Any]) -> list[dict[str, Any]]:
    """Return the requests' fields; times count from the first, `more` is by field and row."""
    return [
        {
            "request_id": row,
            "arrival_ps": int((at - times[0]) * PS),
            "prompt_tokens": sizes[row][0],
            "output_tokens": sizes[row][1],
            **{name: values[row] for name, values in more.items()},
        }
        for row, at in enumerate(times)
    ]


@st.composite
def azure(draw: st.DrawFn) -> Made:
    times = draw(arrivals(7))
    sizes = lengths(draw, len(times), 10**8)
    begin = draw(st.datetimes(datetime(2000, 1, 1), datetime(2040, 1, 1))).replace(microsecond=0)
    hours = draw(st.sampled_from([None, 0, -7, 5]))
    stamps = []
    for at in times:
        second = begin + timedelta(seconds=int(at))
        shown = second if hours is None else second + timedelta(hours=hours)
        part = int(at % 1 * 10**7)
        zone = "" if hours is None else f"{hours:+03d}:00"
        stamps.append(f"{shown:%Y-%m-%d %H:%M:%S}" + (f".{part:07d}" if part else "") + zone)
    columns = {
        "TIMESTAMP": stamps,
        "ContextTokens": [prompt for prompt, _ in sizes],
        "GeneratedTokens": [output for _, output in sizes],
    }
    return Made(table(draw, columns), {}, requests(times, sizes))


@st.composite
def burstgpt(draw: st.DrawFn) -> Made:
    times = draw(arrivals(3))
    sizes = lengths(draw, len(times), 10**8)
    columns = {
        "Timestamp": [decimal(at, 3) for at in times],
        "Model": ["GPT-4"] * len(times),
        "Request tokens": [prompt for prompt, _ in sizes],
        "Response tokens": [output for _, output in sizes],
    }
    return Made(table(draw, columns), {}, requests(times, sizes))


@st.composite
def csv(draw: st.DrawFn) -> Made:
    unit, digits = draw(st.sampled_from([("", 9), ("_ms", 6), ("_us", 3), ("_ns", 1)]))
    times = draw(arrivals(9))
    sizes = lengths(draw, len(times))
    priorities = [draw(st.integers(-3, 3)) for _ in times]
    scale = {"": 1, "_ms": 10**3, "_us": 10**6, "_ns": 10**9}[unit]
    columns = {
        "t": [decimal(at * scale, digits) for at in times],
        "p": [prompt for prompt, _ in sizes],
        "o": [output for _, output in sizes],
        "u": priorities,
    }
    arguments = {"columns": f"arrival{unit}=t,prompt=p,output=o,priority=u"}
    return Made(table(draw, columns), arguments, requests(times, sizes, priority=priorities))


@st.composite
def mooncake(draw: st.DrawFn) -> Made:
    times = draw(arrivals(6))
    sizes = [(draw(st.integers(1, 2000)), draw(st.integers(1, 90))) for _ in times]
    chunks = [[draw(st.integers(0, 2**63 - 1)) for _ in range(-(-prompt // 512))] for prompt, _ in sizes]
    records = [
        {
            "timestamp": (decimal(at * 1000, 3),),
            "input_length": prompt,
            "output_length": output,
            "hash_ids": ids,
        }
        for at, (prompt, output), ids in zip(times, sizes, chunks, strict=True)
    ]
    named = [prompt for prompt, _ in sizes]
    expected = requests(times, sizes, chunk_ids=chunks, granularity=[512] * len(times), named_tokens=named)
    return Made(objects(draw, records), {}, expected)


@st.composite
def bailian(draw: st.DrawFn) -> Made:
    times = draw(arrivals(3))
    sizes = lengths(draw, len(times))
    chats = draw(st.permutations(range(len(times))))
    chunks = [[draw(st.integers(0, 99)) for _ in range(-(-prompt // 16))] for prompt, _ in sizes]
    parents = [
        draw(st.integers(-1, row)) for row in range(len(times))
    ]  # its own row: a chat from before the file
    records = [
        {
            "chat_id": chats[row],
            "parent_chat_id": -1 if parent < 0 else chats[parent] if parent < row else 10**6,
            "timestamp": (decimal(times[row], 3),),
            "input_length": sizes[row][0],
            "output_length": sizes[row][1],
            "type": "text",
            "turn": 1,
            "hash_ids": chunks[row],
        }
        for row, parent in enumerate(parents)
    ]
    expected = requests(
        times,
        sizes,
        chunk_ids=chunks,
        granularity=[16] * len(times),
        named_tokens=[prompt for prompt, _ in sizes],
        parent=[parent if parent < row else -1 for row, parent in enumerate(parents)],
    )
    return Made(objects(draw, records), {}, expected)


@st.composite
def sharegpt(draw: st.DrawFn) -> Made:
    times = draw(arrivals(9))
    sizes = lengths(draw, len(times), 12)
    named = [draw(st.booleans()) for _ in times]
    prompts = [[draw(st.integers(0, 2**31 - 1)) for _ in range(prompt)] for prompt, _ in sizes]
    outputs = [[draw(st.integers(0, 9)) for _ in range(output)] for _, output in sizes]
    records = [
        {
            "input_toks": sizes[row][0],
            "output_toks": sizes[row][1],
            "arrival_time_ns": int(times[row] * 10**9),
            "input_tok_ids": prompts[row],
            **({"output_tok_ids": outputs[row]} if named[row] else {}),
        }
        for row in range(len(times))
    ]
    ids = [
        prompt + (output if there else [])
        for prompt, output, there in zip(prompts, outputs, named, strict=True)
    ]
    expected = requests(times, sizes, token_ids=ids, named_tokens=[len(each) for each in ids])
    return Made(objects(draw, records), {}, expected)


DEFAULTS = {
    "chunk_ids": None,
    "granularity": 0,
    "token_ids": None,
    "named_tokens": 0,
    "num_samples": 1,
    "beam_width": 1,
    "parent": -1,
    "think_ps": 0,
    "priority": 0,
    "salt": "",
}


@pytest.mark.parametrize("make", [azure, burstgpt, csv, mooncake, bailian, sharegpt])
def test_what_was_written_comes_back(make: Callable[[], st.SearchStrategy[Made]]) -> None:
    @different_examples()
    @given(make())
    def check(made: Made) -> None:
        with TemporaryDirectory() as folder:
            path = write(Path(folder), made.text)
            trace = read_trace(path, **made.arguments)
            assert trace.format == make.__name__
            expected = [{**DEFAULTS, **fields} for fields in made.expected]
            assert [as_values(request) for request in trace] == expected
            # and through the native format, read back by polars alone
            write_trace(trace, Path(folder) / "native")
            table = pl.read_parquet(Path(folder) / "native")
            rows = [{"request_id": row, **values} for row, values in enumerate(table.iter_rows(named=True))]
            assert rows == [{name: fields[name] for name in rows[0]} for fields in expected]
            again = [as_values(request) for request in read_trace(Path(folder) / "native", stream=True)]
            assert again == expected

    check()
