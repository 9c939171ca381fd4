"""The fields of a Hugging Face `config.json`: read one by one, with errors that name file, field and rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocator.model import DTYPE_BYTES


class Fields:
    """A config's fields, with the errors a person needs: which file, which field, which rule."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def error(self, message: str) -> ValueError:
        """Return the error to raise: `message`, behind the file it is about."""
        return ValueError(f"{self.source}: {message}")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """Return an integer field; null counts as absent. Raises ValueError when absent without a default."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(f"field {name!r} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"field {name!r} ({value!r}) must be an integer")
        if value < minimum:
            raise self.error(f"field {name!r} ({value}) must be at least {minimum}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a true or false field; null counts as absent. Raises ValueError for anything else."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"field {name!r} ({value!r}) must be true or false")
        return value


def architecture_of(fields: Fields) -> str:
    """Return the class that transformers would build, e.g. "LlamaForCausalLM"."""
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names:
        raise fields.error("field 'architectures' is missing")
    return str(names[0])


def dtype_of(fields: Fields) -> str:
    """Return the type of weights and activations; half precision, as engines do, where none is stated."""
    dtype = fields.values.get("torch_dtype") or fields.values.get("dtype") or "float16"
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fields.error(f"field 'torch_dtype' ({dtype!r}) must be one of {', '.join(DTYPE_BYTES)}")
    return dtype


def weight_bits_of(fields: Fields) -> int | None:
    """Return the bits of a quantised weight; its scales and the layers left unquantised are not counted."""
    quantization = fields.values.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    if quantization.get("quant_method") == "fp8":
        return 8
    if quantization.get("quant_method") == "mxfp4":
        return 4
    bits = quantization.get("bits")
    if isinstance(bits, int) and not isinstance(bits, bool) and bits > 0:
        return bits
    raise fields.error("field 'quantization_config' names no known quant_method and no number of bits")


def windows_of(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window, () when none has one.

    An explicit `layer_types` list decides; else the rule by which the architecture derives it.
    """
    kinds = fields.values.get("layer_types")
    architecture = architecture_of(fields)
    if architecture.startswith("Qwen") and not fields.flag("use_sliding_window", False):
        return ()
    if kinds is None:
        if fields.values.get("sliding_window") is None:
            return ()
        if architecture.startswith("Qwen"):
            first = fields.integer("max_window_layers", 28, minimum=0)
            windowed = [layer >= first for layer in range(num_layers)]
        elif architecture in ("Gemma2ForCausalLM", "GptOssForCausalLM"):
            windowed = [layer % 2 == 0 for layer in range(num_layers)]
        elif architecture == "Gemma3ForCausalLM":
            period = fields.integer("sliding_window_pattern", 6)
            windowed = [(layer + 1) % period != 0 for layer in range(num_layers)]
        elif architecture in ("MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"):
            windowed = [True] * num_layers
        else:
            return ()
        kinds = ["sliding_attention" if is_windowed else "full_attention" for is_windowed in windowed]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error(f"field 'layer_types' must list one kind for each of {num_layers} layers")
    windows: list[int | None] = []
    for kind in kinds:
        if kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention":
            windows.append(fields.integer("sliding_window"))
        else:
            raise fields.error(
                f"field 'layer_types' has {kind!r}: must be full_attention or sliding_attention"
            )
    return tuple(windows) if any(window is not None for window in windows) else ()
