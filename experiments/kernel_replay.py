"""Do the kernels compute the right attention through the block tables that a real schedule produces?

A trace is replayed through scheduler and allocator, and every step is executed by the CUDA kernels, on the CPU or on
a GPU: copies first, then the writes of new keys and values, then attention, at a model size reduced to a few heads.
Queries, keys and values are drawn from each token's own history, so that a wrong block, slot or offset, a stale
reuse or a missed copy changes the answer; every output is compared with attention computed in float64 from that
history alone.

Without a trace, a synthetic workload is run that makes everything happen: prompts shared and computed in chunks,
several samples of a prompt, and a pool so small that sequences are preempted. A trace's lengths are divided by
--shrink, its content chunks and times too, so that what was shared stays shared and requests still meet.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import begin_command

    begin_command(__spec__)

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from allocator.config import BuildConfig, CacheConfig, load_model
from experiments._kernel_step import KernelStep, Tally, WrongOutputError
from kernels.compile import resolve_backend
from kernels.layout import CacheLayout
from sim.command_line import parse_dataclass, run_command
from sim.cost import RooflineCost
from sim.engine import simulate
from sim.hardware import GPU_PRESETS
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.traces import read_trace
from sim.workload import WorkloadConfig, generate


@dataclass(frozen=True)
class Config:
    """Execute a replayed schedule with the CUDA kernels and check every attention output."""

    trace: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[TRACE]")] = None
    """Request trace, in any format that sim.traces reads; a synthetic workload if left out."""
    num_requests: int = 60
    """Requests to replay: the first so many."""
    shrink: int = 64
    """Divide a trace's lengths, content chunks and times by this."""
    backend: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the kernels run; auto takes a GPU if there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of queries, keys and values. In float32 the allowed error is smallest."""
    layers: int = 2
    """Layers of the reduced model."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """KV heads."""
    head_dim: int = 64
    """Head dimension: 64, 80, 96, 128 or 256."""
    tokens_per_block: int = 8
    """Tokens of a block, a power of two up to 256."""
    num_blocks: int | None = None
    """Blocks of the pool; by default so few that sequences are preempted."""
    max_batch_size: int = 16
    """Most sequences that run at once."""
    max_num_tokens: int = 64
    """Most tokens of a step: longer prompts are computed in chunks."""
    seed: int = 0
    """Seed of the synthetic workload."""


@dataclass(frozen=True)
class Outcome:
    """What a kernel replay did."""

    backend: str
    tally: Tally
    result: RunResult

    @property
    def last_line(self) -> str:
        """Return the verdict, in one line."""
        tally = self.tally
        return f"kernels: {tally.outputs:,} outputs checked on {self.backend}, worst error {tally.worst_error:.1e}"


def workload(config: Config) -> list[Request]:
    """Return the requests of the synthetic workload: short, shared, sampled several times, all at once."""
    drawn = WorkloadConfig(
        num_requests=config.num_requests,
        workload_seed=config.seed,
        requests_per_s=200.0,
        user_tokens_mean=40,
        user_tokens_min=4,
        user_tokens_max=160,
        output_tokens_mean=16,
        output_tokens_max=64,
        system_prompts=2,
        system_prompt_tokens=44,
        turns_mean=1.5,
        turns_max=3,
        think_s_mean=0.05,
        sampling_share=0.25,
        samples_per_request=3,
        content_tokens_per_chunk=4,
    )
    return list(generate(drawn))


def shrunk(request: Request, factor: int) -> Request:
    """Return a request `factor` times shorter that shares its prefixes as the original does.

    Chunk ids stay and stand for fewer tokens; of token ids, every factor-th stays. Time passes faster by the same
    factor, so that as many requests meet.
    """
    if factor == 1:
        return request
    prompt, output = (max(1, n // factor) for n in (request.prompt_tokens, request.output_tokens))
    changes: dict[str, object] = {
        "arrival_ps": request.arrival_ps // factor,
        "think_ps": request.think_ps // factor,
        "prompt_tokens": prompt,
        "output_tokens": output,
    }
    if request.chunk_ids is not None:
        granularity = max(1, request.granularity // factor)
        prompt = min(prompt, request.named_tokens * granularity // request.granularity or 1)
        chunks = request.chunk_ids[: -(-prompt // granularity)]
        changes.update(chunk_ids=chunks, granularity=granularity, named_tokens=prompt, prompt_tokens=prompt)
    elif request.token_ids is not None:
        changes.update(token_ids=request.token_ids[::factor][:prompt].copy(), named_tokens=prompt)
    return replace(request, **changes)  # type: ignore[arg-type]


_MOST = {"layers": 1024, "heads": 1024, "kv_heads": 1024}
_MOST_POOL_BYTES = 1 << 34


def _check(config: Config) -> None:
    for name in ("num_requests", "shrink", "layers", "heads", "kv_heads", "num_blocks"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    for name, most in _MOST.items():
        if getattr(config, name) > most:
            raise ValueError(
                f"{name} ({getattr(config, name)}) must be at most {most}: the model is a reduced one"
            )


def run(config: Config) -> Outcome:
    """Replay, execute and check. Raises WrongOutputError at the first wrong output, ValueError for bad
    input, RuntimeError where kernels cannot be compiled or run."""
    _check(config)
    if config.heads % config.kv_heads:
        raise ValueError(f"heads ({config.heads}) must be a multiple of kv_heads ({config.kv_heads})")
    try:
        backend = resolve_backend(config.backend)
    except OSError as error:  # CuPy makes a folder for what it compiles when it is imported
        raise RuntimeError(
            f"CuPy cannot be imported: {error}: set CUPY_CACHE_DIR to a folder that can be written, "
            "or give --backend cpu"
        ) from None
    layout = CacheLayout(
        config.dtype, config.layers, config.kv_heads, config.head_dim, config.tokens_per_block
    )
    if config.trace is None:
        requests = workload(config)
    else:
        trace = read_trace(config.trace, num_requests=config.num_requests)
        requests = [shrunk(request, config.shrink) for request in trace]
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_blocks = -(-longest // config.tokens_per_block) + config.max_batch_size
    if num_blocks * layout.bytes_per_block > _MOST_POOL_BYTES:
        raise ValueError(
            f"num_blocks ({num_blocks}) of {layout.bytes_per_block:,} bytes must not exceed "
            f"{_MOST_POOL_BYTES >> 30} GiB: lower num_blocks, or give a smaller model"
        )
    build = BuildConfig(
        max_batch_size=config.max_batch_size,
        max_num_tokens=config.max_num_tokens,
        max_seq_len=longest,
        tokens_per_block=config.tokens_per_block,
    )
    time = RooflineCost(load_model("llama-3-8b"), GPU_PRESETS["h100-80gb"])
    kernels = KernelStep(layout, num_blocks, config.heads, backend, time)
    engine = EngineConfig(admission="max_utilization", block_map_samples=0)
    try:
        with threadpool_limits(1):  # the reference's products are small, and the kernels want the cores
            result = simulate(requests, build, CacheConfig(), engine, num_blocks=num_blocks, cost=kernels)
    except OSError as error:  # the only files are those of the kernels: sources and what they compile to
        variable = "XDG_CACHE_HOME" if backend == "cpu" else "CUPY_CACHE_DIR or XDG_CACHE_HOME"
        raise RuntimeError(
            f"kernels cannot be compiled: {error}: set {variable} to a folder that can be written"
        ) from None
    if not kernels.tally.outputs:
        raise ValueError(
            f"num_blocks ({num_blocks}) holds none of the requests: the longest has {longest} tokens"
        )
    return Outcome(backend, kernels.tally, result)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print how often everything happened, and the verdict."""
    tally, result = outcome.tally, outcome.result
    finished = int((result.requests["status"] == "finished").sum())
    rows = (
        ("requests finished", finished),
        ("requests rejected", len(result.requests["status"]) - finished),
        ("steps executed", tally.steps),
        ("prompt tokens found in the cache", int(result.requests["hit_tokens"].sum())),
        ("blocks shared by tables at once, most", tally.shared_blocks),
        ("blocks copied before a write", tally.copied_blocks),
        ("prompts computed in chunks", tally.chunked_prefills),
        ("preemptions", int(result.timeline["preemptions"].sum())),
        ("blocks evicted", result.cache.evicted_blocks),
    )
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, count in rows:
        table.add_row(name, f"{count:,}")
    console.print(table)
    console.print(outcome.last_line, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 for a wrong output."""
    given = sys.argv[1:] if arguments is None else arguments
    wrong: list[WrongOutputError] = []

    def action() -> None:
        config = parse_dataclass(Config, "python -m experiments.kernel_replay", given)
        try:
            print_outcome(run(config), Console())
        except RuntimeError as error:  # no compiler, no CUDA headers, no GPU, or a kernel that failed
            raise ValueError(str(error)) from None
        except WrongOutputError as error:
            wrong.append(error)
            print(f"wrong output: {error}", file=sys.stderr)

    return run_command(action) or int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
