"""Traces larger than memory: few requests exist at any moment, and ten million pass through less than a GiB."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from trace_cases import write

from sim.request import Request
from sim.traces import read_trace, write_trace
from sim.workload import WorkloadConfig, generate

COUNT, BATCH = 3000, 100


@pytest.fixture(autouse=True)
def only_what_is_new() -> Iterator[None]:
    """Let the collector, and so `alive`, pass over what there is already."""
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> int:
    """Return how many requests exist that were made in this test."""
    return sum(type(each) is Request for each in gc.get_objects())


def watched(requests: Iterator[Request], most: list[int]) -> Iterator[Request]:
    """Yield requests; note the most that ever existed at once, looking every now and then."""
    for row, request in enumerate(requests):
        if row % 250 == 249:
            most[0] = max(most[0], alive())
        yield request


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.traces.native.BATCH_ROWS", BATCH)
    monkeypatch.setattr("sim.traces.writer.SAMPLE_ROWS", BATCH)
    monkeypatch.setattr("sim.workload.generator.STREAMED_REQUESTS", 0)


@pytest.mark.usefixtures("small_batches")
def test_writing_and_reading_hold_few_requests(tmp_path: Path) -> None:
    most = [0]
    config = WorkloadConfig(num_requests=COUNT, turns_mean=2.0, system_prompts=1, requests_per_s=1.0)
    assert write_trace(watched(iter(generate(config)), most), tmp_path / "t") == COUNT
    assert 0 < most[0] < 5 * BATCH
    trace, most = read_trace(tmp_path / "t", stream=True), [0]
    assert sum(1 for _ in watched(iter(trace), most)) == COUNT
    assert most[0] < 10
    write_trace(watched(iter(trace), most), tmp_path / "u")
    assert most[0] < 5 * BATCH
    assert (tmp_path / "u").read_bytes() == (tmp_path / "t").read_bytes()


def test_text_is_read_line_by_line(tmp_path: Path) -> None:
    lines = (f"{row},7,5" for row in range(COUNT))
    path = write(tmp_path, "\n".join(["Timestamp,Request tokens,Response tokens", *lines]))
    most = [0]
    assert sum(1 for _ in watched(iter(read_trace(path, stream=True)), most)) == COUNT
    assert 0 < most[0] < 10


TEN_MILLION = """
import resource, sys
from pathlib import Path
from sim.traces import read_trace, write_trace
from sim.workload import WorkloadConfig, generate

count, path = int(sys.argv[1]), Path(sys.argv[2])
assert write_trace(generate(WorkloadConfig(num_requests=count, requests_per_s=20.0)), path) == count
trace = read_trace(path)
assert len(trace) == count
assert sum(1 for _ in trace) == count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_ten_million_requests_pass_through_a_gib(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", TEN_MILLION, "10000000", str(tmp_path / "t")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1024
