"""What tests of records on disk share: runs in small pieces, and the comparison with what is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import sim.export
import sim.recorder
import sim.rows
import sim.stored
from sim.metrics import summarise
from sim.options import parse
from sim.overload import Overload
from sim.perfetto import write_perfetto
from sim.prometheus import prometheus_text
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.stream import RequestStream


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even a short run fill many chunks, parts and row groups."""
    monkeypatch.setattr(sim.rows, "_ROWS", 7)
    monkeypatch.setattr(sim.recorder, "_MOST_LIFETIMES", 50)
    monkeypatch.setattr(sim.stored, "_CHUNK", 11)
    monkeypatch.setattr(sim.stored, "_BINS", 5)
    monkeypatch.setattr(sim.export, "_ROW_GROUP", 16)


def pieces_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many rows be packed, written and read at a time."""
    monkeypatch.setattr(sim.rows, "_ROWS", rows)
    monkeypatch.setattr(sim.recorder, "_MOST_LIFETIMES", rows)
    monkeypatch.setattr(sim.stored, "_CHUNK", rows)


def stream_of(requests: Sequence[Request]) -> RequestStream:
    return RequestStream(lambda: iter(requests), len(requests), 0, True)


def assert_equal(ours: RunResult, theirs: RunResult) -> None:
    for kind in ("requests", "timeline", "pauses"):
        one, other = getattr(ours, kind), getattr(theirs, kind)
        assert list(one) == list(other)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"{kind}.{name}")
    engine = EngineConfig()
    figures = [summarise(result, engine) for result in (ours, theirs)]
    for each in figures:
        del each["wall_s"]
    assert figures[0] == figures[1]


def told(result: RunResult, folder: Path) -> tuple[bytes, str, object]:
    """Return what else is made of a run's records."""
    path = folder / "trace"
    write_perfetto(result, path)
    spec = parse(["synthetic", "--out", "o"])[0].spec(None)
    return path.read_bytes(), prometheus_text(result, spec), Overload.of(result)
