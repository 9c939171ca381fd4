"""Native Parquet: lossless, the same bytes each time, and as strict as the text formats."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_cases import TEXTS, as_values, same_requests, write

from sim.request import MAX_TIME_PS, Request
from sim.traces import Trace, TraceError, read_trace, write_trace
from sim.traces.native import REQUIRED, SCHEMA


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    arrivals = sorted(draw(st.lists(st.integers(0, MAX_TIME_PS), min_size=1, max_size=8)))
    return [draw(one_request(row, arrival)) for row, arrival in enumerate(arrivals)]


@st.composite
def one_request(draw: st.DrawFn, row: int, arrival_ps: int) -> Request:
    prompt, output = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    content: dict[str, Any] = {}
    kind = draw(st.sampled_from(["none", "chunks", "tokens"]))
    if kind != "none":
        named = draw(st.integers(prompt, prompt + output))
        content["named_tokens"] = named
        if kind == "chunks":
            grain = content["granularity"] = draw(st.integers(1, 70))
            ids = st.lists(
                st.integers(0, 2**63 - 1), min_size=-(-named // grain), max_size=-(-named // grain)
            )
            content["chunk_ids"] = np.array(draw(ids), dtype=np.int64)
        else:
            ids = st.lists(st.integers(0, 2**31 - 1), min_size=named, max_size=named)
            content["token_ids"] = np.array(draw(ids), dtype=np.int32)
    beams = draw(st.sampled_from([1, 1, 2, 5])) if content.get("named_tokens", prompt) == prompt else 1
    return Request(
        request_id=row,
        arrival_ps=arrival_ps,
        prompt_tokens=prompt,
        output_tokens=output,
        num_samples=draw(st.integers(1, 5)) if beams == 1 else 1,
        beam_width=beams,
        parent=draw(st.integers(-1, row - 1)),
        think_ps=draw(st.integers(0, 10**13)),
        priority=draw(st.integers(-5, 5)),
        salt=draw(st.text(max_size=4)),
        **content,
    )


def saved(rows: list[Request], path: Path) -> Trace:
    trace = Trace("t", "synthetic", "", rows)
    write_trace(trace, path)
    return trace


@given(requests())
def test_what_is_written_is_read(rows: list[Request]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        trace = saved(rows, path)
        read = read_trace(path)
        assert (read.name, read.format) == ("t", "native")
        assert same_requests(read, trace)
        again = Path(folder) / "again.parquet"
        write_trace(read, again)
        assert again.read_bytes() == path.read_bytes()
        assert sorted(entry.name for entry in Path(folder).iterdir()) == ["again.parquet", "t.parquet"]


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_format_converts_without_loss(tmp_path: Path, name: str) -> None:
    trace = read_trace(write(tmp_path, TEXTS[name]))
    write_trace(trace, tmp_path / "t.parquet")
    assert same_requests(read_trace(tmp_path / "t.parquet"), trace)


def test_arrivals_are_kept_as_written(tmp_path: Path) -> None:
    rows = [
        Request(0, arrival_ps=5, prompt_tokens=1, output_tokens=1),
        Request(1, arrival_ps=8, prompt_tokens=1, output_tokens=1, parent=0, think_ps=3),
    ]
    saved(rows, tmp_path / "t.parquet")
    read = read_trace(tmp_path / "t.parquet", time_scale=2.0)
    assert [(request.arrival_ps, request.think_ps) for request in read] == [(10, 0), (16, 6)]


def table(path: Path, **columns: list[Any]) -> Path:
    """Write a file of two good rows, with columns replaced (or, by an empty list, left out)."""
    frame = pl.DataFrame({"arrival_ps": [0, 7], "prompt_tokens": [20, 30], "output_tokens": [5, 6]})
    for name, values in columns.items():
        frame = frame.drop(name, strict=False)
        if values:
            dtype = SCHEMA[name] if not any(isinstance(value, str | float) for value in values) else None
            frame = frame.with_columns(pl.Series(name, values, dtype=dtype))
    frame.write_parquet(path)
    return path


def test_scaled_times_stay_on_the_clock(tmp_path: Path) -> None:
    late = table(tmp_path / "late", arrival_ps=[0, MAX_TIME_PS])
    thinking = table(tmp_path / "thinking", think_ps=[0, MAX_TIME_PS])
    for path, scale, message in [
        (late, 2.0, "field 'arrival_ps' (208.3 days after the start) must be within 104.2 days of it"),
        (late, 1e308, "field 'arrival_ps' (1.042e+310 days after the start) must be within 104.2 days of it"),
        (thinking, 1e300, "field 'arrival_ps' (8.102e+283 days after the start) must be within 104.2 days"),
        (thinking, 1e9, "field 'think_ps' (1.042e+11 days) must be within 104.2 days"),
    ]:
        with pytest.raises(TraceError) as caught:
            read_trace(path, time_scale=scale)
        assert str(caught.value).startswith(f"{path}:2: {message}")
    assert list(read_trace(late, time_scale=5e-324))[1].arrival_ps == 0
    assert read_trace(late, time_scale=1e308, skip_bad=True).skipped == 1


def test_optional_columns_have_defaults(tmp_path: Path) -> None:
    path = table(tmp_path / "t", granularity=[0, 16], named_tokens=[0, 30], chunk_ids=[None, [4, 2]])
    read = read_trace(path)
    assert as_values(list(read)[1]) == {
        "request_id": 1,
        "arrival_ps": 7,
        "prompt_tokens": 30,
        "output_tokens": 6,
        "chunk_ids": [4, 2],
        "granularity": 16,
        "token_ids": None,
        "named_tokens": 30,
        "num_samples": 1,
        "beam_width": 1,
        "parent": -1,
        "think_ps": 0,
        "priority": 0,
        "salt": "",
    }
    narrow = pl.read_parquet(path).with_columns(pl.col("prompt_tokens").cast(pl.UInt16))
    narrow.write_parquet(path)
    assert list(read_trace(path))[1].prompt_tokens == 30


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"arrival_ps": [7, 0]}, "2: field 'arrival_ps' (7e-12 s before the row above) must not decrease"),
        ({"arrival_ps": [0, -1]}, "2: field 'arrival_ps' (-1) must be in 0..9000000000000000000"),
        ({"arrival_ps": [0, None]}, "2: field 'arrival_ps' (null) must not be null"),
        ({"prompt_tokens": [0, 1]}, "1: field 'prompt_tokens' (0) must be at least 1"),
        ({"output_tokens": [1, 10**9]}, "2: field 'output_tokens' (1000000000) must be at most 100000000"),
        ({"num_samples": [1, 0]}, "2: field 'num_samples' (0) must be at least 1"),
        ({"beam_width": [0, 1]}, "1: field 'beam_width' (0) must be at least 1"),
        (
            {"beam_width": [4, 1], "num_samples": [2, 2]},
            "1: field 'num_samples' (2) must be 1 with beam_width 4",
        ),
        ({"think_ps": [0, -3]}, "2: field 'think_ps' (-3) must be in 0..9000000000000000000"),
        ({"parent": [0, -1]}, "1: field 'parent' (0) must be -1 or an earlier row than 0"),
        ({"parent": [-2, -1]}, "1: field 'parent' (-2) must be -1 or an earlier row than 0"),
        ({"named_tokens": [20, 0]}, "1: field 'named_tokens' (20) must be 0 without ids"),
        (
            {"granularity": [4, 0]},
            "1: field 'granularity' (4) must be at least 1 with chunk_ids, and 0 without",
        ),
        (
            {"chunk_ids": [[1], None]},
            "1: field 'granularity' (0) must be at least 1 with chunk_ids, and 0 without",
        ),
        (
            {"chunk_ids": [None, [1]], "granularity": [0, 16], "named_tokens": [0, 30]},
            "2: field 'chunk_ids' (1 ids) must have 2",
        ),
        (
            {"chunk_ids": [None, [1, -1]], "granularity": [0, 16], "named_tokens": [0, 30]},
            "2: field 'chunk_ids' (-1) must hold no negative id",
        ),
        (
            {"chunk_ids": [None, [1, None]], "granularity": [0, 16], "named_tokens": [0, 30]},
            "2: field 'chunk_ids' (-1) must hold no negative id",
        ),
        (
            {"chunk_ids": [None, [1, 2]], "granularity": [0, -16], "named_tokens": [0, 30]},
            "2: field 'granularity' (-16) must be in 1..1048576",
        ),
        (
            {"chunk_ids": [None, [1]], "granularity": [0, 2**62], "named_tokens": [0, 30]},
            "2: field 'granularity' (4611686018427387904) must be in 1..1048576",
        ),
        (
            {"chunk_ids": [None, [1, 2, 3]], "granularity": [0, 16], "named_tokens": [0, 37]},
            "2: field 'named_tokens' (37) must be in 30..36",
        ),
        ({"token_ids": [list(range(20)), None]}, "1: field 'named_tokens' (0) must be in 20..25"),
        (
            {"token_ids": [list(range(21)), None], "named_tokens": [20, 0]},
            "1: field 'token_ids' (21 ids) must have 20",
        ),
        (
            {
                "token_ids": [[1] * 20, None],
                "chunk_ids": [[1], None],
                "granularity": [20, 0],
                "named_tokens": [20, 0],
            },
            "1: field 'token_ids' must be null where chunk_ids are given",
        ),
        (
            {"prompt_tokens": []},
            " field 'prompt_tokens' is missing among the columns (arrival_ps, output_tokens)",
        ),
        ({"prompt_tokens": ["a", "b"]}, " field 'prompt_tokens' (String) must be a column of Int64"),
        ({"prompt_tokens": [1.5, 2.0]}, " field 'prompt_tokens' (Float64) must be a column of Int64"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    path = table(tmp_path / "t", **columns)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value) == f"{path}:{message}"


def test_files_that_are_no_whole_parquet(tmp_path: Path) -> None:
    path = table(tmp_path / "t")
    data = path.read_bytes()
    cut = r"must be a whole Parquet file: it does not begin and end with PAR1$"
    for size in (4, 11, 50, len(data) - 1):
        with pytest.raises(TraceError, match=cut):
            read_trace(write(tmp_path, data[:size], "cut"))
    with pytest.raises(TraceError, match=cut):
        read_trace(write(tmp_path, TEXTS["azure"], "text"), format="native")
    footer = int.from_bytes(data[-8:-4], "little") + 8
    with pytest.raises(TraceError, match=r"broken: must be a Parquet file: [^\n]+$"):
        read_trace(write(tmp_path, data[:-footer] + bytes(footer - 8) + data[-8:], "broken"))
    empty = tmp_path / "empty"
    pl.read_parquet(path).clear().write_parquet(empty)
    with pytest.raises(TraceError, match=r"must hold at least one request$"):
        read_trace(empty)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_panic_of_the_reader_is_an_error_of_one_line(tmp_path: Path, column: int) -> None:
    data = table(tmp_path / "t").read_bytes()
    parts = data.split(b"\x2c\x15\x04")  # in a page's header: what is told of its data, 2 values of them
    assert len(parts) == 4
    parts[column] += b"\x2c\x15\x06"  # 3
    for place in {0, 1, 2} - {column}:
        parts[place] += b"\x2c\x15\x04"
    path = write(tmp_path, b"".join(parts), "broken")
    for skip_bad in (False, True):
        with pytest.raises(TraceError, match=r"broken: must be a (whole )?Parquet file: [^\n]+$"):
            read_trace(path, skip_bad=skip_bad)


@pytest.mark.parametrize("kept", [0, 1])
def test_rows_that_the_reader_leaves_out_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    path = table(tmp_path / "t")
    whole = pl.LazyFrame.collect_batches

    def cut(frame: pl.LazyFrame, **options: Any) -> Any:
        return (batch.head(kept) for batch in whole(frame, **options))

    monkeypatch.setattr(pl.LazyFrame, "collect_batches", cut)
    rule = f"must be a whole Parquet file: its footer tells of 2 rows, and {kept} can be read"
    ways: list[dict[str, Any]] = [{}, {"skip_bad": True}, {"stream": True}]
    for options in ways:
        with pytest.raises(TraceError, match=rf"/t: {rule}$"):
            read_trace(path, **options)


def test_skip_bad_renumbers_parents(tmp_path: Path) -> None:
    path = tmp_path / "t"
    pl.DataFrame(
        {
            "arrival_ps": [0, 1, 2, 3],
            "prompt_tokens": [1, 0, 1, 1],
            "output_tokens": [1, 1, 1, 1],
            "parent": [-1, 0, 1, 2],
        }
    ).write_parquet(path)
    read = read_trace(path, skip_bad=True)
    assert read.skipped == 1
    assert [request.parent for request in read] == [-1, -1, 1]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, TEXTS["azure"]))
    with pytest.raises(OSError, match="No such file or directory"):
        write_trace(trace, tmp_path / "no" / "folder" / "t.parquet")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_trace(trace, tmp_path / "taken")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["taken", "trace.txt"]


def test_a_target_that_is_no_regular_file_is_left_alone(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, TEXTS["azure"]))
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for target in (pipe, link):
        with pytest.raises(OSError, match="not a regular file") as caught:
            write_trace(trace, target)
        assert caught.value.filename == str(target)
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_a_link_is_followed(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, TEXTS["azure"]))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    write_trace(trace, link)
    assert link.is_symlink()
    assert same_requests(read_trace(tmp_path / "real"), trace)


def test_the_longest_file_name_can_be_written(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, TEXTS["azure"]))
    write_trace(trace, tmp_path / ("n" * 255))
    assert same_requests(read_trace(tmp_path / ("n" * 255)), trace)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, TEXTS["azure"]))
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that may not grow: the write fails
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, room[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            write_trace(trace, tmp_path / "t.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.filename == str(tmp_path / "t.parquet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.txt"]


def test_a_file_name_is_no_pattern(tmp_path: Path) -> None:
    rows = [Request(0, arrival_ps=0, prompt_tokens=1, output_tokens=1)]
    other = [Request(0, arrival_ps=0, prompt_tokens=2, output_tokens=1)]
    saved(other, tmp_path / "m1.parquet")
    for name in ("m[1].parquet", "m?.parquet", "*"):
        trace = saved(rows, tmp_path / name)
        assert same_requests(read_trace(tmp_path / name), trace)


@pytest.mark.parametrize("format", [None, "native", "azure"])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, format: str | None) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(TraceError) as caught:
            read_trace(path, format=format)
        assert str(caught.value) == f"{path}: must be a regular file"


def test_columns_that_are_not_required_may_be_absent(tmp_path: Path) -> None:
    """And stand for what they hold in a request of which nothing more is said."""
    path = tmp_path / "t.parquet"
    saved([Request(0, 5, 7, 9)], path)
    whole = pl.read_parquet(path)
    for column in SCHEMA:
        whole.drop(column).write_parquet(path)
        if column in REQUIRED:
            with pytest.raises(TraceError, match=f"field '{column}' is missing"):
                read_trace(path)
        else:
            assert [as_values(request) for request in read_trace(path)] == [as_values(Request(0, 5, 7, 9))]
