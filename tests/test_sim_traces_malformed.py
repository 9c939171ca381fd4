"""Every format refuses every kind of malformation in one line, by file, line and field, or counts it and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from trace_cases import AZURE, as_values, write

from sim.traces import FORMATS, TraceError, read_trace
from sim.traces.__main__ import main

CSV_HEADERS = {
    "azure": ["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
    "burstgpt": ["Timestamp", "Request tokens", "Response tokens"],
    "csv": ["when", "in", "out"],
}
JSON_FIELDS = {
    "mooncake": ("timestamp", "input_length", "output_length", "hash_ids"),
    "bailian": ("timestamp", "input_length", "output_length", "hash_ids"),
    "sharegpt": ("arrival_time_ns", "input_toks", "output_toks", "input_tok_ids"),
}
COLUMNS = {"csv": {"columns": "arrival=when,prompt=in,output=out"}}


def fields(name: str) -> tuple[str, str, str]:
    """Return what a format calls arrival, prompt and output."""
    if name == "native":
        return "arrival_ps", "prompt_tokens", "output_tokens"
    arrival, prompt, output = (CSV_HEADERS.get(name) or JSON_FIELDS[name])[:3]
    return arrival, prompt, output


def when(name: str, second: int) -> Any:
    """Return a time as the format writes it."""
    if name == "azure":
        return f"2023-11-16 00:00:{second:02d}"
    return second * {"sharegpt": 10**9, "mooncake": 1000, "native": 10**12}.get(name, 1)


def good(name: str, second: int) -> dict[str, Any]:
    """Return a row of 40 prompt and 5 output tokens."""
    row: dict[str, Any] = dict(zip(fields(name), (when(name, second), 40, 5), strict=True))
    if name == "mooncake":
        row["hash_ids"] = [second]
    elif name == "bailian":
        row |= {"hash_ids": [1, 2, second + 3], "chat_id": second, "parent_chat_id": -1}
    elif name == "sharegpt":
        row["input_tok_ids"] = [second] * 40
    return row


def text(name: str, rows: list[dict[str, Any]]) -> str:
    """Write rows as a file of a text format."""
    if name in CSV_HEADERS:
        return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows), ""])
    return "".join(json.dumps(row) + "\n" for row in rows)


def save(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    if name != "native":
        return write(folder, text(name, rows))
    pl.DataFrame(rows, schema=dict.fromkeys(fields(name), pl.Int64)).write_parquet(folder / "trace.txt")
    return folder / "trace.txt"


def line(name: str, row: int) -> int:
    """Return the line of a row, from 0; a CSV file has a header, a Parquet file counts rows from 1."""
    return row + 1 + (name in CSV_HEADERS)


def read(path: Path, name: str, **options: Any) -> Any:
    return read_trace(path, **(COLUMNS.get(name) or {"format": name}), **options)


VALUES = {
    "a negative prompt": (1, -40, "(-40) must be at least 1"),
    "a negative output": (2, -5, "(-5) must be at least 1"),
    "no prompt": (1, 0, "(0) must be at least 1"),
    "no output": (2, 0, "(0) must be at least 1"),
    "an absurd prompt": (1, 10**9, "(1000000000) must be at most 100000000"),
    "an absurd output": (2, 10**18, f"({10**18}) must be at most 100000000"),
}
NAMES = sorted(FORMATS)


def check(path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the second of three rows is refused by the message, alike by reader and command, or left out."""
    with pytest.raises(TraceError) as caught:
        read(path, name)
    assert str(caught.value) == f"{path}:{message}"
    for stream in (False, True):
        trace = read(path, name, skip_bad=True, stream=stream)
        assert (len(trace), trace.skipped) == (2, 1)
        rows = [as_values(request) for request in trace]
        assert [row["prompt_tokens"] for row in rows] == [40, 40]
        assert rows[1]["arrival_ps"] - rows[0]["arrival_ps"] == 2 * 10**12
    options = ["--columns", COLUMNS["csv"]["columns"]] if name == "csv" else ["--format", name]
    assert main(["describe", str(path), *options]) == 2
    assert capsys.readouterr().err == f"error: {path}:{message}\n"
    assert main(["describe", str(path), *options, "--skip-bad"]) == 0
    assert "malformed rows skipped" in capsys.readouterr().out
    assert main(["convert", str(path), f"{path}.native", *options, "--skip-bad"]) == 0
    assert capsys.readouterr().out == f"2 requests (1 malformed rows skipped) written to {path}.native\n"


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", NAMES)
def test_lengths_beyond_reason(
    tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, value, rule = VALUES[kind]
    rows = [good(name, second) for second in (1, 2, 3)]
    field = fields(name)[place]
    rows[1][field] = value
    if (name, kind) == ("burstgpt", "no output"):
        rule += "; such a request got no answer, and skip_bad leaves it out"
    check(save(tmp_path, name, rows), name, f"{line(name, 1)}: field {field!r} {rule}", capsys)


@pytest.mark.parametrize("name", NAMES)
def test_unsorted_times(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [good(name, second) for second in (1, 0, 3)]
    rule = "(1 s before the row above) must not decrease"
    check(save(tmp_path, name, rows), name, f"{line(name, 1)}: field {fields(name)[0]!r} {rule}", capsys)


@pytest.mark.parametrize("name", NAMES)
def test_absurd_times(tmp_path: Path, name: str) -> None:
    rows = [good(name, second) for second in (1, 2, 3)]
    century = {"azure": "2123-11-16 00:00:00", "native": 9 * 10**18 + 1}.get(name, 10**20)
    rows[2][fields(name)[0]] = century
    path = save(tmp_path, name, rows)
    with pytest.raises(TraceError) as caught:
        read(path, name)
    found = str(caught.value)
    assert found.startswith(f"{path}:{line(name, 2)}: field {fields(name)[0]!r} (")
    assert "\n" not in found
    assert read(path, name, skip_bad=True).skipped == 1


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name in NAMES for place in range(3 + (name in JSON_FIELDS))]
)
def test_a_missing_field(tmp_path: Path, name: str, place: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [good(name, second) for second in (1, 2, 3)]
    if name in JSON_FIELDS:
        field = JSON_FIELDS[name][place]
        del rows[1][field]
        check(save(tmp_path, name, rows), name, f"2: field {field!r} is missing", capsys)
        return
    field = fields(name)[place]
    rows[1][field] = None if name == "native" else ""
    rule = "(null) must not be null" if name == "native" else "is missing"
    check(save(tmp_path, name, rows), name, f"{line(name, 1)}: field {field!r} {rule}", capsys)


@pytest.mark.parametrize("name", sorted({*CSV_HEADERS, *JSON_FIELDS}))
def test_a_truncated_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = text(name, [good(name, second) for second in (1, 2, 3)]).splitlines()
    at = line(name, 1) - 1
    if name in CSV_HEADERS:
        lines[at] = lines[at].rpartition(",")[0]
        field = CSV_HEADERS[name][2]
        message = f"{at + 1}: field {field!r} is missing: the row has 2 fields and must have 3"
    else:
        lines[at] = lines[at][:15]
        message = f"{at + 1}: line must be one JSON object, but: "
    path = write(tmp_path, "\n".join(lines) + "\n")
    if name in CSV_HEADERS:
        check(path, name, message, capsys)
        return
    with pytest.raises(TraceError) as caught:
        read(path, name)
    assert str(caught.value).startswith(f"{path}:{message}")
    trace = read(path, name, skip_bad=True)
    assert (len(trace), trace.skipped) == (2, 1)


@pytest.mark.parametrize("pretended", [*CSV_HEADERS, *JSON_FIELDS, "native"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_pretends_to_be_of_another_format(tmp_path: Path, name: str, pretended: str) -> None:
    """What it is is told from the content; named otherwise, it is refused by the first line, and wholly."""
    path = save(tmp_path, name, [good(name, second) for second in (1, 2, 3)])
    if pretended == name:
        assert len(read(path, name)) == 3
        return
    for skip_bad in (False, True):
        with pytest.raises(TraceError) as caught:
            read(path, pretended, skip_bad=skip_bad)
        assert str(caught.value).startswith(f"{path}:")
        assert "\n" not in str(caught.value)


def test_a_csv_that_pretends_to_be_burstgpt(tmp_path: Path) -> None:
    path = write(tmp_path, "Timestamp,Model,Request tokens,Answer tokens\n5,GPT-4,10,20\n")
    message = (
        f"{path}:1: field 'Response tokens' is missing in the header "
        "(Timestamp, Model, Request tokens, Answer tokens): "
        "the burstgpt format needs Timestamp, Request tokens, Response tokens"
    )
    for options in ({}, {"format": "burstgpt"}, {"skip_bad": True}):
        with pytest.raises(TraceError) as caught:
            read_trace(path, **options)  # type: ignore[arg-type]
        assert str(caught.value) == message
    with pytest.raises(TraceError, match=r":1: field 'Timestamp' is missing in the header \(TIMESTAMP, "):
        read_trace(write(tmp_path, AZURE), format="burstgpt")


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    path = save(tmp_path, "native", [good("native", second) for second in (1, 2, 3)])
    path.write_bytes(path.read_bytes()[:-20])
    for skip_bad in (False, True):
        with pytest.raises(TraceError, match=r"trace.txt: must be a whole Parquet file: [^\n]+$"):
            read_trace(path, format="native", skip_bad=skip_bad)
