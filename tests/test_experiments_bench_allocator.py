"""The allocator's head-to-head: the workloads are the published ones, and the hits are vLLM's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from experiments.bench._managers import Ours, prefix_digests
from experiments.bench._serving import (
    OUTPUT_TOKENS,
    PROMPTS_SHA256,
    Workload,
    make_workload,
    serve,
    workload_of,
)
from experiments.bench.allocator import main

VLLM_HITS = {
    "standard": (486_400, "f5f1be5c772e056a9437eef3c8a92d4f320b9cd98bba71d0324ebcfdc5f751e6"),
    "hard": (309_776, "2e3d79c61ad89f38bff9282781ef07802420a5330e92b40b3501d43997f25560"),
}
"""Sum and SHA-256 of the cached prompt tokens of all 2,000 requests, as JSON, of vLLM 0.33.0's KVCacheManager."""


@pytest.fixture(scope="module")
def small() -> Workload:
    few = make_workload(requests=24)
    return workload_of("small", 600, 3, few.prompts, few.outputs)


@pytest.mark.parametrize("hard", [False, True], ids=["standard", "hard"])
def test_each_request_hits_what_it_hits_in_vllm(hard: bool) -> None:
    workload = make_workload(hard)
    assert workload.sha256().startswith(PROMPTS_SHA256[workload.name])
    server = Ours(workload.num_blocks)
    run = serve(server, workload)
    digest = hashlib.sha256(json.dumps(run.hits).encode()).hexdigest()
    assert (sum(run.hits), digest) == VLLM_HITS[workload.name]
    server.verify(workload, run)


def test_a_step_has_a_token_for_each_running_request(small: Workload) -> None:
    assert all(0 < len(tokens) <= 3 for tokens in small.steps)
    assert sorted(chain(*small.steps)) == sorted(chain(*small.outputs))
    assert len(small.steps) == 8 * OUTPUT_TOKENS


def test_a_wrong_slot_and_a_wrong_hit_are_noticed(small: Workload) -> None:
    short = workload_of("short", 600, 3, small.prompts[:3] * 2, small.outputs[:6])
    server = Ours(600)
    run = serve(server, short)
    server.verify(short, run)
    assert sum(run.hits) > 0
    run.slots[5] = run.slots[5] + 1
    with pytest.raises(AssertionError, match="not where the table says"):
        server.verify(short, run)
    run.slots[5] = run.slots[5] - 1
    other = replace(short, prompts=[*short.prompts[:3], *(p[::-1] for p in short.prompts[3:])])
    with pytest.raises(AssertionError, match="hit other content"):
        server.verify(other, run)


def test_the_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main(["--hard", "--num-requests", "40", "--runs", "1", "--json", str(file)]) == 0
    ours = json.loads(file.read_text())[0]
    assert ours["name"] == "allocator"
    assert ours["workload"] == "hard"
    assert len(ours["hits_per_request"]) == 40
    assert ours["hit_rate"] == pytest.approx(
        sum(ours["hits_per_request"]) / make_workload(True, requests=40).prompt_tokens
    )
    for figure in ("tokens_per_s", "admit_us", "append_us", "free_us", "yardstick_s"):
        assert ours[figure] > 0
    assert set(ours["blocks_per_s"]) == {"1", "64"}
    assert "hard workload" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "runs (0) must be at least 1"),
        (["--seed=-1"], "seed (-1) must be at least 0"),
        (["--json", "/proc/none/x"], "json (/proc/none/x) cannot be written"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-requests", "5", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_digest_of_a_prefix_depends_on_each_token_before() -> None:
    first, second = prefix_digests([3, 1, 2, 5]), prefix_digests([3, 2, 1, 5])
    assert (first == second).tolist() == [True, False, False, False]
    assert first.dtype == np.uint64
