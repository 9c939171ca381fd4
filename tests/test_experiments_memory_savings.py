"""memory_savings: the example by hand, the serving loop against a naive one, the paper's figures, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import experiments
from allocator.reservation import ReservationPool
from experiments import _serving, memory_savings
from experiments.__main__ import questions
from experiments._memories import ContiguousMemory, Lifetime, Memory, PagedMemory
from experiments._serving import serve
from experiments.memory_savings import Config, batched, compare, example, main, memories, workloads
from sim.cost import StepBatch

S = 10**12
PARTS = ("tokens", "reserved", "internal", "external")


class UnitCost:
    """A step lasts a second per decoding sequence, and ten milliseconds per token attended to or prefilled."""

    def step(self, batch: StepBatch) -> int:
        tokens = batch.decode_context + sum(new for new, _ in batch.prefills)
        return batch.decode_sequences * S + tokens * S // 100

    def decode_affine(self, decode_sequences: int) -> tuple[int, int] | None:
        return None


def lifetimes(*rows: tuple[float, int, int]) -> list[Lifetime]:
    return [Lifetime(int(arrival * S), prompt, output) for arrival, prompt, output in rows]


# ---------------------------------------------------------------- the example


def test_example_of_100_sequences() -> None:
    assert example() == (204_800, 51_200)


def test_example_follows_its_numbers() -> None:
    assert example(10, 1000, 65, 64) == (10_000, 10 * 128)
    assert example(1, 64, 64, 64) == (64, 64)


# ---------------------------------------------------------------- the serving loop


def test_two_requests_by_hand() -> None:
    memory = ContiguousMemory("maximum", 16, "maximum", "buddy", 16)
    recording = serve(lifetimes((0, 4, 2), (0, 2, 1)), memory, UnitCost())
    columns = recording.columns
    # First prompt, its one decode step (5 keys), then the second prompt: 0.04 s, 1.05 s, 0.02 s.
    assert columns["start_ps"].tolist() == [0, S * 4 // 100, S * 109 // 100]
    assert columns["end_ps"].tolist() == [S * 4 // 100, S * 109 // 100, S * 111 // 100]
    assert columns["waiting"].tolist() == [1, 1, 0]
    assert columns["tokens"].tolist() == [4, 5, 2]
    assert columns["reserved"].tolist() == [1, 0, 0]
    assert columns["internal"].tolist() == [11, 11, 14]
    assert recording.mean("tokens", while_waiting=True) == pytest.approx((4 * 0.04 + 5 * 1.05) / 1.09)
    assert (recording.finished, recording.preemptions) == (2, 0)
    assert recording.requests_per_s == pytest.approx(2 / 1.11)


def test_paged_memory_preempts_the_last_admitted_and_recomputes_it() -> None:
    memory = PagedMemory("paged", 8, 2, watermark=0.0)  # four blocks
    recording = serve(lifetimes((0, 4, 5), (0, 4, 2)), memory, UnitCost())
    # Both prompts fill the memory; the first needs a third block at once, and the second leaves, one token on.
    assert recording.preemptions == 1
    assert recording.columns["running"].tolist()[:2] == [2, 1]
    # It comes back with its 4 + 1 tokens once the first has left, to compute its last output token.
    assert recording.columns["tokens"].tolist()[-1] == 5
    assert recording.columns["running"].tolist()[-1] == 1
    assert recording.finished == 2
    memory.manager.check_invariants()
    assert memory.manager.stats().free_blocks == 4


def test_watermark_holds_admission_back_while_something_runs() -> None:
    memory = PagedMemory("paged", 8, 2, watermark=0.25)  # one block of four
    first, second = lifetimes((0, 4, 2), (0, 4, 2))
    assert memory.admit(first)
    assert not memory.admit(second)
    memory.release(first)
    assert memory.admit(second)


def naive(requests: list[tuple[int, int, int]], memory: Memory) -> tuple[int, float, int]:
    """Serve one step at a time, by plain loops; return (end, slot-seconds of token state, preemptions)."""
    waiting = [Lifetime(*row) for row in requests]
    running: list[Lifetime] = []
    now, area, preemptions, cost = 0, 0.0, 0, UnitCost()
    while waiting or running:
        due = [r for r in waiting if r.arrival_ps <= now]
        if not running and not due:
            now = waiting[0].arrival_ps
            continue
        calm = True
        while running and not memory.advance(running, 1):
            evicted = running.pop()
            memory.release(evicted)
            waiting.insert(0, evicted)
            preemptions += 1
            calm = False
        fresh = []
        while calm and due and memory.admit(due[0]):
            fresh.append(due.pop(0))
            waiting.pop(0)
        keys = sum(r.prompt_tokens + r.done_tokens for r in running)
        batch = StepBatch(len(running), keys, [(r.prefill_tokens, r.prefill_tokens) for r in fresh])
        duration = cost.step(batch)
        running += fresh
        area += sum(r.prompt_tokens + r.done_tokens for r in running) * duration
        now += duration
        for request in running:
            request.done_tokens += 1
        for request in [r for r in running if r.done_tokens == r.output_tokens]:
            memory.release(request)
            running.remove(request)
    return now, area, preemptions


def make(kind: int) -> Memory:
    if kind == 0:
        return PagedMemory("paged", 32, 4, watermark=0.0)
    rule, placement = [
        ("maximum", "buddy"),
        ("power_of_two", "buddy"),
        ("exact", "buddy"),
        ("exact", "best_fit"),
    ][kind - 1]
    return ContiguousMemory(rule, 60, rule, placement, 24)


@given(
    kind=st.integers(0, 4),
    rows=st.lists(
        st.tuples(st.integers(0, 40 * S), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12
    ),
)
def test_stretches_equal_single_steps(kind: int, rows: list[tuple[int, int, int]]) -> None:
    rows.sort()
    memory = make(kind)
    recording = serve([Lifetime(*row) for row in rows], memory, UnitCost())
    end, area, preemptions = naive(rows, make(kind))
    columns = recording.columns
    assert columns["end_ps"][-1] == end
    assert recording.preemptions == preemptions
    assert recording.finished == len(rows)
    # Token state grows evenly within a stretch but for the steps' unequal lengths, which the mean ignores.
    lasts = columns["end_ps"] - columns["start_ps"]
    assert columns["tokens"] @ lasts == pytest.approx(area, rel=0.05)
    total = sum(columns[part] for part in PARTS)
    assert np.allclose(total, memory.num_slots)
    assert (columns["start_ps"][1:] >= columns["end_ps"][:-1]).all()
    if isinstance(memory, ContiguousMemory):
        assert memory.pool.usage() == ReservationPool(60, placement=memory.pool.placement).usage()
        memory.pool.check_invariants()
    else:
        memory.manager.check_invariants()
        assert memory.manager.stats().referenced_blocks == 0


def test_single_steps_give_the_exact_area(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_serving, "MOST_STEPS", 1)
    rows = [(i * S, 3 + i % 5, 2 + i % 7) for i in range(12)]
    for kind in range(5):
        columns = serve([Lifetime(*row) for row in rows], make(kind), UnitCost()).columns
        lasts = columns["end_ps"] - columns["start_ps"]
        assert columns["tokens"] @ lasts == pytest.approx(naive(rows, make(kind))[1], rel=1e-12)


def test_what_can_never_fit_is_refused_by_name() -> None:
    message = r"request of 9 \+ 4 tokens cannot be served by paged with all of its 8 slots free"
    with pytest.raises(ValueError, match=message):
        serve(lifetimes((0, 9, 4)), PagedMemory("paged", 8, 2), UnitCost())
    with pytest.raises(ValueError, match=r"request of 7 \+ 4 tokens cannot be served by paged"):
        serve(lifetimes((0, 7, 4)), PagedMemory("paged", 8, 2), UnitCost())
    with pytest.raises(ValueError, match="must not precede the one before it"):
        serve(lifetimes((2, 1, 1), (1, 1, 1)), PagedMemory("paged", 8, 2), UnitCost())


def test_time_may_be_up_before_the_first_step_ends() -> None:
    recording = serve(lifetimes((0, 4, 2)), PagedMemory("paged", 8, 2), UnitCost(), until_ps=1)
    assert (recording.finished, recording.requests_per_s) == (0, 0.0)
    assert np.isnan(recording.mean("running"))


# ---------------------------------------------------------------- the workloads and the paper


def test_lengths_have_the_published_means() -> None:
    sharegpt, alpaca = workloads(Config(num_requests=500))
    assert sharegpt.mean_tokens == pytest.approx((161.31, 337.99), abs=0.5)
    assert alpaca.mean_tokens == pytest.approx((19.31, 58.45), abs=0.5)
    for workload in (sharegpt, alpaca):
        assert all(r.prompt_tokens + r.output_tokens <= 2048 for r in workload.requests)


def test_agrees_with_the_paper_where_memory_alone_decides() -> None:
    config = Config(num_requests=400)
    for workload in workloads(config):
        results = {}
        for maker in memories(config):
            memory = maker()
            results[memory.name] = serve(workload.lifetimes(all_at_once=True), memory, UnitCost())
        published = workload.published
        assert published is not None
        # The paper's paged batches depend on its engine's speed; the reservations' are full at its rates.
        for name in ("maximum", "power of two", "exact"):
            assert batched(results[name]) == pytest.approx(published.batched[name], rel=0.15)
        tokens = [result.share("tokens") for result in results.values()]
        assert tokens == sorted(tokens)
        if published.shares:
            assert results["paged"].share("tokens") == pytest.approx(0.963, abs=0.02)
            for name in ("maximum", "power of two", "exact"):
                ours = [100 * results[name].share(part) for part in PARTS]
                assert ours == pytest.approx(published.shares[name], abs=7)


def test_arrivals_are_served_until_the_last_has_come() -> None:
    config = Config(num_requests=30)
    workload = workloads(config)[0]
    calls: list[None] = []
    comparison = compare(workload, config, UnitCost(), lambda: calls.append(None))
    assert len(calls) == 10
    assert all(r.finished == 30 for r in comparison.at_once)
    assert all(r.columns["start_ps"][-1] < workload.last_arrival_ps for r in comparison.by_arrival)


# ---------------------------------------------------------------- the command


def command(*arguments: str, folder: Path) -> int:
    return main([*arguments, "--out", str(folder)])


def test_command_prints_the_example_and_leaves_figures_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--num-requests", "60", "--num-slots", "6000")
    assert command(*arguments, folder=tmp_path / "a") == 0
    printed = capsys.readouterr().out
    assert [int(word) for word in printed.split() if word in ("204800", "51200")] == [204800, 51200]
    assert "ratio                           4.0\n" in printed
    names = {path.name for path in (tmp_path / "a").iterdir()}
    figures = {f"{stem}.{end}" for stem in ("memory_over_time", "batched_requests") for end in ("png", "svg")}
    assert names == figures | {"summary.json"}
    numbers = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert numbers["example"] == {"contiguous_tokens": 204800, "paged_tokens": 51200, "ratio": 4.0}
    shares = numbers["workloads"]["ShareGPT"]["all_at_once"]["paged"]["share_while_waiting"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert f"paged {100 * shares['tokens']:.1f}" in " ".join(printed.split())
    assert command(*arguments, folder=tmp_path / "b") == 0
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_figures_can_be_left_out_and_earlier_ones_go(tmp_path: Path) -> None:
    assert command("-n", "5", folder=tmp_path) == 0
    numbers = (tmp_path / "summary.json").read_bytes()
    assert command("-n", "5", "--no-figures", folder=tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_bytes() == numbers


def test_command_serves_a_trace_and_leaves_out_what_is_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "mine.csv"
    rows = [f"2023-11-16 18:17:{i:02d}.0000000,{100 + i},{10 + i}" for i in range(20)]
    rows.append("2023-11-16 18:18:00.0000000,5000,10")
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    assert command(str(trace), "--num-slots", "4096", folder=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "mine: 20 requests" in printed
    assert "1 longer than max_seq_len are left out" in printed
    assert "paper" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "none.csv"),
        (["--num-slots", "100"], "max_seq_len (2048) must not exceed num_slots (100)"),
        (["--num-requests", "0"], "num_requests (0) must be at least 1"),
        (["--gpu", "tpu"], "unknown GPU 'tpu'"),
        (["--model", "llama-9"], "unknown model 'llama-9'"),
        (["--tokens-per-block", "16384", "--num-slots", "4096"], "(16384) must not exceed num_slots (4096)"),
        (["--tokens-per-block", "48"], "tokens_per_block (48) must be a power of two"),
    ],
)
def test_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command(*arguments, folder=tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command("-n", "5", folder=tmp_path / "file" / "out") == 2
    assert capsys.readouterr().err.startswith("error: out (")


def test_interruption_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory_savings, "draw_batched", interrupt)
    assert command("-n", "5", folder=tmp_path / "out") == 130
    assert capsys.readouterr().err == "interrupted: the result is not complete\n"
    assert not (tmp_path / "out").exists()


def test_experiments_are_listed() -> None:
    found = dict(questions())
    assert found["memory_savings"] == "How much KV memory does paging save over contiguous reservation?"
    assert all(found.values())
    listed = subprocess.run(
        [sys.executable, "-m", "experiments"],
        cwd=Path(experiments.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    assert [tuple(line) for line in lines[: len(found)]] == list(found.items())
