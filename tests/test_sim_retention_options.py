"""How blocks are to be kept, as options: their rules, what makes no difference, and the command line."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cluster_cases import ClusterScenario
from different_cases import different_examples
from engine_cases import Scenario
from hypothesis import given
from hypothesis import strategies as st
from retention_cases import is_refused, retaining, says, seconds

from allocator.config import BuildConfig, CacheConfig
from experiments.tools import sweep
from sim.cluster.config import ClusterConfig
from sim.replay import main
from sim.scheduler.retention import RetentionOptions

# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_priority": 101, "head_tokens": 4}, r"head_priority (101) must be at most 100"),
        ({"output_priority": -1}, r"output_priority (-1) must be at least 0"),
        ({"head_tokens": -1}, r"head_tokens (-1) must be at least 0"),
        ({"head_tokens": 4}, r"head_tokens (4) needs head_priority"),
        ({"head_priority": 90}, r"head_priority (90) needs head_tokens, to say of how many"),
        ({"prompt_duration_s": 1.0}, r"prompt_duration_s (1.0) needs a prompt_priority other than 35"),
        (
            {"prompt_priority": 35, "prompt_duration_s": 1.0},
            r"prompt_duration_s (1.0) needs a prompt_priority other than 35, to which it returns",
        ),
        (
            {"output_priority": 9, "output_duration_s": 0.0},
            r"output_duration_s (0.0) must be above 0 and at most 1e+06",
        ),
        (
            {"output_priority": 9, "output_duration_s": float("nan")},
            r"output_duration_s (nan) must be above 0 and at most 1e+06",
        ),
    ],
)
def test_rules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        RetentionOptions(**fields)


KEPT = RetentionOptions(prompt_priority=90)


@pytest.mark.parametrize(
    ("retention", "build", "cache", "message"),
    [
        (KEPT, {"enable_paged_kv_cache": False}, {}, "prompt_priority (90) needs enable_paged_kv_cache"),
        (KEPT, {}, {"enable_block_reuse": False}, "prompt_priority (90) needs enable_block_reuse"),
        (
            RetentionOptions(prompt_priority=90, output_priority=90),
            {},
            {},
            "prompt_priority (90) needs a part that is kept otherwise: all would be kept alike",
        ),
        (
            RetentionOptions(4, 90, 2.0, 90, 2.0, 90, 2.0),
            {},
            {},
            "head_priority (90) needs a part that is kept otherwise",
        ),
        (RetentionOptions(session_priority=80), {}, {}, "session_priority (80) needs a trace with sessions"),
    ],
)
def test_what_makes_no_differenceis_refused(
    retention: RetentionOptions, build: dict[str, Any], cache: dict[str, Any], message: str
) -> None:
    scenario = Scenario(
        [says(0, 0, "ab"), says(1, 0, "cd")],
        BuildConfig(1, 100, 100, tokens_per_block=4, **build),
        40,
        CacheConfig(**{"policy": "priority", **cache}),
        retention=retention,
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        scenario.run()


@different_examples(1)
@given(retaining(), st.sampled_from([36, 90, 20]), st.sampled_from([None, 1, 14, 25, 60]), st.integers(0, 9))
def test_where_all_is_kept_alike_it_is_as_if_nothing_were_said(
    scenario: Scenario, priority: int, duration_ps: int | None, head_tokens: int
) -> None:
    """Why that is refused: what is used last is over last."""
    wish = (priority, seconds(duration_ps if priority > 35 else None))
    head = wish if head_tokens else (None, None)
    retention = RetentionOptions(head_tokens, *head, *wish, *wish)
    assert is_refused(dataclasses.replace(scenario, retention=retention))
    silent = dataclasses.replace(scenario, retention=None).run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetentionOptions, "check", lambda *_, **__: None)
        heard = dataclasses.replace(scenario, retention=retention).run()
    for name, column in silent.requests.items():
        assert column.tolist() == heard.requests[name].tolist()


def test_host_memory_takes_what_is_kept_dearly_whatever_the_policy() -> None:
    """A's two blocks are evicted for B's three. Host memory takes the first, of 90, and not the other, below 50."""
    requests = [says(0, 0, "Aa"), says(1, 20, "Bbc"), says(2, 40, "Aac")]
    scenario = Scenario(
        requests, BuildConfig(1, 100, 100, tokens_per_block=4), 3, CacheConfig(offload_min_priority=50)
    )
    scenario = dataclasses.replace(scenario, num_host_blocks=4)
    assert scenario.run().requests["hit_tokens"].tolist() == [0, 0, 0]
    said = dataclasses.replace(scenario, retention=RetentionOptions(head_tokens=4, head_priority=90))
    assert said.run().requests["hit_tokens"].tolist() == [0, 0, 4]
    low = dataclasses.replace(scenario, retention=RetentionOptions(head_tokens=4, head_priority=40))
    message = "head_priority (40) needs policy priority, or offload_min_priority (50) between it and 35: lru looks at"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        low.run()


def test_sessions_are_not_pinned_where_prefill_is_apart() -> None:
    fields = {"retention": RetentionOptions(session_priority=80), "cache": CacheConfig(policy="priority")}
    requests = [says(0, 0, "ab"), says(1, 0, "abc", parent=0)]
    scenario = ClusterScenario(
        requests,
        BuildConfig(1, 100, 100, tokens_per_block=4),
        40,
        cluster=ClusterConfig(2, "round_robin", 1),
        **fields,
    )
    with pytest.raises(
        ValueError, match=r"^session_priority \(80\) must not be given with prefill_replicas: "
    ):
        scenario.run()


# ------------------------------------------------------------------ from the command line

RUN = ["synthetic", "--num-requests", "60", "--requests-per-s", "20", "--user-tokens-max", "400"]
RUN += ["--output-tokens-max", "60", "--turns-mean", "3", "--think-s-mean", "1", "--system-prompts", "3"]
RUN += [
    "--session-tokens-max",
    "2048",
    "--max-seq-len",
    "4096",
    "--num-blocks",
    "300",
    "--tokens-per-block",
    "16",
]
KEEPING = [
    "--policy",
    "priority",
    "--head-tokens",
    "512",
    "--head-priority",
    "90",
    "--session-priority",
    "80",
]
KEEPING += ["--output-priority", "20", "--output-duration-s", "0.5"]
TABLES = ("requests.parquet", "timeline.parquet")


def _replay(out: Path, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--no-figures", "--out", str(out)]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def test_flags_reach_the_run_and_its_manifest(tmp_path: Path) -> None:
    silent = _replay(tmp_path / "silent", *RUN, "--policy", "priority")
    kept = _replay(tmp_path / "kept", *RUN, *KEEPING)
    assert kept["hit_tokens"] != silent["hit_tokens"]
    said = json.loads((tmp_path / "kept" / "manifest.json").read_text())["config"]["retention"]
    assert said == dataclasses.asdict(
        RetentionOptions(512, 90, output_priority=20, output_duration_s=0.5, session_priority=80)
    )
    _replay(tmp_path / "again", "--from-manifest", str(tmp_path / "kept" / "manifest.json"))
    _replay(tmp_path / "stepped", *RUN, *KEEPING, "--no-event-skipping")
    for name in TABLES:
        kept_bytes = (tmp_path / "kept" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == kept_bytes
        assert (tmp_path / "stepped" / name).read_bytes() == kept_bytes


def test_flags_vary_in_a_sweep(tmp_path: Path) -> None:
    flags = ["--jobs", "1", "--no-figures", "--vary", "session_priority=35,80", "--out", str(tmp_path)]
    assert sweep.main([*flags, "--", *RUN, "--policy", "priority"]) == 0
    with (tmp_path / sweep.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["session_priority"] for row in rows] == ["35", "80"]
    assert rows[0]["hit_tokens"] != rows[1]["hit_tokens"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--head-tokens", "512", "--head-priority", "90"],
            "head_priority (90) needs policy priority: lru looks at",
        ),
        (["--policy", "priority", "--head-tokens", "512"], "head_tokens (512) needs head_priority"),
        (
            ["--policy", "priority", "--prompt-priority", "80", "--output-priority", "80"],
            "prompt_priority (80) needs a part that is kept otherwise",
        ),
        (
            ["--policy", "priority", "--session-priority", "80", "--turns-mean", "1"],
            "session_priority (80) needs a trace with sessions",
        ),
        (
            [
                "--policy",
                "priority",
                "--session-priority",
                "80",
                "--num-replicas",
                "2",
                "--prefill-replicas",
                "1",
            ],
            "session_priority (80) must not be given with prefill_replicas",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, *flags, "--no-figures", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
