"""`python -m sim.replay`: from flags to files, again from the manifest, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import polars as pl
import pytest

import sim.runner
from allocator.config import MODEL_PRESETS, BuildConfig, CacheConfig
from allocator.eviction import POLICIES
from experiments import memory_savings
from experiments.tools import calibrate
from sim.cluster.config import ClusterConfig
from sim.cluster.routing import ROUTING
from sim.command_line import option_value
from sim.export import ResultFolder
from sim.hardware import GPU_PRESETS, GPUSpec
from sim.options import GPUOptions, parse
from sim.replay import main, summary_of
from sim.report import report_rows
from sim.scheduler.config import EngineConfig
from sim.traces import FORMATS
from sim.traces.reading import ReadOptions
from sim.workload import LENGTH_MODELS, WorkloadShape

SMALL = ["synthetic", "--num-requests", "40", "--user-tokens-max", "1000", "--output-tokens-max", "200"]
SHARED = [*SMALL, "--system-prompts", "2", "--turns-mean", "2", "--session-tokens-max", "2048"]
TIGHT = ["--num-blocks", "160", "--tokens-per-block", "16", "--admission", "max_utilization"]
TABLES = ("requests.parquet", "timeline.parquet")


def replay(arguments: list[str], out: Path, *more: str) -> dict:
    """Run without figures, which must succeed, and return the summary."""
    assert main([*arguments, "--out", str(out), "--no-figures", *more]) == 0
    return json.loads((out / "summary.json").read_text())


def timeless(summary: dict) -> dict:
    return {name: value for name, value in summary.items() if name not in ("wall_s", "total_wall_s")}


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """A CSV that no format but named columns can read."""
    path = tmp_path / "trace.csv"
    rows = [f"{0.25 * i},{100 + 37 * i % 400},{5 + i % 9}" for i in range(30)]
    path.write_text("when,tokens_in,tokens_out\n" + "\n".join(rows) + "\n")
    return path


COLUMNS = ("--columns", "arrival=when,prompt=tokens_in,output=tokens_out")


# ------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_a_whole_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert main([*SMALL, "--out", str(out)]) == 0
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    figures = [f"figures/{n}.{e}" for n in ("block_map", "latency", "utilization") for e in ("png", "svg")]
    assert found == sorted([*figures, "manifest.json", "summary.json", *TABLES])
    said = capsys.readouterr()
    assert said.err == ""
    assert "40 of 40 finished" in said.out
    assert str(out) in said.out


def test_the_summary_follows_from_the_tables(tmp_path: Path) -> None:
    summary = replay([*SHARED, *TIGHT], tmp_path)
    requests, timeline = (pl.read_parquet(tmp_path / name) for name in TABLES)
    assert summary["requests"] == requests.height == 40
    assert summary["finished"] == (requests["status"] == "finished").sum()
    ttft = np.sort((requests["first_token_ps"] - requests["arrival_ps"]).to_numpy())
    assert summary["ttft_s"]["p50"] == ttft[19] / 1e12
    assert summary["ttft_s"]["max"] == ttft[-1] / 1e12
    assert summary["steps"] == timeline["steps"].sum()
    assert summary["preemptions"] == timeline["preemptions"].sum()
    assert summary["hit_tokens"] == requests["hit_tokens"].sum() > 0
    assert summary["evicted_blocks"] == timeline["evicted_blocks"].sum()
    looked_up = requests["query_blocks"].sum()
    assert sum(summary["miss_blocks"].values()) == looked_up - requests["hit_blocks"].sum()


def test_the_hit_rate_stands_between_its_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = replay(SHARED, tmp_path / "a")
    for unit in ("tokens", "blocks"):
        assert 0 < summary[f"hit_rate_{unit}"] <= summary[f"infinite_cache_hit_rate_{unit}"] < 1
    computed = summary["computed_prompt_tokens"]
    assert computed["infinite_cache"] <= computed["run"] == computed["no_cache"] - summary["hit_tokens"]
    assert "of an infinite cache: " in capsys.readouterr().out
    none = replay([*SHARED, "--no-enable-block-reuse"], tmp_path / "b")
    assert none["hit_rate_tokens"] in (0, None)


def test_a_warm_up_is_served_but_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, late = (
        replay(SHARED, tmp_path / "a"),
        replay([*SHARED, "--warm-up-requests", "15"], tmp_path / "b"),
    )
    for name in TABLES:  # what happens is the same
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (whole["requests"], late["requests"]) == (40, 25)
    assert late["measured_s"] < late["simulated_s"] == whole["simulated_s"]
    requests = pl.read_parquet(tmp_path / "b" / "requests.parquet")[15:]
    assert late["hit_tokens"] == requests["hit_tokens"].sum()
    assert late["infinite_cache_hit_rate_tokens"] > whole["infinite_cache_hit_rate_tokens"]
    assert (
        json.loads((tmp_path / "b" / "manifest.json").read_text())["config"]["engine"]["warm_up_requests"]
        == 15
    )
    assert "not counted: the first " in capsys.readouterr().out


def test_a_part_of_a_trace_is_in_the_manifest(tmp_path: Path, trace_file: Path) -> None:
    flags = [str(trace_file), *COLUMNS, "--start-request", "5", "--num-requests", "20", "--rate", "3"]
    replay(flags, tmp_path / "a")
    document = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert document["trace"]["requests"] == 20
    reading = document["config"]["trace"]["reading"]
    assert (reading["start_request"], reading["num_requests"], reading["rate"]) == (5, 20, 3.0)
    replay(["--from-manifest", str(tmp_path / "a" / "manifest.json")], tmp_path / "b")
    for name in (*TABLES, "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    arrivals = pl.read_parquet(tmp_path / "a" / "requests.parquet")["arrival_ps"]
    assert arrivals[0] == 0
    assert 19 / (arrivals[19] / 1e12) == pytest.approx(3.0)


def test_a_streamed_trace_gives_the_same_bytes(
    tmp_path: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replay([str(trace_file), *COLUMNS], tmp_path / "a")
    monkeypatch.setattr("sim.traces.formats.STREAMED_BYTES", 0)
    streamed = replay([str(trace_file), *COLUMNS], tmp_path / "b")
    for name in (*TABLES, "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert timeless(kept) == timeless(streamed)


def test_skipped_rows_are_counted_everywhere(
    tmp_path: Path, trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trace_file.open("a") as file:
        file.write("no,row\n")
    summary = replay([str(trace_file), *COLUMNS, "--skip-bad"], tmp_path / "a")
    assert summary["skipped_rows"] == 1
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["trace"]["skipped_rows"] == 1
    assert "1 malformed rows skipped" in capsys.readouterr().out


def test_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (replay([*SHARED, *TIGHT], tmp_path / name) for name in "ab")
    for name in TABLES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert timeless(first) == timeless(second)


def test_skipping_events_changes_no_byte(tmp_path: Path) -> None:
    first = replay([*SHARED, *TIGHT], tmp_path / "a")
    second = replay([*SHARED, *TIGHT], tmp_path / "b", "--no-event-skipping")
    for name in TABLES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert timeless(first) == timeless(second)


def test_a_windowed_run_uses_less_and_is_rerun_from_its_manifest(tmp_path: Path) -> None:
    flags = ["--window", "64", "--num-sinks", "4", "--tokens-per-block", "16"]
    whole = replay([*SHARED, *flags[-2:]], tmp_path / "whole")
    kept = replay([*SHARED, *flags], tmp_path / "a")
    assert kept["finished"] == whole["finished"]
    assert kept["kv_utilization"]["block"]["mean"] < whole["kv_utilization"]["block"]["mean"]
    assert kept["tpot_s"]["mean"] < whole["tpot_s"]["mean"]  # fewer keys to attend to
    assert 0 < kept["internal_fragmentation"]["final"] < 0.5
    again = replay(["--from-manifest", str(tmp_path / "a" / "manifest.json")], tmp_path / "b")
    for name in TABLES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert timeless(kept) == timeless(again)


# ------------------------------------------------------------------ from the manifest


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (
            *("--gpu", "mine", "--tflops", "300", "--bandwidth-tb-s", "2", "--memory-gib", "80.5"),
            *("--mfu", ".5", "--mbu", ".5", "--link-gb-s", "30"),
        ),
        (
            "--gpu",
            "h200",
            "--mfu",
            "0.4",
            "--model",
            "llama-3-8b",
            "--kv-dtype",
            "fp8_e4m3",
            "--policy",
            "fifo",
        ),
    ],
)
def test_a_manifest_reruns_a_workload(tmp_path: Path, flags: tuple[str, ...]) -> None:
    first = replay([*SHARED, *flags], tmp_path / "a")
    second = replay(["--from-manifest", str(tmp_path / "a" / "manifest.json")], tmp_path / "b")
    for name in (*TABLES, "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert timeless(first) == timeless(second)


def test_a_manifest_reruns_a_file_from_anywhere(
    tmp_path: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    replay(["trace.csv", *COLUMNS, "--num-requests", "20", "--time-scale", "0.1"], tmp_path / "a")
    monkeypatch.chdir("/")
    replay([f"--from-manifest={tmp_path / 'a' / 'manifest.json'}"], tmp_path / "b")
    for name in TABLES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    requests = pl.read_parquet(tmp_path / "b" / TABLES[0])
    assert requests.height == 20
    assert requests["arrival_ps"].to_list()[:3] == [0, 25 * 10**9, 50 * 10**9]


def test_a_manifest_follows_a_trace_that_moved_but_not_one_that_changed(
    tmp_path: Path, trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay([str(trace_file), *COLUMNS], tmp_path / "a")
    manifest = str(tmp_path / "a" / "manifest.json")
    moved = trace_file.rename(tmp_path / "moved.csv")
    replay([str(moved), "--from-manifest", manifest], tmp_path / "b")
    moved.write_text(moved.read_text() + "99,10,10\n")
    capsys.readouterr()
    assert main([str(moved), "--from-manifest", manifest, "--out", str(tmp_path / "c")]) == 2
    said = capsys.readouterr().err
    assert "SHA-256" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_flags_beside_a_manifest_change_what_it_says(tmp_path: Path) -> None:
    replay([*SHARED, "--policy", "fifo"], tmp_path / "a")
    manifest = str(tmp_path / "a" / "manifest.json")
    replay(["--from-manifest", manifest, "--tokens-per-block", "16"], tmp_path / "b")
    config = json.loads((tmp_path / "b" / "manifest.json").read_text())["config"]
    assert (config["build"]["tokens_per_block"], config["cache"]["policy"]) == (16, "fifo")
    replay([*SHARED, "--policy", "fifo", "--tokens-per-block", "16"], tmp_path / "c")
    assert (tmp_path / "b" / TABLES[1]).read_bytes() == (tmp_path / "c" / TABLES[1]).read_bytes()


# ------------------------------------------------------------------ flags


def another(value: object, kind: Any) -> str:
    """Return the text of a value that differs from the default and that every field's rule allows."""
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, bool):
        raise AssertionError("flags are switched, not given")
    if isinstance(value, int):
        return str(value * 2 or 4)
    if isinstance(value, float):
        return repr(value / 2 if value > 1 else 0.125)
    return "3" if int in get_args(kind) else "0.5"


@pytest.mark.parametrize(
    "kind", [BuildConfig, CacheConfig, EngineConfig, ClusterConfig, WorkloadShape, GPUOptions, ReadOptions]
)
def test_every_field_is_a_flag(kind: type) -> None:
    chosen = {
        "kv_dtype": "int8",
        "kv_scales": "tensor",
        "policy": "fifo",
        "gpu": "h200",
        "format": "mooncake",
        "columns": "arrival=a",
        "num_sinks": "0",
        "kv_cache_free_gpu_mem_fraction": "0.5",
        "turns_mean": "1.5",
        "routing": "least_loaded",
        "prefill_replicas": "0",
        "session_tokens_max": "90000",
        "documents_per_session": "3",
    }
    part = {GPUOptions: "hardware", ReadOptions: "reading"}.get(
        kind, kind.__name__.removesuffix("Config").removesuffix("Shape").lower()
    )
    alone = {"enable_block_reuse", "length_model", "rate"}  # other fields are not allowed beside these values
    hints = get_type_hints(kind)
    together: list[tuple[str, str, list[str]]] = []
    calls = [together]
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            text = str(not field.default)
            flags = [flag.replace("--", "--no-", 1) if field.default else flag]
        else:
            text = chosen.get(field.name) or another(field.default, hints[field.name])
            flags = [flag, text]
        if field.name in alone:
            calls.append([(field.name, text, flags)])
        else:
            together.append((field.name, text, flags))
    for call in calls:
        found, _ = parse(["t.csv", "--out", "o", *(word for *_, flags in call for word in flags)])
        for name, text, _ in call:
            value = getattr(getattr(found, part), name)
            assert str(value) == text or float(value) == float(text), name


def test_the_help_lists_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    words = set(re.findall(r"[\w.-]+\w", capsys.readouterr().out))
    for names in (GPU_PRESETS, MODEL_PRESETS, POLICIES, FORMATS, LENGTH_MODELS, ROUTING):
        assert set(names) <= words


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (memory_savings.main, (*MODEL_PRESETS, *GPU_PRESETS)),
        (calibrate.main, tuple(MODEL_PRESETS)),
    ],
    ids=["memory_savings", "calibrate"],
)
def test_other_commands_list_the_names_too(
    command: Callable[[list[str]], int], names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command(["--help"])
    assert set(names) <= set(re.findall(r"[\w.-]+\w", capsys.readouterr().out))


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_gpu_options_and_specs_convert_both_ways(name: str) -> None:
    for spec in (
        GPU_PRESETS[name],
        dataclasses.replace(GPU_PRESETS[name], mfu=0.25, layer_overhead_us=1.5),
        dataclasses.replace(GPU_PRESETS[name], gpu_name="another"),
    ):
        assert GPUOptions.of(spec).resolve() == spec
    assert GPUOptions(gpu=name.upper(), tflops=1.0).resolve().tflops == 1.0
    assert isinstance(GPUOptions(gpu=name).resolve(), GPUSpec)


def test_a_model_can_be_a_config_file(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    replay([*SMALL, "--model", str(tmp_path / "config.json")], tmp_path / "a")
    (tmp_path / "config.json").unlink()  # the manifest holds the model itself
    replay(["--from-manifest", str(tmp_path / "a" / "manifest.json")], tmp_path / "b")
    assert (tmp_path / "a" / TABLES[1]).read_bytes() == (tmp_path / "b" / TABLES[1]).read_bytes()


def test_a_policy_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_policy.py").write_text(
        "from allocator.eviction import FIFO\n\n\nclass Mine(FIFO):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = replay([*SHARED, *TIGHT, "--policy", "own_policy:Mine"], tmp_path / "a")
    fifo = replay([*SHARED, *TIGHT, "--policy", "fifo"], tmp_path / "b")
    assert mine["evicted_blocks"] > 0
    assert timeless(mine) == timeless(fifo)


def test_an_option_is_found_before_parsing() -> None:
    assert option_value(["t", "--from-manifest", "a"], "--from-manifest") == "a"
    assert option_value(["t", "--from_manifest=b=c"], "--from-manifest") == "b=c"
    assert option_value(["t", "--from-manifest"], "--from-manifest") is None


# ------------------------------------------------------------------ what it says


def test_the_help_is_light() -> None:
    """Asking for help loads neither the engine nor the figures."""
    code = (
        "import sys\n"
        "from sim.replay import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print('heavy:', [name for name in ('simpy', 'matplotlib', 'rich') if name in sys.modules])\n"
    )
    root = str(Path(sim.runner.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.stdout.endswith("heavy: []\n")
    for flag in (
        "--tokens-per-block",
        "--num-blocks",
        "--policy",
        "--gpu",
        "--time-scale",
        "--from-manifest",
    ):
        assert flag in done.stdout


def reported(*flags: str) -> tuple[dict[str, str], dict]:
    """Return the report's rows by label, and the summary that they are made of."""
    options, _ = parse([*SMALL, "--out", "o", *flags])
    finished = sim.runner.run(options.spec(None))
    summary = summary_of(finished, perf_counter())
    return dict(report_rows(finished, summary)), summary


def test_the_report_says_how_the_pool_came_about() -> None:
    def pool(*flags: str) -> str:
        return reported(*flags)[0]["KV pool"]

    assert pool("--gpu", "a100-80gb").startswith(
        "1,898 blocks of 64 tokens = 121,472 tokens\n59.33 GiB = 0.9 × (80.00"
    )
    assert pool("--max-tokens", "6400").endswith("capped by max_tokens 6,400")
    assert pool("--num-blocks", "100") == (
        "100 blocks of 64 tokens = 6,400 tokens, as --num-blocks says (3.12 GiB)"
    )


def test_the_report_sets_the_bound_beside_the_hit_rate() -> None:
    rows, summary = reported("--system-prompts", "2")
    bounds = [summary[f"infinite_cache_hit_rate_{unit}"] for unit in ("tokens", "blocks")]
    assert rows["hit rate"].endswith(f" of blocks\nof an infinite cache: {bounds[0]:.1%} and {bounds[1]:.1%}")


@pytest.mark.parametrize(
    "flags", [[], ["--turns-mean", "3"], ["--num-replicas", "2", "--prefill-replicas", "1"]], ids=str
)
def test_an_overload_is_reported(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the last turns find no queue any more, and where it is for room to decode that requests wait."""
    summary = replay([*SMALL, "--num-requests", "400", "--requests-per-s", "100", *flags], tmp_path)
    shown = capsys.readouterr().out
    assert re.search(r"overloaded +[\d.]+ requests/s arrive, [\d.]+ finish; \d+ wait", shown), shown
    found = summary["overload"]
    assert found["waiting"] >= 10
    assert found["finished_per_s"] < found["arrivals_per_s"]
    summary = replay([*SMALL, "--num-requests", "200", "--requests-per-s", "1", *flags], tmp_path)
    assert "overloaded" not in capsys.readouterr().out
    assert summary["overload"] is None


def test_what_host_memory_gives_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = replay(
        [*SMALL, "--num-blocks", "60", "--host-cache-bytes", "8000000000", "--turns-mean", "3"], tmp_path
    )
    host = summary["host"]
    assert 0 < host["hit_blocks"] <= host["onboarded_blocks"] <= host["offloaded_blocks"]
    assert summary["swapped_blocks"] == host["offloaded_blocks"] + host["onboarded_blocks"]
    shown = " ".join(capsys.readouterr().out.split())
    assert f"host memory {host['num_blocks']:,} blocks: {host['hit_blocks']:,} of" in shown
    assert f"{host['offloaded_blocks']:,} moved there when evicted" in shown
    assert replay(SMALL, tmp_path)["host"] is None
    assert "host memory" not in capsys.readouterr().out


def test_rejections_are_reported_by_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = replay([*SMALL, "--max-seq-len", "600"], tmp_path)
    rejected = summary["rejected"]["exceeds_max_seq_len"]
    assert 0 < rejected < 40
    assert summary["finished"] == 40 - rejected
    assert f"{rejected} rejected: exceeds_max_seq_len" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthetic", "--model", "llama-2-7bb"], "unknown model 'llama-2-7bb' (did you mean llama-2-7b?)"),
        (["synthetic", "--gpu", "a100"], "unknown GPU 'a100' (did you mean a100-80gb?)"),
        (
            ["synthetic", "--gpu", "mine", "--tflops", "3"],
            "gpu (mine) is no preset and needs bandwidth_tb_s, ",
        ),
        (["synthetic", "--gpu", "h200", "--mfu", "1.5"], "mfu (1.5) must be in [0.01, 1]"),
        (["synthetic", "--slo-ttft-s", "inf"], "slo_ttft_s (inf) must be above 0 and at most 1e+06"),
        (["synthetic", "--slo-ttft-s", "1e300"], "slo_ttft_s (1e+300) must be above 0 and at most 1e+06"),
        (["synthetic", "--slo-tpot-s", "nan"], "slo_tpot_s (nan) must be above 0 and at most 1e+06"),
        (["synthetic", "--memory-gib", "1e300"], "memory_gib (1e+300) must be in "),
        (["synthetic", "--num-blocks", "3000000000"], "num_blocks (3000000000) must be at most "),
        (["synthetic", "--think-s-mean", "1e300"], "think_s_mean (1e+300) must be in [0, 86400]"),
        (["synthetic", "--policy", "lruu"], "policy (lruu) must be one of "),
        (["synthetic", "--policy", "no_such_module:X"], "policy (no_such_module:X) cannot be imported: "),
        (["synthetic", "--tokens-per-block", "48"], "tokens_per_block (48) must be a power of two"),
        (["synthetic", "--watermark", "2"], "watermark (2.0) must be in [0, 1)"),
        (["synthetic", "--num-blocks", "3"], "num_blocks (3) must be at least 32: pool of 3 blocks of 64 "),
        (["synthetic", "--max-tokens", "1"], "max_tokens (1) must be at least 2048: pool of 0 blocks of 64 "),
        (["synthetic", "--max-tokens", "1", "--window", "100"], "max_tokens (1) must be at least 192: "),
        (
            ["synthetic", "--max-tokens", "2000", "--no-enable-paged-kv-cache"],
            "max_tokens (2000) must be at least 2048: pool of 2000 tokens is smaller than one sequence of ",
        ),
        (
            ["synthetic", "--kv-cache-free-gpu-mem-fraction", "1e-9"],
            "kv_cache_free_gpu_mem_fraction (1e-09) must be at least 0.0152: pool of 0 blocks of 64 tokens ",
        ),
        (
            ["synthetic", "--max-batch-size", "9000"],
            "max_num_tokens (8192) must be at least max_batch_size (9000): a step decodes the whole batch",
        ),
        (
            ["synthetic", "--max-num-tokens", "2000000"],
            "max_num_tokens (2000000) must be at most 1069991: weights (12.55 GiB) and reserve (",
        ),
        (
            ["synthetic", "--max-num-tokens", "9" * 400],
            f"max_num_tokens ({'9' * 400}) must be at most 1069991: it comes to more bytes than there are",
        ),
        (["synthetic", "--max-seq-len", "1000000"], "pool of 1898 blocks of 64 tokens is smaller than "),
        (
            ["synthetic", "--model", "llama-2-70b"],
            "weights (128.48 GiB) of llama-2-70b exceed the GPU's memory",
        ),
        (
            ["synthetic", "--warm-up-requests", "1000"],
            "warm_up_requests (1000) must leave some of 1000 requests",
        ),
        (
            ["synthetic", "--num-requests", "5", "--warm-up-s", "9000"],
            "warm_up_s (9000.0) must leave some requests: the last arrives at ",
        ),
        (["synthetic", "--num-replicas", "1025"], "num_replicas (1025) must be at most 1024"),
        (
            ["synthetic", "--max-tokens", "5000", "--num-blocks", "100"],
            "num_blocks (100) of 64 tokens must hold at most max_tokens (5000), or one of them be left out",
        ),
        (["synthetic", "--kv-link-gb-s", "5"], "kv_link_gb_s (5.0) needs prefill_replicas"),
        (
            ["synthetic", "--no-enable-paged-kv-cache", "--host-cache-bytes", "10000000000"],
            "host_cache_bytes (10000000000) must be 0 when paging is off",
        ),
        (
            ["synthetic", "--host-cache-bytes", "9" * 23],
            f"host_cache_bytes ({'9' * 23}) must be at most 2147483647 blocks of 33554432 bytes",
        ),
        (["synthetic", "--skip-bad"], "--skip-bad needs a trace file: TRACE is synthetic"),
        (
            ["synthetic", "--rate", "9"],
            "--rate needs a trace file: TRACE is synthetic; its rate is --requests-per-s",
        ),
        (
            ["{here}/trace.csv", "--turns-mean", "2"],
            "--turns-mean describes a synthetic workload, but TRACE is ",
        ),
        (["{here}/none.csv"], "none.csv: cannot be read: No such file or directory"),
        (["{here}/trace.csv"], "trace.csv:1: header (when, tokens_in, tokens_out) must be that of one of "),
        (["{here}/trace.csv", "--format", "azur"], "unknown trace format 'azur' (did you mean azure?)"),
        (["{here}/trace.csv", *COLUMNS, "--num-requests", "0"], "num_requests (0) must be at least 1"),
        (["--from-manifest", "{here}/none.json"], "none.json) cannot be read: No such file or directory"),
        (["--from-manifest", "{here}/trace.csv"], "trace.csv) is not one that a replay wrote: "),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    tmp_path: Path, trace_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [argument.format(here=tmp_path) for argument in arguments]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([*SMALL, "--out", ""], "out"),
        ([*SMALL, "--out="], "out"),
        (["", "--out", "out"], "trace"),
        ([*SMALL, "--out", "out", "--prometheus", ""], "prometheus"),
        ([*SMALL, "--out", "out", "--calibration", ""], "calibration"),
        (["--from-manifest", "", "--out", "out"], "from_manifest"),
    ],
)
def test_an_empty_path_is_not_the_working_directory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    rule = "must name a place: an empty path is the working directory"
    assert capsys.readouterr().err == f"error: {name} ('') {rule}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["trace", "out", "prometheus", "calibration", "policy"])
def test_a_name_that_is_no_text_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    value = os.fsdecode(b"r\xff")
    given = {"trace": "none.csv", "out": "out", field: value}
    if field != "policy":
        value = f"{tmp_path}/{value}"
        given = {name: f"{tmp_path}/{path}" for name, path in given.items()}
    trace = given.pop("trace")
    assert main([trace, *(f"--{name}={path}" for name, path in given.items())]) == 2
    shown = value.replace("\udcff", "\\udcff")
    assert capsys.readouterr().err == f"error: {field} ({shown}) must be UTF-8 text\n"
    assert list(tmp_path.iterdir()) == []


def test_nor_can_a_working_directory_be_anything_but_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    for trace, out, named in (
        ("none.csv", "/out", "trace (PATH/none.csv)"),
        ("synthetic", "out", "out (PATH/out)"),
    ):
        assert main([trace, "--out", out]) == 2
        named = named.replace("PATH", f"{tmp_path}/r\\udcff")
        assert capsys.readouterr().err == f"error: {named} must be UTF-8 text\n"


def test_a_bad_row_is_named_or_skipped(
    tmp_path: Path, trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = trace_file.read_text().splitlines()
    lines[4] = "0.8,-3,9"
    trace_file.write_text("\n".join(lines) + "\n")
    assert main([str(trace_file), *COLUMNS, "--out", str(tmp_path / "out")]) == 2
    assert "trace.csv:5: " in capsys.readouterr().err
    summary = replay([str(trace_file), *COLUMNS, "--skip-bad"], tmp_path / "out")
    assert summary["requests"] == 29
    assert "1 malformed rows skipped" in capsys.readouterr().out


def test_an_unwritable_folder_is_found_out_before_the_trace_is_read(
    tmp_path: Path, trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.csv"), "--out", str(trace_file / "below")]) == 2
    assert f"error: out ({trace_file / 'below'}) cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["t", "--tokens-per-blok", "2"],
            "unrecognized options: --tokens-per-blok, 2; perhaps you meant: --tokens-",
        ),
        (["t", "--seed", "1"], "unrecognized options: --seed, 1; perhaps you meant: --workload-seed INT ("),
        (["t", "u"], "unrecognized options: u ("),
        (
            ["t", "--max-batch-size", "x"],
            "--max-batch-size INT: invalid literal for int() with base 10: 'x' (",
        ),
        (
            ["t", "--num-requests", "x"],
            "--num-requests {None}|INT: no type matching {None}|INT could be instanti",
        ),
        (
            ["t", "--arrivals", "x"],
            "invalid choice 'x' for argument '--arrivals'. Expected one of ('gamma', 'on_off'",
        ),
        (["t", "--policy"], "missing value for argument '--policy'. Expected 1 values ("),
        ([], "missing from python -m sim.replay: TRACE ("),
    ],
)
@pytest.mark.parametrize("columns", ["50", "80", "200"])
def test_flags_that_are_not_understood_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    columns: str,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main([*arguments[:1], "--out", "o", *arguments[1:]]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {message}")
    assert said.endswith("(python -m sim.replay --help explains)")


def test_an_interrupt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sim.runner, "simulate", interrupted)
    assert main([*SMALL, "--out", str(tmp_path / "out")]) == 130
    said = capsys.readouterr()
    assert said.err == "interrupted: the result is not complete\n"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_publishing_leaves_no_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay(SMALL, tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    assert main([*SMALL, "--out", str(tmp_path), "--no-figures"]) == 130
    assert not (tmp_path / "summary.json").exists()
    assert [path for path in tmp_path.iterdir() if "unfinished" in path.name] == []


def test_a_rerun_replaces_the_earlier_result(tmp_path: Path) -> None:
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    summary = replay([*SMALL, "--num-requests", "30"], tmp_path)
    assert summary["requests"] == 30
    assert not list(tmp_path.glob("figures/*"))  # drawn of the earlier run: not beside the new summary
    with ResultFolder(tmp_path) as folder:
        assert folder.staging.is_dir()


# ------------------------------------------------------------------ public traces


def test_the_azure_code_trace(traces_dir: Path, tmp_path: Path) -> None:
    trace = str(traces_dir / "azure-llm-2023" / "AzureLLMInferenceTrace_code.csv")
    whole = replay([trace, "--max-seq-len", "16384"], tmp_path / "a")
    assert (whole["finished"], whole["rejected"]) == (8819, {})
    assert whole["internal_fragmentation"]["final"] == pytest.approx(0.0151, abs=0.0001)
    short = replay([trace], tmp_path / "b")
    assert (short["finished"], short["rejected"]) == (8819 - 3367, {"exceeds_max_seq_len": 3367})


@pytest.mark.parametrize("tokens_per_block", [16, 128, 512, 1024])
def test_the_mooncake_conversation_trace(traces_dir: Path, tmp_path: Path, tokens_per_block: int) -> None:
    trace = str(traces_dir / "mooncake-fast25" / "conversation_trace.jsonl")
    flags = [
        "--model",
        "llama-3-8b",
        "--gpu",
        "h100-80gb",
        "--max-seq-len",
        "131072",
        "--num-requests",
        "1000",
    ]
    summary = replay([trace, *flags, "--tokens-per-block", str(tokens_per_block)], tmp_path)
    assert summary["finished"] == 1000
    assert summary["hit_tokens"] > 0
