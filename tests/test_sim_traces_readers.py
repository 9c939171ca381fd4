"""Each trace format reads as published: exact times, lengths, content, sessions; and the reader's options."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import (
    ANY_CSV,
    AZURE,
    BAILIAN,
    BURSTGPT,
    BURSTGPT_SESSIONS,
    MOONCAKE,
    SHAREGPT,
    TEXTS,
    as_values,
    same_requests,
    write,
)

from sim.traces import FORMATS, Trace, TraceError, read_trace
from sim.traces.fields import FieldError, number_ps, timestamp_ps
from sim.traces.formats import JsonLinesFormat
from sim.traces.reader import JSON_FORMATS

MS, S, DAY = 10**9, 10**12, 86400 * 10**12


def columns(trace: Trace) -> list[tuple[int, int, int]]:
    return [(request.arrival_ps, request.prompt_tokens, request.output_tokens) for request in trace]


def test_azure(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE, "AzureCode.csv")
    trace = read_trace(path)
    assert (trace.name, trace.format, trace.skipped, len(trace)) == ("AzureCode", "azure", 0, 3)
    assert trace.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    # seven digits are tenths of microseconds; the fraction may be absent
    assert columns(trace) == [
        (0, 4808, 10),
        (52_000_100_000, 3180, 8),
        (DAY + 20_040_000_000, 110, 27),
    ]
    assert trace.duration_ps == DAY + 20_040_000_000
    assert [request.request_id for request in trace] == [0, 1, 2]
    assert all(request.chunk_ids is None and request.named_tokens == 0 for request in trace)


def test_azure_of_2024_has_offsets(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 02:00:00.010930+02:00,2399,6\n"
    )
    assert columns(read_trace(write(tmp_path, text))) == [(0, 2162, 5), (MS, 2399, 6)]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    text = "GeneratedTokens, TIMESTAMP ,Region,ContextTokens\n7,2023-11-16 18:17:03,west,9\n"
    assert columns(read_trace(write(tmp_path, text))) == [(0, 9, 7)]


def test_burstgpt(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, BURSTGPT))
    assert trace.format == "burstgpt"
    assert columns(trace) == [(0, 472, 18), (40_250 * MS, 1087, 230), (113 * S, 417, 276)]
    sessions = read_trace(write(tmp_path, BURSTGPT_SESSIONS))
    assert sessions.format == "burstgpt"
    assert columns(sessions) == [(0, 472, 18), (40 * S, 1087, 230)]


def test_mooncake(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, MOONCAKE))
    assert trace.format == "mooncake"
    assert columns(trace) == [(0, 1030, 52), (0, 1024, 26), (3_053_500_000 * 1000, 513, 3)]
    first, _, last = trace.requests
    assert first.chunk_ids is not None
    assert first.chunk_ids.dtype == np.int64
    assert first.chunk_ids.tolist() == [46, 47, 2353]
    assert (first.granularity, first.named_tokens) == (512, 1030)
    assert last.chunk_ids is not None
    assert last.chunk_ids.tolist() == [46, 2**63 - 1]


def test_bailian(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, BAILIAN))
    assert trace.format == "bailian"
    assert columns(trace) == [(0, 33, 132), (886 * MS, 32, 7), (8_886_001_000_000, 40, 1)]
    # chat 55 is from before the file began; chat 159 is its first row
    assert [request.parent for request in trace] == [-1, -1, 0]
    assert all(request.granularity == 16 for request in trace)
    last = list(trace)[2].chunk_ids
    assert last is not None
    assert last[:2].tolist() == [1089, 1090]
    assert last[2] not in (1089, 1090, 1091, 1092)  # 40 tokens, two ids: nobody else's third chunk


def test_bailian_sessions_may_begin_with_chat_0_and_unnamed_tails_all_differ(tmp_path: Path) -> None:
    row = (
        '{"chat_id": %d, "parent_chat_id": %d, "timestamp": %d, '
        '"input_length": 17, "output_length": 1, "hash_ids": [5]}'
    )
    trace = read_trace(write(tmp_path, "\n".join(row % each for each in ((0, -1, 1), (7, 0, 2), (8, -1, 3)))))
    assert [request.parent for request in trace] == [-1, 0, -1]
    tails = [as_values(request)["chunk_ids"] for request in trace]
    assert all(len(ids) == 2 and ids[0] == 5 for ids in tails)
    assert len({ids[1] for ids in tails}) == 3


def test_sharegpt(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, SHAREGPT))
    assert trace.format == "sharegpt"
    assert columns(trace) == [(0, 3, 2), (2_501_000, 2, 2)]
    first, second = trace.requests
    assert first.token_ids is not None
    assert second.token_ids is not None
    assert first.token_ids.dtype == np.int32
    assert (first.token_ids.tolist(), first.named_tokens) == ([1, 2, 3], 3)
    assert (second.token_ids.tolist(), second.named_tokens) == ([1, 2, 2147483647, 0], 4)


@pytest.mark.parametrize(
    "given", ["arrival=when, prompt=in, output=out", {"arrival": "when", "prompt": "in", "output": "out"}]
)
def test_any_csv_by_columns(tmp_path: Path, given: str | dict[str, str]) -> None:
    trace = read_trace(write(tmp_path, ANY_CSV), columns=given)
    assert trace.format == "csv"
    assert columns(trace) == [(0, 7, 3), (S // 2, 8, 4)]
    assert [request.priority for request in trace] == [0, 0]


def test_any_csv_with_priority_and_other_units(tmp_path: Path) -> None:
    path = write(tmp_path, ANY_CSV)
    for unit, ps in {"ms": MS, "us": MS // 1000, "ns": 1000}.items():
        trace = read_trace(path, columns=f"arrival_{unit}=when,prompt=in,output=out,priority=urgency")
        assert columns(trace) == [(0, 7, 3), (ps // 2, 8, 4)]
        assert [request.priority for request in trace] == [0, -2]


def test_any_csv_with_timestamps(tmp_path: Path) -> None:
    text = "t,i,o\n2024-02-28T23:59:59.5Z,1,1\n2024-02-29 00:00:00,2,2\n2024-03-01T00:00:00+01:00,3,3\n"
    trace = read_trace(write(tmp_path, text), columns="arrival=t,prompt=i,output=o")
    assert columns(trace) == [(0, 1, 1), (S // 2, 2, 2), (S // 2 + 23 * 3600 * S, 3, 3)]


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_formats_are_told_by_content_and_can_be_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, TEXTS[name])
    told, named = read_trace(path), read_trace(path, format=name)
    assert told.format == named.format == name
    assert same_requests(told, named)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_byte_order_mark_blank_lines_and_a_missing_last_newline_change_nothing(
    tmp_path: Path, name: str
) -> None:
    plain = read_trace(write(tmp_path, TEXTS[name]))
    padded = TEXTS[name].rstrip("\r\n").replace("\n", "\n\n")
    assert same_requests(plain, read_trace(write(tmp_path, "\ufeff" + padded)))


def test_limit_keeps_the_first_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE + "\nnonsense")
    assert columns(read_trace(path, num_requests=2)) == columns(
        read_trace(write(tmp_path, AZURE, "a"), num_requests=2)
    )
    assert len(read_trace(path, num_requests=3)) == 3
    assert len(read_trace(write(tmp_path, AZURE, "b"), num_requests=100)) == 3
    assert read_trace(path, num_requests=1).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_time_scale_multiplies_times_exactly(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE)
    arrivals = [request.arrival_ps for request in read_trace(path)]
    for scale, top, bottom in ((0.5, 1, 2), (3.0, 3, 1), (0.1, 1, 10)):
        scaled = [request.arrival_ps for request in read_trace(path, time_scale=scale)]
        assert scaled == [arrival * top // bottom for arrival in arrivals]


@given(st.integers(0, 10**16), st.integers(0, 12))
def test_decimal_times_are_exact(units: int, digits: int) -> None:
    text = f"{units // 10**digits}.{units % 10**digits:0{digits}d}" if digits else str(units)
    assert number_ps("t", text, S) == units * 10 ** (12 - digits)


@given(st.datetimes(), st.integers(0, 10**7 - 1))
def test_timestamps_are_exact(when: object, tenths: int) -> None:
    text = f"{when:%H:%M:%S}.{tenths:07d}"
    dated = f"{when.year:04d}-{when:%m-%d} {text}"  # type: ignore[attr-defined]
    midnight = timestamp_ps("t", f"{dated[:10]} 00:00:00")
    hours, minutes, seconds = (int(part) for part in text[:8].split(":"))
    assert (
        timestamp_ps("t", dated) - midnight == (hours * 3600 + minutes * 60 + seconds) * S + tenths * 100_000
    )


def test_numbers_beyond_reason_are_refused_without_computing_them() -> None:
    for text in (
        "1e999999999",
        "-1e1000000",
        "0." + "1" * 40,
        "nan",
        "-inf",
        "sNaN",
        "1_000",
        "0x10",
        "٣",
        "9" * 31,
    ):
        with pytest.raises(FieldError):
            number_ps("t", text, S)
    assert number_ps("t", "1e-999999999", S) == 0
    assert number_ps("t", " 2.5e3 ", S) == 2500 * S


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_requests": 0}, r"^num_requests \(0\) must be at least 1$"),
        ({"time_scale": 0.0}, r"^time_scale \(0.0\) must be a positive number$"),
        ({"time_scale": float("nan")}, r"^time_scale \(nan\) must be a positive number$"),
        (
            {"format": "azur"},
            r"^unknown trace format 'azur' \(did you mean azure\?\): must be one of azure, ",
        ),
        ({"format": "csv"}, r"^format 'csv' needs columns: arrival=NAME,prompt=NAME,output=NAME$"),
        (
            {"format": "azure", "columns": "arrival=a"},
            r"^columns must not be given with format 'azure', only with csv$",
        ),
        ({"columns": "arrival"}, r"^columns \('arrival'\) must be ROLE=NAME pairs with commas between them$"),
        (
            {"columns": "arival=a,prompt=b,output=c"},
            r"^columns \('arival'\) \(did you mean arrival\?\) must be among",
        ),
        ({"columns": "prompt=b,output=c"}, r"^columns \(prompt, output\) must name exactly one of arrival, "),
        ({"columns": "arrival=a,arrival_ms=a,prompt=b,output=c"}, r"must name exactly one of arrival, "),
        ({"columns": "arrival=a,prompt=b"}, r"^columns \(arrival, prompt\) must name output$"),
        ({"columns": "arrival=a,prompt=b,prompt=c,output=d"}, r"must name prompt once$"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path, AZURE), **arguments)  # type: ignore[arg-type]


def test_every_format_says_what_it_is() -> None:
    assert set(FORMATS) == {"azure", "burstgpt", "mooncake", "bailian", "sharegpt", "csv", "native"}
    assert all(kind.name == name and kind.describes for name, kind in FORMATS.items())


@pytest.mark.parametrize("kind", JSON_FORMATS)
def test_json_formats_need_and_take_the_keys_that_they_say(
    tmp_path: Path, kind: type[JsonLinesFormat]
) -> None:
    def read(record: dict[str, object]) -> list[dict[str, object]]:
        trace = read_trace(write(tmp_path, json.dumps(record)), format=kind.name)
        return [as_values(request) for request in trace]

    record = json.loads(TEXTS[kind.name].splitlines()[1])
    assert {*kind.needs, *kind.takes} <= record.keys()
    enough = {key: record[key] for key in (*kind.needs, *kind.takes)}
    assert read(enough) == read(record)
    for key in kind.needs:
        with pytest.raises(TraceError, match=f"field '{key}' is missing"):
            read({each: value for each, value in record.items() if each != key})
    for key in kind.takes:
        assert read({each: value for each, value in record.items() if each != key}) != read(record)


def test_the_public_azure_trace(traces_dir: Path) -> None:
    trace = read_trace(traces_dir / "azure-llm-2023" / "AzureLLMInferenceTrace_code.csv")
    assert len(trace) == 8819
    assert trace.duration_ps == 3_435_948_056_000_000
    assert as_values(list(trace)[1])["arrival_ps"] == 52 * MS


def test_reading_the_public_mooncake_trace_costs_few_calls_a_request(traces_dir: Path) -> None:
    """Its requests have 24 content ids each on average: a reader that looks at ids one by one makes far more calls."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    path = traces_dir / "mooncake-fast25" / "conversation_trace.jsonl"
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        trace = read_trace(path)
    finally:
        sys.setprofile(before)
    assert len(trace) == 12031
    assert trace.duration_ps == 3_536_999 * MS
    assert calls < 35 * len(trace)
