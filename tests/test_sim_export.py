"""The result folder: deterministic bytes, whole or visibly not, and manifests that read back."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_cases import NaiveEngine, results

from allocator.config import BuildConfig, CacheConfig, ModelSpec
from sim import manifest
from sim.export import MANIFEST, REQUESTS, SUMMARY, TIMELINE, ResultFolder, write_columns, write_json
from sim.hardware import GPUSpec
from sim.manifest import Manifest, RunSpec, TraceSource, git_revision
from sim.records import RunResult
from sim.scheduler.config import EngineConfig
from sim.traces.reading import ReadOptions
from sim.workload import WorkloadConfig


def leave(folder: ResultFolder, result: RunResult, mark: str) -> list[Path]:
    """Write a small whole result."""
    folder.write_tables(result)
    (folder.staging / "figures").mkdir()
    (folder.staging / "figures" / "latency.png").write_text(mark)
    folder.write_manifest({"mark": mark})
    folder.write_summary({"mark": mark})
    return folder.publish()


def abandon(path: Path, error: type[BaseException]) -> None:
    """Write most of a result, then fail."""
    with ResultFolder(path) as folder:
        folder.write_tables(NaiveEngine(3, 9).run())
        folder.write_summary({"mark": "abandoned"})
        raise error


def tree(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


WHOLE = sorted([MANIFEST, SUMMARY, REQUESTS, TIMELINE, "figures", "figures/latency.png"])


# ------------------------------------------------------------------ tables and JSON


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with ResultFolder(tmp_path / name) as folder:
            leave(folder, NaiveEngine(2, 30).run(), "x")
    for name in (REQUESTS, TIMELINE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Another process, with other hash seeds and one polars thread, writes the same file."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from result_cases import NaiveEngine\n"
        "from sim.export import write_columns\n"
        "write_columns(NaiveEngine(2, 30).run().requests, Path(sys.argv[2]))\n"
    )
    write_columns(NaiveEngine(2, 30).run().requests, tmp_path / "here")
    root = Path(manifest.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "there")],
        check=True,
        env={"PYTHONPATH": str(root), "PYTHONHASHSEED": "7", "POLARS_MAX_THREADS": "1"},
    )
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


@given(result=results())
def test_tables_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, result: RunResult) -> None:
    path = tmp_path_factory.mktemp("tables") / "requests.parquet"
    for columns in (result.requests, result.timeline):
        write_columns(columns, path)
        frame = pl.read_parquet(path)
        assert frame.columns == list(columns)
        for name, column in columns.items():
            assert frame[name].to_list() == column.tolist()


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json({"x": float("nan")}, tmp_path / "x.json")


# ------------------------------------------------------------------ whole or visibly not


def test_a_published_folder_holds_what_was_staged_and_no_more(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    with ResultFolder(out) as folder:
        assert not (out / SUMMARY).exists()
        paths = leave(folder, NaiveEngine(2, 3).run(), "x")
    assert tree(out) == WHOLE
    assert paths[-1] == out / SUMMARY
    assert set(paths) == {out / name for name in WHOLE if name != "figures"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        abandon(tmp_path / "new" / "deep", error)
    assert tree(tmp_path) == []


def test_an_interrupted_run_leaves_the_earlier_result_whole(tmp_path: Path) -> None:
    with ResultFolder(tmp_path) as folder:
        leave(folder, NaiveEngine(2, 3).run(), "first")
    before = {name: (tmp_path / name).read_bytes() for name in WHOLE if name != "figures"}
    with pytest.raises(KeyboardInterrupt):
        abandon(tmp_path, KeyboardInterrupt)
    assert tree(tmp_path) == WHOLE
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_interrupting_the_publication_leaves_no_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the moving of files stops, there is a summary only if all has been moved."""
    import os

    real = os.replace
    for stop_after in range(5):
        with ResultFolder(tmp_path) as folder:
            leave(folder, NaiveEngine(2, 3).run(), "first")
        moved = 0

        def replace(source: Path, target: Path, stop: int = stop_after) -> None:
            nonlocal moved
            if moved == stop:
                raise KeyboardInterrupt
            moved += 1
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt), ResultFolder(tmp_path) as folder:
                leave(folder, NaiveEngine(3, 9).run(), "second")
        assert not (tmp_path / SUMMARY).exists(), stop_after
        assert not [name for name in tree(tmp_path) if "unfinished" in name]


def test_overwriting_replaces_own_files_and_keeps_others(tmp_path: Path) -> None:
    with ResultFolder(tmp_path) as folder:
        leave(folder, NaiveEngine(2, 3).run(), "first")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures" / "block_map.svg").write_text("of the first run")
    (tmp_path / "figures" / "sketch.svg").write_text("mine")
    with ResultFolder(tmp_path) as folder:
        leave(folder, NaiveEngine(2, 3).run(), "second")
    assert tree(tmp_path) == sorted([*WHOLE, "notes.txt", "figures/sketch.svg"])
    assert json.loads((tmp_path / SUMMARY).read_text()) == {"mark": "second"}
    assert (tmp_path / "figures" / "latency.png").read_text() == "second"


def test_a_place_that_cannot_be_written_is_found_out_on_entering(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    for path in (blocker, blocker / "below"):
        with pytest.raises(ValueError, match=r"out \(.*file.*\) cannot be written: "), ResultFolder(path):
            pytest.fail("entered")
    assert tree(tmp_path) == ["file"]


@pytest.mark.parametrize("name", [SUMMARY, MANIFEST, REQUESTS, TIMELINE, "figures/latency.png"])
def test_a_folder_in_place_of_a_file_is_found_out_on_entering(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot be written: .*{name} is a folder"), ResultFolder(tmp_path):
        pytest.fail("entered")
    assert tree(tmp_path) == before


def test_a_file_in_place_of_the_figures_is_found_out_on_entering(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("mine")
    with pytest.raises(ValueError, match=r"figures must be a folder or absent"), ResultFolder(tmp_path):
        pytest.fail("entered")


def test_only_the_files_to_be_written_have_to_be_replaceable(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with ResultFolder(tmp_path, (SUMMARY,)) as folder:
        folder.write_summary({})
        folder.publish()
    assert tree(tmp_path) == sorted([MANIFEST, SUMMARY])


def test_two_runs_cannot_write_one_folder_at_once(tmp_path: Path) -> None:
    with ResultFolder(tmp_path) as folder:
        refused = pytest.raises(ValueError, match=r"out \(.*\) is being written by another run")
        with refused, ResultFolder(tmp_path):
            pytest.fail("entered")
        leave(folder, NaiveEngine(2, 3).run(), "first")
        with pytest.raises(ValueError, match="another run"), ResultFolder(tmp_path):
            pytest.fail("entered between publishing and leaving")
    assert tree(tmp_path) == WHOLE
    with ResultFolder(tmp_path) as folder:
        leave(folder, NaiveEngine(2, 3).run(), "second")


def test_a_killed_run_leaves_no_lock_and_its_staging_folder_goes_with_the_next(tmp_path: Path) -> None:
    script = "import os, sys; from pathlib import Path; from sim.export import ResultFolder\n"
    script += "ResultFolder(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    (left,) = tmp_path.iterdir()
    (left / "part").write_text("of a table")
    (tmp_path / ".unfinished-notes").write_text("a file of somebody's")
    with ResultFolder(tmp_path) as folder:
        assert folder.staging.is_dir()
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished-notes"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to write to")
def test_a_table_that_cannot_be_written_is_an_error_of_its_file() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_columns({"column": np.arange(10)}, Path("/dev/full"))
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_told_with_the_folder(tmp_path: Path, named: bool) -> None:
    out = tmp_path / "out"

    def fill() -> None:
        with ResultFolder(out) as folder:
            raise OSError(28, "No space left on device", *([str(folder.staging / REQUESTS)] if named else []))

    with pytest.raises(ValueError, match="out") as caught:
        fill()
    assert str(caught.value) == f"out ({out}) cannot be written: No space left on device"
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), FileNotFoundError(2, "No such file", "elsewhere")]
)
def test_an_error_of_something_else_is_not_the_folders(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(type(error)) as caught, ResultFolder(tmp_path):
        raise error
    assert caught.value is error


# ------------------------------------------------------------------ manifests

SPEC = RunSpec(
    trace=TraceSource(
        "/data/trace.csv",
        ReadOptions(columns="arrival=a,prompt=p,output=o", num_requests=7, time_scale=0.1, end_s=7.5),
    ),
    model=dataclasses.replace(ModelSpec.preset("mistral-7b"), layer_windows=(4096, None) * 16),
    gpu=GPUSpec.preset("h200"),
    build=BuildConfig(tokens_per_block=16),
    cache=CacheConfig(num_blocks=1234, policy="fifo"),
    engine=EngineConfig(admission="max_utilization", watermark=0.05),
)
DOCUMENT = {"num_requests": 7, "skipped_rows": 0, "budget": {}}


@given(
    st.sampled_from([None, 3]),
    st.floats(0.01, 1),
    st.sampled_from([None, WorkloadConfig(workload_seed=5, session_tokens_max=40_000)]),
)
def test_a_manifest_reads_back_as_the_spec_it_was_made_from(
    tmp_path_factory: pytest.TempPathFactory, count: int | None, share: float, workload: WorkloadConfig | None
) -> None:
    path = tmp_path_factory.mktemp("manifest") / MANIFEST
    spec = dataclasses.replace(
        SPEC,
        trace=TraceSource("synthetic", workload=workload)
        if workload
        else dataclasses.replace(SPEC.trace, reading=ReadOptions(num_requests=count, rate=share)),
        engine=EngineConfig(watermark=share / 2, slo_ttft_s=share),
    )
    document = Manifest(spec, "ab" * 32).document(**DOCUMENT)
    assert document["seed"] == (workload and 5)
    write_json(document, path)
    assert Manifest.read(path) == Manifest(spec, "ab" * 32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:50], "is not one that a replay wrote: "),
        (lambda text: "[]", "is not one that a replay wrote: "),
        (lambda text: "{}", "config is missing"),
        (
            lambda text: text.replace('"tokens_per_block": 16', '"tokens_per_block": 48'),
            r"\(48\) must be a power",
        ),
        (lambda text: text.replace('"tokens_per_block"', '"page_size"'), "config.build.page_size is unknown"),
        (lambda text: text.replace('"watermark": 0.05,', ""), "config.engine.watermark is missing"),
    ],
)
def test_a_spoiled_manifest_is_refused_in_one_line(tmp_path: Path, spoil: object, message: str) -> None:
    path = tmp_path / MANIFEST
    write_json(Manifest(SPEC, "00").document(**DOCUMENT), path)
    path.write_text(spoil(path.read_text()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def changed(document: dict, where: str, value: object) -> dict:
    *path, last = where.split(".")
    inner = document
    for name in path:
        inner = inner[name]
    assert last in inner
    inner[last] = value
    return document


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("config", None, "config (null) must be an object"),
        ("config.model", None, "config.model (null) must be an object"),
        ("config.gpu", None, "config.gpu (null) must be an object"),
        ("config.gpu.gpu_name", 5, "config.gpu.gpu_name (5) must be a text"),
        ("config.gpu.tflops", "312", 'config.gpu.tflops ("312") must be a number'),
        ("config.gpu.mfu", True, "config.gpu.mfu (true) must be a number"),
        ("config.cache.policy", 5, "config.cache.policy (5) must be a text"),
        ("config.cache.num_blocks", 1e40, "config.cache.num_blocks (1e+40) must be an integer"),
        ("config.cache.num_blocks", 10**20, f"num_blocks ({10**20}) must be at most 2147483647"),
        (
            "config.cache.enable_block_reuse",
            "no",
            'config.cache.enable_block_reuse ("no") must be true or false',
        ),
        ("config.cache.enable_block_reuse", 1, "config.cache.enable_block_reuse (1) must be true or false"),
        ("config.cache.kv_dtype", ["int8"], 'config.cache.kv_dtype (["int8"]) must be a text'),
        ("config.build.max_batch_size", None, "config.build.max_batch_size (null) must be an integer"),
        (
            "config.engine.admission",
            "foo",
            'config.engine.admission ("foo") must be one of guaranteed_no_evict, max_utilization',
        ),
        (
            "config.engine.block_map_samples",
            1.5,
            "config.engine.block_map_samples (1.5) must be an integer",
        ),
        ("config.engine.slo_ttft_s", float("inf"), "slo_ttft_s (inf) must be above 0 and at most 1e+06"),
        ("config.engine.watermark", [0.1] * 99, "config.engine.watermark ([0.1, 0.1, "),
        ("config.model.layer_windows", 5, "config.model.layer_windows (5) must be a list"),
        ("config.model.layer_windows", [1, "2"], 'config.model.layer_windows[1] ("2") must be an integer'),
        (
            "config.trace.path",
            "synthetic",
            "workload (null) must be given where the trace's path is 'synthetic'",
        ),
        ("config.trace.workload", [], "config.trace.workload ([]) must be an object"),
        ("trace", None, "trace must be an object"),
        ("trace.sha256", None, "trace.sha256 (null) must be a text"),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_the_rule(
    tmp_path: Path, where: str, value: object, message: str
) -> None:
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(changed(Manifest(SPEC, "00").document(**DOCUMENT), where, value)))
    with pytest.raises(ValueError, match=f"is not one that a replay wrote: {re.escape(message)}") as caught:
        Manifest.read(path)
    assert "\n" not in str(caught.value)


def test_a_manifest_nested_without_end_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"is not one that a replay wrote: nested too deeply$"):
        Manifest.read(path)


def test_a_workload_is_of_no_trace_file() -> None:
    with pytest.raises(ValueError, match=r"^path \(t.csv\) must be 'synthetic' where there is a workload$"):
        TraceSource("t.csv", workload=WorkloadConfig())


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest \(.*none.json\) cannot be read: No such file"):
        Manifest.read(tmp_path / "none.json")


def test_the_revision_is_the_checkouts_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = git_revision()
    assert found is None or len(found.removesuffix("-dirty")) == 40
    # A copy in a folder that git does not track has no revision, even inside a repository.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(manifest, "source_file", lambda: tmp_path / "build_info.py")
    assert git_revision() is None


def test_versions_are_texts_or_none() -> None:
    found = manifest.versions()
    assert found["numpy"] == np.__version__
    assert all(value is None or isinstance(value, str) for value in found.values())
