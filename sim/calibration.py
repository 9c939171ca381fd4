"""Calibration: attention times measured on a GPU, in place of the roofline's attention term."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from allocator.checks import require_int
from allocator.field_docs import with_field_docs
from allocator.model import ModelSpec
from sim.cost import PS_PER_S, RooflineCost, StepBatch, causal_scores
from sim.hardware import GPUSpec

_PS_PER_US = PS_PER_S // 10**6


@with_field_docs
@dataclass(frozen=True)
class Calibration:
    """What one layer's attention takes, fitted to measured kernels (`python -m experiments.tools.calibrate`).

        decode   decode_base_us + decode_sequence_us · sequences + decode_key_us · Σ keys
        prefill  prefill_base_us + prefill_pair_us · (query, key) pairs + prefill_key_us · keys    a chunk

    in microseconds, for the heads that one GPU has. Raises ValueError for a negative or impossible figure.
    """

    device: str
    """Name of the GPU."""
    driver: str
    """Version of the CUDA driver."""
    measured: str
    """Day of the measurement, ISO 8601."""
    kv_dtype_measured: str
    calibrated_heads: int
    calibrated_kv_heads: int
    calibrated_head_dim: int
    calibrated_tokens_per_block: int
    decode_base_us: float
    decode_sequence_us: float
    decode_key_us: float
    prefill_base_us: float
    prefill_pair_us: float
    prefill_key_us: float
    decode_error: float
    """Mean error of the fit, as a share of the measured time."""
    prefill_error: float

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "int":
                require_int(each.name, value, 1)
            elif each.type == "float" and not 0.0 <= value < 1e9:  # NaN neither
                raise ValueError(f"{each.name} ({value}) must be in [0, 1e9)")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a calibration file. Raises ValueError naming the file and what is wrong with it."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"calibration ({path}) cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"calibration ({path}) must be JSON: {error}") from None
        fit = found.get("fit") if isinstance(found, dict) else None
        if not isinstance(fit, dict):
            raise ValueError(f"calibration ({path}) must have an object `fit`")
        kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}
        values: dict[str, Any] = {}
        for each in fields(cls):
            if each.name not in fit:
                raise ValueError(f"calibration ({path}) lacks fit.{each.name}")
            value = values[each.name] = fit[each.name]
            if not isinstance(value, kinds[str(each.type)]) or isinstance(value, bool):
                raise ValueError(
                    f"calibration ({path}): fit.{each.name} ({value!r}) must be of type {each.type}"
                )
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"calibration ({path}): {error}") from None

    def document(self, points: list[dict[str, Any]]) -> str:
        """Return the text of a calibration file; `points` are the measurements that the fit comes from."""
        return json.dumps({"fit": asdict(self), "points": points}, indent=2) + "\n"


class CalibratedCost(RooflineCost):
    """The roofline with the attention term of a calibration; everything else stays.

    Raises ValueError where the calibration was made for other heads than one GPU has of the model.
    """

    def __init__(
        self,
        model: ModelSpec,
        gpu: GPUSpec,
        calibration: Calibration,
        tensor_parallel_size: int = 1,
        kv_bytes_per_token: int | None = None,
    ) -> None:
        super().__init__(model, gpu, tensor_parallel_size, kv_bytes_per_token)
        if model.kv_lora_rank:
            raise ValueError(f"calibration ({calibration.device}) must not be used with latent attention")
        for name, here in (
            ("calibrated_heads", model.num_heads // tensor_parallel_size),
            ("calibrated_kv_heads", model.kv_heads_per_gpu(tensor_parallel_size)),
            ("calibrated_head_dim", model.head_dim),
        ):
            if getattr(calibration, name) != here:
                raise ValueError(
                    f"{name} ({getattr(calibration, name)}) must be the model's {here} on one GPU"
                )
        self._calibration = calibration
        self._set_slopes(calibration.decode_key_us * _PS_PER_US)

    def _decode_base(self, sequences: int) -> int:
        """Return the time of the decoding sequences' attention in all layers, keys apart."""
        if not sequences:
            return 0
        layers = sum(layers for _, layers in self._windows)
        fit = self._calibration
        return round(layers * (fit.decode_base_us + fit.decode_sequence_us * sequences) * _PS_PER_US)

    def step(self, batch: StepBatch) -> int:
        """Return the duration of a step, picoseconds."""
        return super().step(batch) + self._decode_base(batch.decode_sequences)

    def decode_affine(self, decode_sequences: int) -> tuple[int, int]:
        """Return the base and the slope per key, those in windows apart, of a decode-only step."""
        base, slope = super().decode_affine(decode_sequences)
        return base + self._decode_base(decode_sequences), slope

    def _prefill(self, new_tokens: int, context: int) -> int:
        fit = self._calibration
        total = 0.0
        for window, layers in self._windows:
            pairs, keys = causal_scores(new_tokens, context, window)
            total += layers * (fit.prefill_base_us + fit.prefill_pair_us * pairs + fit.prefill_key_us * keys)
        return round(total * _PS_PER_US)
