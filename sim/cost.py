"""How long a step takes: what a step is, and the roofline that implements the StepCost contract by default."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from allocator.field_docs import with_field_docs
from allocator.model import ModelSpec
from sim.hardware import GPUSpec
from sim.step_cost import StepCost

if TYPE_CHECKING:
    from sim.scheduler.job import Job

__all__ = ["PS_PER_S", "RooflineCost", "StepBatch", "StepCost", "StepWork", "causal_scores"]

PS_PER_S = 10**12


@with_field_docs
@dataclass(slots=True)
class StepWork:
    """What one engine step computes, sequence by sequence: for a cost that finds the duration by doing the work."""

    decoding: Collection[Job]
    """Jobs whose sequences were given one slot each, for the token they sampled last."""
    prefilling: list[Job]
    """Jobs of the prefill chunks, in the order of StepBatch.prefills; a chunk ends its sequence's tokens."""
    copies: NDArray[np.int32]
    """Block copies to execute before the step's writes, int32 [n, 3]: source, destination, valid tokens."""


@with_field_docs
@dataclass(slots=True, init=False)
class StepBatch:
    """What one engine step computes, as far as its duration depends on it."""

    decode_sequences: int
    """Sequences that generate one token each."""
    decode_context: int
    """Keys that those sequences attend to, summed over them, this step's included."""
    prefills: list[tuple[int, int]]
    """A pair a prefill chunk: its tokens, and the keys that the last of them attends to (itself included)."""
    copied_tokens: int
    """Slots that are copied from block to block before the step's writes."""
    swapped_tokens: int
    """Slots that move between GPU and host memory, either way, before anything is computed."""
    window_keys: tuple[int, ...]
    """For each of the cost's `windows`, the keys that lie in it, summed over the decoding sequences as above; empty
    if nobody counted them."""
    work: StepWork | None
    """The same step in full, for a cost that `needs_work`; models of time do without."""

    def __init__(
        self,
        decode_sequences: int,
        decode_context: int,
        prefills: list[tuple[int, int]] | None = None,
        copied_tokens: int = 0,
        swapped_tokens: int = 0,
        window_keys: tuple[int, ...] = (),
        work: StepWork | None = None,
    ) -> None:
        # What dataclass writes is interpreted even where this module is compiled, and a step makes one of these.
        self.decode_sequences = decode_sequences
        self.decode_context = decode_context
        self.prefills = [] if prefills is None else prefills
        self.copied_tokens = copied_tokens
        self.swapped_tokens = swapped_tokens
        self.window_keys = window_keys
        self.work = work


class RooflineCost:
    """The default cost of a step: each part of a layer is bound by compute or by memory traffic.

    For n tokens in the step (decoding sequences and prefill chunks together), P parameters, F and BW the compute
    and bandwidth that kernels reach (peak · mfu, peak · mbu), c the overhead of a layer:

        linear    = Σ over layers of max(2 · P_active · n / F, (bytes of touched weights + activations) / BW) + c
        attention = Σ over sequences and layers of max(flops / F, KV bytes / BW)

    P is spread evenly over the layers, so that embedding and output projection are part of it. A mixture of
    experts computes with its active parameters and reads the experts that n tokens touch in expectation (see
    ModelSpec.touched_parameters). Activations are the inputs and outputs of a layer's matrix multiplications,
    each read or written once: per token 4 · hidden (in and out of attention and MLP), 2 · heads · head_dim
    (queries, and attention's result), 2 · kv_heads · head_dim (the new K and V) and 3 · intermediate (gate, up,
    and their product; times the experts of a token).

    Attention takes 4 · heads · head_dim flops per query and key (2 each for QKᵀ and PV; with latent attention
    2 · heads · (2 · rank + rope dim)). A prefill chunk is causal: of n new tokens whose last attends to c keys,
    token i attends to c − n + i, i = 1 … n. It reads the K and V of its c keys once, a decoding sequence those of
    its context once. Layers with a window attend to at most that many keys; of a batch without `window_keys`, in
    which nobody counted them sequence by sequence, to decode_sequences · window at most.

    Copies read and write each slot's bytes at memory bandwidth; blocks that move to or from host memory take the
    link's time. Both come first, as the step's writes depend on them, so their times are added.

    With tensor parallelism every GPU holds an equal share of parameters, heads and intermediate width, and the
    shares run at the same time; the exchange between GPUs is not modelled.

    The formula is the roofline model (Williams et al., CACM 52(4), 2009) applied to a transformer layer; see
    sim.hardware for where the constants come from. A step without tokens costs nothing.
    """

    __slots__ = (
        "_copy_ps",
        "_full_slope",
        "_kv_ps",
        "_linear",
        "_linear_memo",
        "_plain_layers",
        "_score_ps",
        "_swap_ps",
        "_windows",
        "window_slopes",
        "windows",
    )

    def __init__(
        self,
        model: ModelSpec,
        gpu: GPUSpec,
        tensor_parallel_size: int = 1,
        kv_bytes_per_token: int | None = None,
    ) -> None:
        """Take the bytes of one token's K and V on one GPU, all layers (default: the model's, unquantised).

        Raises ValueError when the model cannot be divided by `tensor_parallel_size`.
        """
        if kv_bytes_per_token is None:
            kv_bytes_per_token = model.kv_bytes_per_token("auto", tensor_parallel_size)
        elif kv_bytes_per_token < 1:
            raise ValueError(f"kv_bytes_per_token ({kv_bytes_per_token}) must be at least 1")
        self._linear = _Linear(model, gpu, tensor_parallel_size)
        self._linear_memo: dict[int, int] = {}
        self._windows = _window_groups(model)
        self._plain_layers = model.num_layers if self._windows == [(None, model.num_layers)] else 0
        if model.kv_lora_rank:
            flops = 2 * model.num_heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim)
        else:
            flops = 4 * model.num_heads * model.head_dim
        self._score_ps = flops / tensor_parallel_size / gpu.flops_per_s * PS_PER_S
        """Compute time per layer of one query against one key, picoseconds."""
        self._kv_ps = kv_bytes_per_token / model.num_layers / gpu.bytes_per_s * PS_PER_S
        """Memory time per layer of one key and its value, picoseconds."""
        self._copy_ps = 2 * kv_bytes_per_token / gpu.bytes_per_s * PS_PER_S
        """Picoseconds that copying one slot takes, all layers: read and written."""
        self._swap_ps = gpu.transfer_ps(kv_bytes_per_token)
        """Picoseconds that moving one slot over the link takes, all layers."""
        self._set_slopes(max(self._score_ps, self._kv_ps))

    def _set_slopes(self, key_ps: float) -> None:
        """Take the picoseconds that a key costs a decoding sequence in one layer."""
        slopes = {window: round(layers * key_ps) for window, layers in self._windows}
        self._full_slope = slopes.pop(None, 0)
        """Picoseconds a key costs a decoding sequence in all layers without a window."""
        self.windows = tuple(window for window in slopes if window is not None)
        """The windows that layers have."""
        self.window_slopes = tuple(slopes.values())
        """The same for a key that lies in one of them, in all layers that have it."""

    def step(self, batch: StepBatch) -> int:
        """Return the duration of a step, picoseconds."""
        tokens = batch.decode_sequences
        total = self._full_slope * batch.decode_context
        for new_tokens, context in batch.prefills:
            tokens += new_tokens
            total += self._prefill(new_tokens, context)
        if batch.copied_tokens or batch.swapped_tokens:
            total += self._moves(batch)
        if self.windows:
            total += self._in_windows(batch)
        return total + (self._linear_memo.get(tokens) or self._linear_ps(tokens))

    def _in_windows(self, batch: StepBatch) -> int:
        """Return the time of decoding attention in the layers with windows."""
        keys = batch.window_keys or [
            min(batch.decode_context, window * batch.decode_sequences) for window in self.windows
        ]
        return sum(slope * each for slope, each in zip(self.window_slopes, keys, strict=True))

    def _moves(self, batch: StepBatch) -> int:
        """Return the time of copies and swaps."""
        return round(batch.copied_tokens * self._copy_ps) + batch.swapped_tokens * self._swap_ps

    def decode_affine(self, decode_sequences: int) -> tuple[int, int]:
        """Return the base and the slope per key, those in windows apart, of a decode-only step."""
        return self._linear_ps(decode_sequences), self._full_slope

    def _linear_ps(self, tokens: int) -> int:
        found = self._linear_memo.get(tokens)
        if found is None:
            found = self._linear_memo[tokens] = self._linear.duration_ps(tokens)
        return found

    def _prefill(self, new_tokens: int, context: int) -> int:
        if self._plain_layers and 1 <= new_tokens <= context:
            scores = new_tokens * (2 * context - new_tokens + 1) // 2
            compute, memory = scores * self._score_ps, context * self._kv_ps
            return round(self._plain_layers * (compute if compute > memory else memory))
        total = 0.0
        for window, layers in self._windows:
            scores, keys = causal_scores(new_tokens, context, window)
            total += layers * max(scores * self._score_ps, keys * self._kv_ps)
        return round(total)


def causal_scores(new_tokens: int, context: int, window: int | None = None) -> tuple[int, int]:
    """Return (query-key pairs, distinct keys) of a causal chunk whose last token attends to `context` keys.

    Query i of n sees min(context − n + i, window) keys. Raises ValueError unless 1 <= new_tokens <= context.
    """
    if not 1 <= new_tokens <= context:
        raise ValueError(f"new_tokens ({new_tokens}) must be in 1..context ({context})")
    first = context - new_tokens + 1
    if window is None or context <= window:
        return new_tokens * (first + context) // 2, context
    keys = min(context, window + new_tokens - 1)
    if first >= window:
        return new_tokens * window, keys
    growing = window - first + 1
    return growing * (first + window) // 2 + (new_tokens - growing) * window, keys


def _window_groups(model: ModelSpec) -> list[tuple[int | None, int]]:
    """Return (window, layers with it), in the order of first appearance."""
    groups: dict[int | None, int] = {}
    for window in model.windows:
        groups[window] = groups.get(window, 0) + 1
    return list(groups.items())


class _Linear:
    """The part of a step that does not depend on context: everything but attention."""

    __slots__ = ("_activation_ps", "_flop_ps", "_model", "_overhead_ps", "_weight_ps")

    def __init__(self, model: ModelSpec, gpu: GPUSpec, tensor_parallel_size: int) -> None:
        kv_heads = model.kv_heads_per_gpu(tensor_parallel_size)
        bytes_per_parameter = model.weight_bytes / model.num_parameters
        share = 1 / tensor_parallel_size
        new_kv = model.kv_lora_rank + model.qk_rope_head_dim or 2 * kv_heads * model.head_dim
        elements = (
            4 * model.hidden_size
            + 2 * model.num_heads * model.head_dim * share
            + new_kv
            + 3 * model.intermediate_size * max(1, model.experts_per_token) * share
        )
        self._model = model
        self._flop_ps = 2 * model.active_parameters * share / gpu.flops_per_s * PS_PER_S
        self._weight_ps = bytes_per_parameter * share / gpu.bytes_per_s * PS_PER_S
        self._activation_ps = model.num_layers * elements * model.itemsize / gpu.bytes_per_s * PS_PER_S
        self._overhead_ps = model.num_layers * round(gpu.layer_overhead_us * 1e6)

    def duration_ps(self, tokens: int) -> int:
        if not tokens:
            return 0
        weights = self._model.touched_parameters(tokens) * self._weight_ps
        return round(max(tokens * self._flop_ps, weights + tokens * self._activation_ps)) + self._overhead_ps
