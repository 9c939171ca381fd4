"""KernelStep: a step's cost that executes the step, with the CUDA kernels, and checks every output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments._token_values import chain, token_identities, values
from kernels import ops
from kernels.layout import CacheLayout
from kernels.tolerance import NUMPY_DTYPES, row_bounds
from sim.cost import StepBatch, StepCost, StepWork
from sim.scheduler.job import Job

_QUERY_AMPLITUDE = 3.0
"""Wide enough that single keys matter: scores then have a standard deviation of about 1."""


class WrongOutputError(Exception):
    """An output is further from the reference than rounding explains, or a kernel was given what it must not be."""


@dataclass
class Tally:
    """What was executed and checked."""

    steps: int = 0
    outputs: int = 0
    """One for each token, layer and head."""
    worst_error: float = 0.0
    worst_share: float = 0.0
    """Largest error as a share of what the row was allowed."""
    copied_blocks: int = 0
    chunked_prefills: int = 0
    """Prompts computed in more than one chunk."""
    shared_blocks: int = 0
    """Most blocks that more than one table of a step named at once."""
    reused_tokens: int = 0
    """Tokens attended to that this sequence never wrote itself."""


@dataclass
class _History:
    """What a job's sequence should have in its cache: `count` tokens, written or not."""

    hash: int = 1
    count: int = 0
    key: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    value: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    query: NDArray[Any] = field(default_factory=lambda: np.zeros(0))


class KernelStep:
    """Satisfies `sim.cost.StepCost`: does the copies, writes and attention of each step, layer by layer.

    layout      what the pool holds, for the model at its reduced size
    num_heads   query heads
    backend     "cpu" or "gpu"
    time        how long the step is said to take: the schedule does not depend on the machine this runs on

    Raises WrongOutputError, from `step`, at the first output that differs from the reference. The reference is
    computed in float64 from the sequence's own tokens, without block tables, slots, or anything of the allocator's.
    """

    needs_work = True

    def __init__(
        self, layout: CacheLayout, num_blocks: int, num_heads: int, backend: str, time: StepCost
    ) -> None:
        self.tally = Tally()
        self._layout = layout
        self._heads = num_heads
        self._backend = backend
        self._time = time
        self._dtype = NUMPY_DTYPES[layout.dtype]
        self._pool = layout.empty_pool(num_blocks, backend)
        self._poison()
        self._histories: dict[Job, _History] = {}
        self._wrote: dict[Job, int] = {}

    def decode_affine(self, decode_sequences: int) -> None:
        """Return None: each step is executed, so each has to be asked for."""
        return

    def step(self, batch: StepBatch) -> int:
        """Execute a step, check it, and return how long it is said to take, in picoseconds."""
        assert batch.work is not None, "the engine gives the step's work"
        chunks = [(job, 1) for job in batch.work.decoding]
        prefills = [(job, n) for job, (n, _) in zip(batch.work.prefilling, batch.prefills, strict=True)]
        self._note(batch.work)
        self.tally.steps += 1
        try:
            self._copy(batch.work)
            self._execute(chunks, ops.paged_attention)
            self._execute(prefills, ops.paged_prefill)
        except ValueError as error:  # slots and tables are the allocator's: it has erred, not the caller
            raise WrongOutputError(f"step {self.tally.steps}: {error}") from error
        return self._time.step(batch)

    # ------------------------------------------------------------ what runs on the device

    def _poison(self) -> None:
        """Fill the pool with NaN: what is read without having been written shows in an output."""
        if self._layout.dtype == "bfloat16" and self._backend == "gpu":
            self._pool.fill(0x7FFF)
        else:
            self._pool.fill(np.nan)

    def _to_device(self, array: NDArray[Any]) -> Any:
        if self._backend == "cpu":
            return np.ascontiguousarray(array)
        import cupy

        if array.dtype == NUMPY_DTYPES["bfloat16"]:
            array = array.view(np.uint16)
        return cupy.asarray(np.ascontiguousarray(array))

    def _to_host(self, array: Any) -> NDArray[Any]:
        host: NDArray[Any] = array if self._backend == "cpu" else array.get()
        return host.view(self._dtype) if host.dtype == np.uint16 else host

    def _copy(self, work: StepWork) -> None:
        if len(work.copies):
            ops.copy_blocks(self._layout, self._pool, self._to_device(work.copies))
            self.tally.copied_blocks += len(work.copies)

    def _execute(self, chunks: list[tuple[Job, int]], attention: Any) -> None:
        """Write the new tokens' keys and values, attend, and compare, for all layers."""
        if not chunks:
            return
        layout = self._layout
        spans = [self._span(job, count) for job, count in chunks]
        histories = [self._history(job, last) for (job, _), (_, last) in zip(chunks, spans, strict=True)]
        rows = [slice(first, last) for first, last in spans]
        sequences = [job.sequence for job, _ in chunks if job.sequence is not None]
        slots = np.concatenate([s.slots(*span) for s, span in zip(sequences, spans, strict=True)])
        width = max(s.num_blocks for s in sequences)
        tables = np.full((len(sequences), width), np.iinfo(np.int32).max, dtype=np.int32)  # never to be read
        for table, sequence in zip(tables, sequences, strict=True):
            table[: sequence.num_blocks] = sequence.block_table
        lengths = np.array([last for _, last in spans], dtype=np.int32)
        starts = np.cumsum([0, *(count for _, count in chunks)]).astype(np.int32)
        device_slots, device_tables, device_lengths = map(self._to_device, (slots, tables, lengths))

        for layer in range(layout.num_layers):
            key, value, query = (
                self._to_device(
                    np.concatenate([getattr(h, name)[r, layer] for h, r in zip(histories, rows, strict=True)])
                )
                for name in ("key", "value", "query")
            )
            ops.write_kv(layout, self._pool, layer, key, value, device_slots)
            ragged = () if attention is ops.paged_attention else (self._to_device(starts),)
            out, _ = attention(layout, self._pool, layer, query, *ragged, device_tables, device_lengths)
            outputs = self._to_host(out)
            for index, (job, _) in enumerate(chunks):
                self._check(job, layer, spans[index], outputs[starts[index] : starts[index + 1]])

    # ------------------------------------------------------------ what it should be

    @staticmethod
    def _span(job: Job, count: int) -> tuple[int, int]:
        assert job.sequence is not None
        return job.sequence.num_tokens - count, job.sequence.num_tokens

    def _history(self, job: Job, count: int) -> _History:
        """Return a job's tokens, at least the first `count` of them."""
        history = self._histories.setdefault(job, _History())
        if history.count < count:
            layout = self._layout
            hashes = chain(token_identities(job, history.count, count), history.hash)
            kv_shape = (layout.num_layers, layout.num_kv_heads, layout.head_dim)
            q_shape = (layout.num_layers, self._heads, layout.head_dim)
            for name, shape, amplitude in (
                ("key", kv_shape, 1.0),
                ("value", kv_shape, 1.0),
                ("query", q_shape, _QUERY_AMPLITUDE),
            ):
                new = values(hashes, name, shape, amplitude).astype(self._dtype)
                old = getattr(history, name)
                setattr(history, name, np.concatenate([old, new]) if history.count else new)
            history.hash, history.count = int(hashes[-1]), count
        return history

    def _check(self, job: Job, layer: int, span: tuple[int, int], out: NDArray[Any]) -> None:
        """Compare the outputs of one chunk, `[tokens, heads, head_dim]`, with the reference."""
        history = self._histories[job]
        first, last = span
        arguments = (history.query[first:last, layer], history.key[:last, layer], history.value[:last, layer])
        scale = self._layout.head_dim**-0.5
        expected = attend_chunk(*arguments, scale)
        bounds = row_bounds(
            self._layout.dtype, expected, plain_attend_chunk(self._layout.dtype, *arguments, scale)
        )
        errors = np.abs(out.astype(np.float64) - expected).max(-1)
        wrong = np.argwhere(~(errors <= bounds))  # NaN is wrong too
        if len(wrong):
            token, head = (int(place) for place in wrong[0])
            raise WrongOutputError(
                f"request {job.request.request_id}, sample {job.sample}, token {first + token}, layer {layer}, "
                f"head {head}: error {errors[token, head]:.3g} exceeds {bounds[token, head]:.3g}"
            )
        self.tally.outputs += errors.size
        self.tally.worst_error = max(self.tally.worst_error, float(errors.max()))
        self.tally.worst_share = max(self.tally.worst_share, float((errors / bounds).max()))

    # ------------------------------------------------------------ bookkeeping

    def _note(self, work: StepWork) -> None:
        """Count what the step shares and splits; forget the jobs that have ended."""
        tables = [job.sequence.table for job in (*work.decoding, *work.prefilling) if job.sequence]
        blocks = np.concatenate([np.array(table, dtype=np.int32) for table in tables])
        _, holders = np.unique(blocks, return_counts=True)
        self.tally.shared_blocks = max(self.tally.shared_blocks, int((holders > 1).sum()))
        for job in work.prefilling:
            assert job.sequence is not None
            chunked = job.sequence.num_tokens < job.target
            if chunked and self._wrote.get(job) != job.preemptions:
                self.tally.chunked_prefills += 1
                self._wrote[job] = job.preemptions
        for job in [job for job in self._histories if not job.remaining_tokens]:
            del self._histories[job]
            self._wrote.pop(job, None)


def _scores(query: NDArray[Any], key: NDArray[Any], scale: float) -> NDArray[Any]:
    """Return `[kv_heads, group · queries, keys]`, −inf where a query comes before a key."""
    tokens, heads, dim = query.shape
    keys, kv_heads, _ = key.shape
    group = heads // kv_heads
    rows = query.reshape(tokens, kv_heads, group, dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    scores = rows @ np.ascontiguousarray(key.transpose(1, 2, 0)) * query.dtype.type(scale)
    hidden = np.arange(keys)[None, :] > np.arange(keys - tokens, keys)[:, None]
    scores[:, np.tile(hidden, (group, 1))] = -np.inf
    return scores


def _combine(weights: NDArray[Any], value: NDArray[Any], tokens: int) -> NDArray[Any]:
    """Return `[queries, heads, head_dim]` from weights `[kv_heads, group · queries, keys]`."""
    out = weights @ np.ascontiguousarray(value.transpose(1, 0, 2))
    kv_heads, rows, dim = out.shape
    group = rows // tokens
    return out.reshape(kv_heads, group, tokens, dim).transpose(2, 0, 1, 3).reshape(tokens, -1, dim)


def attend_chunk(
    query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], scale: float
) -> NDArray[np.float64]:
    """Return causal attention of the last tokens of a sequence, in float64 `[queries, heads, head_dim]`.

    query `[queries, heads, head_dim]`; key and value `[keys, kv_heads, head_dim]`, the queries' own at the end.
    """
    scores = _scores(query.astype(np.float64), key.astype(np.float64), scale)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return _combine(weights / weights.sum(-1, keepdims=True), value.astype(np.float64), len(query))


def plain_attend_chunk(
    dtype: str, query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], scale: float
) -> NDArray[np.float32]:
    """Return the same as low-precision code computes it without care: see kernels.tolerance.row_bounds.

    Scores, probabilities and output are rounded to `dtype`; sums are float32.
    """

    def rounded(values: NDArray[Any]) -> NDArray[np.float32]:
        return values.astype(NUMPY_DTYPES[dtype]).astype(np.float32)

    scores = rounded(_scores(query.astype(np.float32), key.astype(np.float32), scale))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = rounded(weights / weights.sum(-1, keepdims=True, dtype=np.float32))
    return rounded(_combine(weights, value.astype(np.float32), len(query)))
