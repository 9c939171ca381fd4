"""Parts of traces, their pace, and streams: each is the whole trace cut, scaled or re-read, and nothing else."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from trace_cases import AZURE, BAILIAN, TEXTS, as_values, same_requests, write

from sim.request import Request
from sim.stream import RequestStream
from sim.traces import Trace, TraceError, read_trace, write_trace
from sim.traces.describe import describe

S, MS = 10**12, 10**9


def any_csv(rows: list[tuple[int, int]]) -> str:
    """Return a CSV file of (arrival in ms, prompt tokens); a prompt of 0 makes a malformed row."""
    return "ms,in,out\n" + "".join(f"{arrival},{prompt},5\n" for arrival, prompt in rows)


CSV = "arrival_ms=ms,prompt=in,output=out"


@st.composite
def files(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Rows in order of arrival, prompts that tell them apart; some malformed."""
    arrivals = sorted(draw(st.lists(st.integers(0, 5000), min_size=1, max_size=12)))
    return [(arrival, draw(st.sampled_from([row + 1, row + 1, 0]))) for row, arrival in enumerate(arrivals)]


options = st.fixed_dictionaries(
    {},
    optional={
        "start_request": st.integers(0, 6),
        "num_requests": st.integers(1, 6),
        "start_s": st.sampled_from([0.0, 0.001, 0.5, 1.25]),
        "end_s": st.sampled_from([1.3, 2.0, 4.999]),
        "time_scale": st.sampled_from([0.1, 0.5, 3.0]),
        "rate": st.sampled_from([0.25, 7.0, 1000.0]),
    },
)


def expected(rows: list[tuple[int, int]], given: dict[str, Any]) -> list[tuple[int, int]]:
    """Return (arrival_ps, prompt) of the part, by a plain reading of the options' documentation."""
    good = [row for row in rows if row[1]]
    zero = good[0][0]
    kept = []
    for number, (arrival, prompt) in enumerate(good):
        since = Fraction(arrival - zero, 1000)
        if number < given.get("start_request", 0):
            continue
        if since < Fraction(str(given.get("start_s", 0.0))):
            continue
        if "end_s" in given and since >= Fraction(str(given["end_s"])):
            continue
        kept.append((arrival, prompt))
    kept = kept[: given.get("num_requests")]
    scale = Fraction(str(given.get("time_scale", 1.0)))
    if "rate" in given and kept:
        span = Fraction(kept[-1][0] - kept[0][0], 1000)
        assume(span)
        scale = (len(kept) - 1) / span / Fraction(str(given["rate"]))
    return [((arrival - kept[0][0]) * MS * scale // 1, prompt) for arrival, prompt in kept]


@given(files(), options, st.booleans(), st.booleans())
def test_a_part_is_what_its_options_say(
    rows: list[tuple[int, int]], given: dict[str, Any], stream: bool, native: bool
) -> None:
    assume(any(prompt for _, prompt in rows) and not {"rate", "time_scale"} <= given.keys())
    with TemporaryDirectory() as folder:
        path, arguments = write(Path(folder), any_csv(rows)), {"columns": CSV}
        if native:  # written whole, cut when read back: the same part
            write_trace(read_trace(path, columns=CSV, skip_bad=True), Path(folder) / "native")
            path, arguments = Path(folder) / "native", {}
            if not {"start_s", "start_request"} & given.keys():
                arguments["format"] = "native"
        want = expected(rows, given)
        if not want:
            with pytest.raises(TraceError, match=r"must hold (at least one request|requests at two times)"):
                read_trace(path, skip_bad=True, stream=stream, **arguments, **given)
            return
        trace = read_trace(path, skip_bad=True, stream=stream, **arguments, **given)
        assert isinstance(trace.requests, RequestStream) == stream
        assert len(trace) == len(want)
        for _ in range(2):  # a stream can be walked through again
            assert [(request.arrival_ps, request.prompt_tokens) for request in trace] == want
            assert [request.request_id for request in trace] == list(range(len(want)))


def test_the_rate_that_was_asked_for_comes_out(tmp_path: Path) -> None:
    path = write(tmp_path, any_csv([(at * at, 7) for at in range(200)]))
    for rate in (0.5, 20.0, 1e4):
        figures = describe(read_trace(path, columns=CSV, rate=rate))
        assert figures["requests_per_s"] == pytest.approx(rate, rel=1e-6)
        assert figures["arrival_cv"] == pytest.approx(describe(read_trace(path, columns=CSV))["arrival_cv"])


def test_a_rate_needs_two_times(tmp_path: Path) -> None:
    path = write(tmp_path, any_csv([(5, 1), (5, 2)]))
    with pytest.raises(
        TraceError, match=r"must hold requests at two times at least to be brought to a rate$"
    ):
        read_trace(path, columns=CSV, rate=1.0)


def test_times_to_think_are_scaled_with_the_rest(tmp_path: Path) -> None:
    rows = [Request(0, 0, 1, 1), Request(1, 4 * S, 1, 1, parent=0, think_ps=4 * S)]
    write_trace(rows, tmp_path / "t")
    assert [(request.arrival_ps, request.think_ps) for request in read_trace(tmp_path / "t", rate=0.5)] == [
        (0, 0),
        (2 * S, 2 * S),
    ]


def test_a_session_that_is_cut_begins_anew(tmp_path: Path) -> None:
    path = write(tmp_path, BAILIAN)
    assert [request.parent for request in read_trace(path)] == [-1, -1, 0]
    assert [request.parent for request in read_trace(path, start_request=1)] == [-1, -1]
    parents = [-1, 0, 1, 0, 3]
    rows = [Request(row, row * S, row + 1, 1, parent=parent) for row, parent in enumerate(parents)]
    write_trace(rows, tmp_path / "t")
    assert [request.parent for request in read_trace(tmp_path / "t", start_request=1)] == [-1, 0, -1, 2]
    assert [request.parent for request in read_trace(tmp_path / "t", start_s=3.0)] == [-1, 0]


def test_a_native_file_keeps_its_own_zero_unless_it_is_cut(tmp_path: Path) -> None:
    write_trace([Request(0, 5 * S, 1, 1), Request(1, 8 * S, 1, 1)], tmp_path / "t")
    assert [request.arrival_ps // S for request in read_trace(tmp_path / "t")] == [5, 8]
    assert [request.arrival_ps // S for request in read_trace(tmp_path / "t", end_s=6.0)] == [5]
    assert [request.arrival_ps // S for request in read_trace(tmp_path / "t", start_s=6.0)] == [0]
    assert [request.arrival_ps // S for request in read_trace(tmp_path / "t", start_s=5.0)] == [0, 3]


@pytest.mark.parametrize("name", [*sorted(TEXTS), "native"])
def test_a_stream_of_every_format_equals_its_list(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, TEXTS.get(name, AZURE))
    if name == "native":
        write_trace(read_trace(path), path)
    kept, streamed = read_trace(path, stream=False), read_trace(path, stream=True)
    assert isinstance(kept.requests, list)
    assert (len(kept), kept.sha256, kept.skipped) == (len(streamed), streamed.sha256, streamed.skipped)
    assert same_requests(kept, streamed)
    assert same_requests(kept, streamed)
    assert describe(kept) == describe(streamed)
    assert kept.duration_ps == streamed.duration_ps
    write_trace(streamed, tmp_path / "a")
    write_trace(kept, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_stream_is_checked_before_it_is_handed_out(tmp_path: Path) -> None:
    path = write(tmp_path, any_csv([(1, 1), (2, 0), (3, 3)]))
    with pytest.raises(TraceError, match=r":3: field 'in' \(0\) must be at least 1$"):
        read_trace(path, columns=CSV, stream=True)
    assert read_trace(path, columns=CSV, stream=True, skip_bad=True).skipped == 1


def test_large_files_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(tmp_path, AZURE)
    write_trace(read_trace(text), tmp_path / "native")
    for path in (text, tmp_path / "native"):
        assert isinstance(read_trace(path).requests, list)
    monkeypatch.setattr("sim.traces.formats.STREAMED_BYTES", len(AZURE) - 1)
    monkeypatch.setattr("sim.traces.native.STREAMED_REQUESTS", 2)
    for path in (text, tmp_path / "native"):
        assert isinstance(read_trace(path).requests, RequestStream)
        assert isinstance(read_trace(path, num_requests=2).requests, list)


def test_row_groups_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches, ids and none in turns, parents across batches, bad rows among them."""
    monkeypatch.setattr("sim.traces.native.BATCH_ROWS", 3)
    rows = [
        Request(
            row,
            row * S,
            33,
            5,
            parent=row // 2 - 1,
            **(read_ids(row) if row % 3 else {}),
        )
        for row in range(50)
    ]
    trace = Trace("t", "synthetic", "", rows)
    assert write_trace(trace, tmp_path / "t") == 50
    assert same_requests(read_trace(tmp_path / "t"), trace)
    assert same_requests(read_trace(tmp_path / "t", stream=True), trace)
    part = read_trace(tmp_path / "t", start_request=20, num_requests=25)
    assert [as_values(request)["chunk_ids"] for request in part] == [
        as_values(request)["chunk_ids"] for request in rows[20:45]
    ]
    assert [request.parent for request in part] == [
        parent - 20 if (parent := row // 2 - 1) >= 20 else -1 for row in range(20, 45)
    ]


def read_ids(row: int) -> dict[str, Any]:
    return {"chunk_ids": np.arange(3) + row, "granularity": 16, "named_tokens": 33}


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 12), st.data())
def test_parents_are_found_however_many_rows_are_left_out(
    good: list[bool], start: int, data: st.DataObject
) -> None:
    parents = [data.draw(st.integers(-1, row - 1)) for row in range(len(good))]
    kept = [row for row in range(len(good)) if good[row]][start:]
    assume(kept)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        pl.DataFrame(
            {
                "arrival_ps": range(len(good)),
                "prompt_tokens": [int(each) for each in good],
                "output_tokens": [1] * len(good),
                "parent": parents,
            }
        ).write_parquet(path)
        read = read_trace(path, skip_bad=True, start_request=start)
        assert [request.parent for request in read] == [
            kept.index(parents[row]) if parents[row] in kept else -1 for row in kept
        ]


def test_an_error_of_the_walk_is_raised_and_leaves_no_file(tmp_path: Path) -> None:
    def requests() -> Any:
        yield Request(0, 0, 1, 1)
        raise TraceError("file:2: bad")

    with pytest.raises(TraceError, match=r"^file:2: bad$"):
        write_trace(requests(), tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_request": -1}, r"^start_request \(-1\) must not be negative$"),
        ({"start_s": -0.5}, r"^start_s \(-0.5\) must be a number of seconds, not negative$"),
        ({"start_s": float("nan")}, r"^start_s \(nan\) must be a number of seconds, not negative$"),
        ({"end_s": 0.0}, r"^end_s \(0.0\) must be after start_s \(0.0\)$"),
        ({"start_s": 5.0, "end_s": 2.0}, r"^end_s \(2.0\) must be after start_s \(5.0\)$"),
        ({"rate": 0.0}, r"^rate \(0.0\) must be a positive number of requests/s$"),
        (
            {"rate": 2.0, "time_scale": 0.5},
            r"^rate \(2.0\) must not be given with time_scale \(0.5\), which it chooses$",
        ),
    ],
)
def test_impossible_parts_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path, AZURE), **arguments)


def test_a_part_without_requests_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE)
    for arguments in ({"start_request": 3}, {"start_s": 90_000.0}):
        with pytest.raises(TraceError, match=r"must hold at least one request in the part that is read$"):
            read_trace(path, **arguments)  # type: ignore[arg-type]
