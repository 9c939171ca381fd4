"""The kernel replay: what it covers, that its reference is right, and that planted bugs make it fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Fault, launches, plain_attend

import allocator.pool
import allocator.sequence
import allocator.tables
from allocator.eviction import LRU
from experiments._kernel_step import WrongOutputError, attend_chunk, plain_attend_chunk
from experiments._token_values import chain, token_identities, values
from experiments.kernel_replay import Config, main, run, shrunk, workload
from kernels import reference
from sim.request import Request
from sim.scheduler.job import Job

README = Path(__file__).parent.parent / "README.md"
SMALL = Config(backend="cpu", num_requests=30, layers=1)


def test_the_default_run_makes_everything_happen_and_ends_as_the_readme_says() -> None:
    outcome = run(Config(backend="cpu"))
    tally, result = outcome.tally, outcome.result
    assert tally.outputs >= 10_000
    assert tally.worst_share <= 1
    assert tally.shared_blocks > 0
    assert tally.copied_blocks > 0
    assert tally.chunked_prefills > 0
    assert result.timeline["preemptions"].sum() > 0
    assert result.requests["hit_tokens"].sum() > 0
    assert (result.requests["status"] == "finished").all()
    # Every token that was computed, recomputed ones included, is an output in every layer and head.
    prefilled = int(result.timeline["prefill_tokens"].sum())
    decoded = int((result.timeline["decode_sequences"] * result.timeline["steps"]).sum())
    config = Config()
    assert tally.outputs == (prefilled + decoded) * config.layers * config.heads
    # The demo ends with this line. The last digit of a rounding error may differ on another processor.
    if README.exists():
        assert outcome.last_line.rpartition(" ")[0] in README.read_text()


def test_a_fault_free_small_run_passes() -> None:
    assert run(SMALL).tally.copied_blocks > 0


def _no_copy_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.tables.Tables, "shared_tail", lambda self, sequence: None)


def _copy_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.tables.PendingCopies, "add", lambda self, *copy: None)


def _hit_blocks_stay_evictable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LRU, "referenced", lambda self, extent: None)
    monkeypatch.setattr(allocator.pool.BlockPool, "_choose", lambda self, wanted: self.policy.victim(wanted))


def _blocks_freed_while_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.pool.BlockPool, "unshare", lambda self, block: False)


def _slots_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = allocator.sequence.KVSequence.slots

    def slots(self: Any, first: int, last: int) -> Any:
        found = right(self, first, last)
        return np.where((first + np.arange(last - first)) % 5 == 4, found - 1, found)

    monkeypatch.setattr(allocator.sequence.KVSequence, "slots", slots)


@pytest.mark.parametrize(
    "plant",
    [
        _no_copy_on_write,
        _copy_forgotten,
        _hit_blocks_stay_evictable,
        _blocks_freed_while_shared,
        _slots_off_by_one,
    ],
)
def test_a_bug_in_the_allocator_makes_it_fail(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(WrongOutputError, match=r"^(request \d+, sample \d, token \d+, layer|step \d+: )"):
        run(SMALL)


KERNEL_FAULTS = [
    Fault("the copy misses a token", "copy_blocks.cu", "copy[2] *", "(copy[2] - 1) *"),
    Fault(
        "the last key is dropped",
        "paged_attention.cu",
        "min(context_len, begin",
        "min(context_len - 1, begin",
    ),
]


@pytest.mark.parametrize("fault", KERNEL_FAULTS, ids=str)
def test_a_bug_in_a_kernel_makes_it_fail(fault: Fault, tmp_path: Path) -> None:
    with launches(load=fault.plant(tmp_path)), pytest.raises(WrongOutputError):
        run(SMALL)


def test_main_reports_a_wrong_output_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _copy_forgotten(monkeypatch)
    assert main(["--backend", "cpu", "--num-requests", "30", "--layers", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("wrong output: request ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "3"], "error: heads (3) must be a multiple of kv_heads (2)"),
        (["--num-requests", "0"], "error: num_requests (0) must be at least 1"),
        (["--head-dim", "65"], "error: head_dim (65) must be one of"),
        (["--num-blocks", "1"], "error: num_blocks (1) holds none of the requests"),
        (["--num-blocks", "0"], "error: num_blocks (0) must be at least 1"),
        (["--heads", "100000000"], "error: heads (100000000) must be at most 1024"),
        (["--num-blocks", "3000000000"], "error: num_blocks (3000000000) of "),
        (["no-such-trace"], "error: no-such-trace: cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("backend", "variable"), [("cpu", "XDG_CACHE_HOME"), ("auto", "CUPY_CACHE_DIR")])
def test_a_home_that_cannot_be_written_is_named_with_the_remedy(
    backend: str, variable: str, tmp_path: Path
) -> None:
    if backend == "auto":
        pytest.importorskip("cupy", reason="it is CuPy that makes a folder when imported")
    home = tmp_path / "home"
    home.write_text("not a folder")
    unset = ("XDG_CACHE_HOME", "CUPY_CACHE_DIR")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.kernel_replay", "--num-requests", "2", "--backend", backend],
        env={name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(home) in done.stderr
    assert f"set {variable} to a folder that can be written" in done.stderr


def test_the_cpu_needs_no_cupy() -> None:
    script = (
        "import sys; sys.modules['cupy'] = None\n"
        "from experiments.kernel_replay import Config, run\n"
        "print(run(Config(num_requests=2, layers=1, backend='cpu')).backend)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "cpu\n", done.stderr


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 6),
    cached=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_chunk_attention_equals_the_reference_token_by_token(
    seed: int, tokens: int, cached: int, kv_heads: int, group: int, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((tokens, kv_heads * group, 8)).astype(dtype)
    key, value = (rng.standard_normal((cached + tokens, kv_heads, 8)).astype(dtype) for _ in range(2))
    got, plain = attend_chunk(query, key, value, 0.3), plain_attend_chunk(dtype, query, key, value, 0.3)
    for token in range(tokens):
        seen = cached + token + 1
        expected, _ = reference.attend(query[token], key[:seen], value[:seen], 0.3)
        np.testing.assert_allclose(got[token], expected, rtol=1e-12, atol=1e-12)
        careless = plain_attend(dtype, query[token], key[:seen], value[:seen], 0.3)
        np.testing.assert_allclose(plain[token], careless, rtol=5e-3, atol=2e-3)


def test_values_depend_on_everything_before() -> None:
    shared = Request(0, 0, 8, 4, chunk_ids=np.array([1, 2]), granularity=4, named_tokens=8)
    other = Request(1, 0, 8, 4, chunk_ids=np.array([1, 3]), granularity=4, named_tokens=8)

    def hashes(request: Request, sample: int = 0) -> list[int]:
        return chain(token_identities(Job(request, 1, sample), 0, 12), 1).tolist()

    assert hashes(shared)[:4] == hashes(other)[:4]
    assert not set(hashes(shared)[4:]) & set(hashes(other)[4:])
    assert hashes(shared)[:8] == hashes(shared, 1)[:8]
    assert not set(hashes(shared)[8:]) & set(hashes(shared, 1)[8:])
    assert len(set(hashes(shared))) == 12
    rows = values(np.array(hashes(shared), np.uint64), "key", (2, 3), 1.0)
    assert np.abs(rows).max() <= 1
    assert len(np.unique(rows)) == rows.size


def test_shrinking_keeps_what_is_shared() -> None:
    ids = np.array([5, 6, 7])
    long = Request(0, 640, 1100, 300, chunk_ids=ids, granularity=512, named_tokens=1100)
    short = shrunk(long, 64)
    assert (short.prompt_tokens, short.output_tokens, short.granularity, short.arrival_ps) == (17, 4, 8, 10)
    np.testing.assert_array_equal(short.chunk_ids, ids)
    tokens = Request(1, 0, 10, 5, token_ids=np.arange(10, dtype=np.int32), named_tokens=10)
    np.testing.assert_array_equal(shrunk(tokens, 4).token_ids, [0, 4])
    assert shrunk(long, 1) is long


def test_the_workload_is_the_same_every_time() -> None:
    first, second = workload(SMALL), workload(SMALL)
    assert [(r.arrival_ps, r.prompt_tokens) for r in first] == [
        (r.arrival_ps, r.prompt_tokens) for r in second
    ]
    assert workload(replace(SMALL, seed=1))[0].prompt_tokens != first[0].prompt_tokens


def test_a_public_trace_passes(traces_dir: Path) -> None:
    trace = traces_dir / "mooncake-fast25" / "conversation_trace.jsonl"
    outcome = run(Config(trace=trace, backend="cpu", num_requests=20, layers=1, shrink=128))
    assert (outcome.result.requests["status"] == "finished").all()
