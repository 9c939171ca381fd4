"""Measure this machine's attention kernels and write the calibration that `sim.replay --calibration` reads.

    python -m experiments.tools.calibrate --model llama-3-8b --tokens-per-block 64 --out h100-llama-3-8b.json

Decode is timed over batch sizes and context lengths, prefill over chunk lengths and contexts, one layer at a time
through block tables that are scattered over the pool. The fit is linear, with coefficients that cannot be negative,
and weighs each point by its own time, so that what is minimised is the relative error. It takes a GPU. With
`--backend cpu`, the times are those of the CPU runner: good for trying the command out, and for nothing else.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import answer_interrupts

    answer_interrupts()

import datetime
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from allocator.checks import require_int
from allocator.config import MODEL_PRESETS, load_model
from experiments.tools._progress import progress
from kernels import ops
from kernels.compile import resolve_backend
from kernels.layout import CacheLayout
from sim.calibration import Calibration
from sim.command_line import parse_dataclass, require_writable, run_command
from sim.cost import causal_scores

_MOST_POOL_BYTES = 1 << 33
"""Beyond this, points are left out: 8 GiB of one layer's cache is more than any cache memory holds."""


@dataclass(frozen=True)
class Config:
    """Measure attention on this machine, and fit the simulator's attention term to it."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Calibration file to write."""
    model: Annotated[
        str,
        tyro.conf.arg(
            help=f"Model whose heads are measured: {', '.join(MODEL_PRESETS)}, or the path of a "
            "Hugging Face config.json."
        ),
    ] = "llama-3-8b"
    tensor_parallel_size: int = 1
    """GPUs that share the heads."""
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    """Type of queries, keys and values."""
    tokens_per_block: int = 64
    """Tokens of a block, a power of two up to 256."""
    backend: Literal["gpu", "cpu"] = "gpu"
    """Where the kernels run: a calibration is of a GPU. cpu, the CPU runner, is for trying the command out, with few
    and small points: those that are measured unless you say otherwise would take it days."""
    sequences: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Batch sizes of decoding."""
    contexts: tuple[int, ...] = (128, 512, 2048, 8192, 32768)
    """Context lengths of each decoding sequence, and before each prefill chunk."""
    chunks: tuple[int, ...] = (128, 512, 2048, 8192)
    """Lengths of prefill chunks."""
    repeats: int = 20
    """Launches of each point; their median counts."""


@dataclass(frozen=True)
class Heads:
    """What one GPU has of a model's attention."""

    query: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Point:
    """One measurement: `sequences` queries of decoding with `keys` keys in all, or a chunk of `new` tokens."""

    kind: str
    sequences: int
    new: int
    context: int
    """Keys of each sequence; of a chunk, those of its last token."""
    us: float

    def features(self) -> tuple[float, float, float]:
        """Return what the coefficients multiply, see sim.calibration.Calibration."""
        if self.kind == "decode":
            return 1.0, float(self.sequences), float(self.sequences * self.context)
        pairs, keys = causal_scores(self.new, self.context)
        return 1.0, float(pairs), float(keys)


def fit_linear(points: Sequence[Point]) -> tuple[NDArray[np.float64], float]:
    """Return the three coefficients, none negative, of least squared relative error, and its mean.

    Non-negative least squares by trying every set of coefficients that may be zero: there are only seven.
    """
    rows = np.array([point.features() for point in points])
    times = np.array([point.us for point in points])
    weighted = rows / times[:, None]
    best: tuple[float, NDArray[np.float64]] | None = None
    for size in (1, 2, 3):
        for chosen in map(list, itertools.combinations(range(3), size)):
            found, *_ = np.linalg.lstsq(weighted[:, chosen], np.ones(len(times)), rcond=None)
            if (found < 0).any():
                continue
            coefficients = np.zeros(3)
            coefficients[chosen] = found
            error = float(((weighted @ coefficients - 1) ** 2).sum())
            if best is None or error < best[0]:
                best = error, coefficients
    assert best is not None, "a single coefficient of positive features is never negative"
    return best[1], float(np.abs(weighted @ best[1] - 1).mean())


class Stopwatch:
    """Times launches on the backend, in microseconds."""

    def __init__(self, backend: str, repeats: int) -> None:
        self._backend = backend
        self._repeats = repeats

    def __call__(self, launch: Callable[[], object]) -> float:
        """Return the median time of a launch; the first one, which compiles, does not count."""
        launch()
        if self._backend == "cpu":
            times = []
            for _ in range(self._repeats):
                start = perf_counter()
                launch()
                times.append((perf_counter() - start) * 1e6)
            return median(times)
        import cupy  # a GPU is optional

        events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(self._repeats)]
        for begin, end in events:
            begin.record()
            launch()
            end.record()
        cupy.cuda.Device().synchronize()
        return float(median(cupy.cuda.get_elapsed_time(begin, end) * 1e3 for begin, end in events))


class Bench:
    """The arrays of one layer's attention, as large as the largest point needs."""

    def __init__(self, heads: Heads, config: Config, backend: str) -> None:
        self.layout = CacheLayout(config.dtype, 1, heads.kv, heads.dim, config.tokens_per_block)
        self._heads = heads
        self._backend = backend
        self._rng = np.random.default_rng(0)

    def fits(self, keys: int) -> bool:
        """Return whether a point with so many keys in all is to be measured."""
        return keys * self.layout.bytes_per_token <= _MOST_POOL_BYTES

    def launcher(self, sequences: int, new: int, context: int) -> Callable[[], object]:
        """Return what launches attention once: a decode step of `sequences`, or one chunk of `new` tokens."""
        size = self.layout.tokens_per_block
        blocks = -(-context // size)
        pool = self.layout.empty_pool(sequences * blocks, self._backend)
        pool[...] = 0
        tables = self._rng.permutation(sequences * blocks).astype(np.int32).reshape(sequences, blocks)
        lengths = np.full(sequences, context, np.int32)
        tokens = new or sequences
        query = np.zeros((tokens, self._heads.query, self._heads.dim), self.layout.array_dtype(self._backend))
        block_tables, context_lens, queries = map(self._on_device, (tables, lengths, query))
        if not new:
            return lambda: ops.paged_attention(self.layout, pool, 0, queries, block_tables, context_lens)
        starts = self._on_device(np.array([0, new], np.int32))
        return lambda: ops.paged_prefill(self.layout, pool, 0, queries, starts, block_tables, context_lens)

    def _on_device(self, array: NDArray[Any]) -> Any:
        if self._backend == "cpu":
            return array
        import cupy  # a GPU is optional

        return cupy.asarray(array)


def measure(
    config: Config, heads: Heads, backend: str, time: Callable[[Callable[[], object]], float] | None = None
) -> list[Point]:
    """Return the time of every point that fits, decode first. `time` replaces the stopwatch."""
    bench = Bench(heads, config, backend)
    time = time or Stopwatch(backend, config.repeats)
    wanted = [("decode", n, 0, c) for n in config.sequences for c in config.contexts]
    wanted += [("prefill", 1, n, n + before) for n in config.chunks for before in (0, *config.contexts)]
    wanted = [point for point in wanted if bench.fits(point[1] * point[3])]
    points: list[Point] = []
    with progress("measuring", len(wanted), "points") as tell:
        for kind, sequences, new, context in wanted:
            of = f"{sequences:,} × {context:,} keys" if not new else f"{new:,} tokens, {context:,} keys"
            tell(len(points), f"{kind} of {of}")
            points.append(Point(kind, sequences, new, context, time(bench.launcher(sequences, new, context))))
    return points


def calibrate(config: Config, points: Sequence[Point], heads: Heads, device: str, driver: str) -> Calibration:
    """Return the fit. Raises ValueError if there are too few points of a kind."""
    by_kind = {kind: [point for point in points if point.kind == kind] for kind in ("decode", "prefill")}
    for kind, found in by_kind.items():
        if len(found) < 3:
            raise ValueError(f"{kind} points ({len(found)}) must be at least 3 for 3 coefficients")
    decode, decode_error = fit_linear(by_kind["decode"])
    prefill, prefill_error = fit_linear(by_kind["prefill"])
    return Calibration(
        device,
        driver,
        datetime.date.today().isoformat(),
        config.dtype,
        heads.query,
        heads.kv,
        heads.dim,
        config.tokens_per_block,
        *map(float, decode),
        *map(float, prefill),
        decode_error,
        prefill_error,
    )


def device_name(backend: str) -> tuple[str, str]:
    """Return the name of the device and the version of its driver."""
    if backend == "cpu":
        return "CPU runner", "none"
    import cupy  # a GPU is optional

    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(0)["name"].decode()
    version = runtime.driverGetVersion()
    return name, f"{version // 1000}.{version % 1000 // 10}"


def run(config: Config, console: Console) -> Calibration:
    """Measure, fit, write, and print the fit."""
    require_int("repeats", config.repeats, 1)
    for name in ("sequences", "contexts", "chunks"):
        for value in getattr(config, name):
            require_int(name, value, 1)
    model = load_model(config.model)
    heads = Heads(
        model.num_heads // config.tensor_parallel_size,
        model.kv_heads_per_gpu(config.tensor_parallel_size),
        model.head_dim,
    )
    require_writable("out", config.out)
    try:
        backend = resolve_backend(config.backend)
    except RuntimeError as error:
        rule = "a calibration is measured on a GPU (--backend cpu tries the command out, on the CPU runner)"
        raise ValueError(f"{error}; {rule}") from None
    try:
        points = measure(config, heads, backend)
    except RuntimeError as error:  # no compiler, or no CUDA headers
        raise ValueError(str(error)) from None
    device, driver = device_name(backend)
    fit = calibrate(config, points, heads, device, driver)
    measured = [{**vars(point)} for point in points]
    config.out.write_text(fit.document(measured), encoding="utf-8")
    console.print(
        f"{device}: decode {fit.decode_base_us:.2f} µs + {fit.decode_sequence_us:.4f} a sequence + "
        f"{fit.decode_key_us:.3e} a key (mean error {fit.decode_error:.1%});\n"
        f"prefill {fit.prefill_base_us:.2f} µs + {fit.prefill_pair_us:.3e} a query and key + "
        f"{fit.prefill_key_us:.3e} a key (mean error {fit.prefill_error:.1%}).\n"
        f"{len(points)} points, one layer of {model.name}; written to {config.out}",
        highlight=False,
    )
    return fit


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(
        lambda: run(parse_dataclass(Config, "python -m experiments.tools.calibrate", given), Console())
    )


if __name__ == "__main__":
    sys.exit(main())
