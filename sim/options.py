"""The command line of a replay: every flag with its unit and default, and the RunSpec that it stands for."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from allocator.config import MODEL_PRESETS, BuildConfig, CacheConfig, load_model
from sim.calibration import Calibration
from sim.cluster.config import ClusterConfig
from sim.command_line import empty_path, option_value, parse_dataclass, require_utf8
from sim.hardware import GPU_PRESETS, GPUSpec
from sim.manifest import SYNTHETIC, Manifest, RunSpec, TraceSource
from sim.scheduler.config import EngineConfig
from sim.scheduler.retention import RetentionOptions
from sim.timing import TimingConfig
from sim.traces.reading import ReadOptions
from sim.workload import WorkloadShape


@dataclass(frozen=True)
class TimingOptions:
    """How long a step takes."""

    cost: str = "roofline"
    """Model of a step's duration: roofline, distserve or dynamo (published fits, whatever the model and GPU), or
    package.module:Class, a sim.cost.StepCost made with one argument (sim.timing.Setting)."""
    calibration: Path | None = None
    """File of measured attention times (experiments.tools.calibrate writes it), in place of the roofline's."""

    def resolve(self, known: TimingConfig | None) -> TimingConfig:
        """Return the TimingConfig; `known` has the calibration of a manifest. Raises ValueError for a bad one."""
        if self.calibration is not None:
            return TimingConfig(self.cost, Calibration.read(self.calibration))
        same = known is not None and known.cost == self.cost
        return TimingConfig(self.cost, known.calibration if known is not None and same else None)


@dataclass(frozen=True)
class GPUOptions:
    """The GPU: a preset, and figures to use instead of the preset's (or all of them, for a GPU of another name)."""

    gpu: Annotated[
        str,
        tyro.conf.arg(
            help=f"Preset: {', '.join(GPU_PRESETS)}. Any other name needs the first six figures below."
        ),
    ] = "a100-80gb"
    tflops: float | None = None
    """Peak dense 16-bit compute, TFLOP/s; None for the preset's figure, as below."""
    bandwidth_tb_s: float | None = None
    """Peak memory bandwidth, TB/s."""
    memory_gib: float | None = None
    """Memory, GiB."""
    mfu: float | None = None
    """Share of tflops that matrix multiplications reach."""
    mbu: float | None = None
    """Share of bandwidth_tb_s that kernels reach."""
    link_gb_s: float | None = None
    """Peak bandwidth of the link to the host, GB/s."""
    link_efficiency: float | None = None
    """Share of link_gb_s that transfers reach."""
    layer_overhead_us: float | None = None
    """Time a layer takes beyond its roofline, microseconds."""

    def resolve(self) -> GPUSpec:
        """Return the GPUSpec. Raises ValueError for an unknown name or an impossible figure."""
        given = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.name != "gpu" and getattr(self, each.name) is not None
        }
        if self.gpu.lower() not in GPU_PRESETS:
            required = [
                each.name
                for each in dataclasses.fields(GPUSpec)
                if each.default is dataclasses.MISSING and each.name != "gpu_name"
            ]
            missing = [name for name in required if name not in given]
            if not missing:
                return GPUSpec(gpu_name=self.gpu, **given)
            if given:
                raise ValueError(f"gpu ({self.gpu}) is no preset and needs {', '.join(missing)}")
        return dataclasses.replace(GPUSpec.preset(self.gpu), **given)

    @classmethod
    def of(cls, spec: GPUSpec) -> GPUOptions:
        """Return the options that resolve to `spec`."""
        preset = GPU_PRESETS.get(spec.gpu_name)
        figures = {
            each.name: getattr(spec, each.name)
            for each in dataclasses.fields(cls)
            if each.name != "gpu"
            and (preset is None or getattr(spec, each.name) != getattr(preset, each.name))
        }
        return cls(gpu=spec.gpu_name, **figures)


@dataclass(frozen=True)
class Replay:
    """Replay a request trace through a simulated serving engine with a paged KV cache.

    TRACE is a file (Azure CSV, BurstGPT CSV, Mooncake or Bailian JSONL, JSONL with token ids, any CSV with
    --columns, native Parquet), or `synthetic` for a workload drawn from the workload options.
    """

    trace: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRACE")]
    """Trace file, or `synthetic`."""
    out: Path
    """Folder for the results; an earlier result there is replaced."""
    from_manifest: Path | None = None
    """Rerun what this manifest.json describes; flags given beside it change that. TRACE may be left out."""
    model: Annotated[
        str,
        tyro.conf.arg(help=f"Model: {', '.join(MODEL_PRESETS)}, or the path of a Hugging Face config.json."),
    ] = "llama-2-7b"
    figures: bool = True
    """Draw figures/*.png and *.svg."""
    perfetto: bool = False
    """Write timeline.perfetto-trace: requests, pool and preemptions over time, to open in https://ui.perfetto.dev."""
    prometheus: Path | None = None
    """File for the final counters in Prometheus' text format, under the names of vLLM's /metrics."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    """How a trace file is read, and which part of it. Of a synthetic workload, too, --num-requests are replayed,
    1,000 unless said otherwise."""
    build: BuildConfig = field(default_factory=BuildConfig)
    """What is fixed when an engine is built."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """How the KV cache is stored, sized and reused."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How requests are admitted, batched and preempted, and the service level they are held to."""
    retention: RetentionOptions = field(default_factory=RetentionOptions)
    """How dearly blocks are to be kept once nobody references them, by priorities from 0, the first to go, to 100, with
    --policy priority. Blocks of which nothing is said have 35."""
    hardware: GPUOptions = field(default_factory=GPUOptions)
    """The GPU: a preset, and figures in place of the preset's (or all of them, for a GPU of another name)."""
    timing: TimingOptions = field(default_factory=TimingOptions)
    """How long a step takes."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """How many engines serve the trace, and which request goes to which."""
    workload: WorkloadShape = field(default_factory=WorkloadShape)
    """What a synthetic workload is drawn from, with TRACE `synthetic`: sessions arrive at random, begin with a
    shared system prompt if there are any, and go on for some turns, each prompt holding all that was said."""

    @classmethod
    def of(cls, spec: RunSpec, out: Path, from_manifest: Path) -> Replay:
        """Return the command line that describes `spec`."""
        workload, reading = spec.trace.workload, spec.trace.reading
        if workload is not None:
            reading = ReadOptions(num_requests=workload.num_requests)
        return cls(
            trace=spec.trace.path,
            out=out,
            from_manifest=from_manifest,
            model=spec.model.name,
            reading=reading,
            build=spec.build,
            cache=spec.cache,
            engine=spec.engine,
            hardware=GPUOptions.of(spec.gpu),
            timing=TimingOptions(spec.timing.cost),
            cluster=spec.cluster,
            retention=spec.retention,
            workload=WorkloadShape() if workload is None else workload.shape,
        )

    def spec(self, known: RunSpec | None) -> RunSpec:
        """Return what to run; `known` is what a manifest described, for what no flag can say.

        Raises ValueError for options that do not go together or name nothing.
        """
        cluster = self.cluster
        if cluster.kv_link_gb_s is not None and not cluster.prefill_replicas:
            raise ValueError(
                f"kv_link_gb_s ({cluster.kv_link_gb_s}) needs prefill_replicas: nothing else is sent over the link"
            )
        self.retention.check(self.build, self.cache, has_host=self.cache.host_cache_bytes > 0)
        model = known.model if known and known.model.name == self.model else load_model(self.model)
        timing = self.timing.resolve(known.timing if known else None)
        return RunSpec(
            self._source(),
            model,
            self.hardware.resolve(),
            self.build,
            self.cache,
            self.engine,
            timing,
            cluster,
            self.retention,
        )

    def _source(self) -> TraceSource:
        if self.trace != SYNTHETIC:
            if given := _changed(self.workload, WorkloadShape()):
                raise ValueError(f"{given} describes a synthetic workload, but TRACE is {self.trace}")
            if not self.trace:
                raise empty_path("trace")
            require_utf8("trace", Path(self.trace))
            return TraceSource(os.path.abspath(self.trace), self.reading)
        count = self.reading.num_requests
        if given := _changed(self.reading, ReadOptions(num_requests=count)):
            instead = "; its rate is --requests-per-s" if given == "--rate" else ""
            raise ValueError(f"{given} needs a trace file: TRACE is {SYNTHETIC}{instead}")
        return TraceSource(SYNTHETIC, workload=self.workload.of(count))


def _changed(options: ReadOptions | WorkloadShape, default: ReadOptions | WorkloadShape) -> str | None:
    """Return the first flag whose value is not its default."""
    for each in dataclasses.fields(options):
        if getattr(options, each.name) != getattr(default, each.name):
            return "--" + each.name.replace("_", "-")
    return None


def parse(arguments: list[str]) -> tuple[Replay, Manifest | None]:
    """Parse the command line; with --from-manifest, its settings are the defaults of all other flags.

    Raises ValueError for a bad manifest or value; exits with 2 for an unknown or ill-typed flag.
    """
    path = option_value(arguments, "--from-manifest")
    if path is None:
        return parse_dataclass(Replay, "python -m sim.replay", arguments), None
    if not path:
        raise empty_path("from_manifest")
    manifest = Manifest.read(Path(path))
    default = Replay.of(manifest.spec, out=tyro.MISSING, from_manifest=Path(path))
    return parse_dataclass(Replay, "python -m sim.replay", arguments, default), manifest
