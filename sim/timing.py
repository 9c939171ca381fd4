"""TimingConfig: which model of time a run uses, and how to make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from allocator.checks import require_int
from allocator.config import BuildConfig, MemoryBudget
from allocator.field_docs import with_field_docs
from allocator.model import ModelSpec
from sim.calibration import CalibratedCost, Calibration
from sim.cost import RooflineCost, StepBatch, StepCost
from sim.hardware import GPUSpec
from sim.published import DistServeCost, DynamoCost
from sim.user_code import blaming, require_methods


@dataclass(frozen=True)
class Setting:
    """What a cost model can be made from."""

    model: ModelSpec
    gpu: GPUSpec
    build: BuildConfig
    budget: MemoryBudget
    tensor_parallel_size: int


@with_field_docs
@dataclass(frozen=True)
class TimingConfig:
    """How long a step takes. Raises ValueError for a name that is none, or a calibration that nothing uses."""

    cost: str = "roofline"
    """Model of a step's duration: roofline, distserve or dynamo (published fits, whatever the model and GPU), or
    package.module:Class, made with one argument (sim.timing.Setting)."""
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if ":" not in self.cost and self.cost not in COSTS:
            raise ValueError(f"cost ({self.cost}) must be one of {', '.join(COSTS)}, or package.module:Class")
        if self.calibration is not None and self.cost != "roofline":
            raise ValueError(
                f"cost ({self.cost}) must be roofline with a calibration: only its attention is replaced"
            )

    def make(self, setting: Setting) -> StepCost:
        """Return the model of time. Raises ValueError if it cannot be imported or made."""
        if self.calibration is not None:
            return CalibratedCost(
                setting.model,
                setting.gpu,
                self.calibration,
                setting.tensor_parallel_size,
                kv_bytes_per_token=setting.budget.bytes_per_token,
            )
        if ":" not in self.cost:
            return COSTS[self.cost](setting)
        module, _, name = self.cost.partition(":")
        try:
            made = getattr(import_module(module), name)(setting)
        except Exception as error:  # whatever a user's module does when imported
            raise ValueError(f"cost ({self.cost}) cannot be made: {error}") from None
        for method in ("step", "decode_affine"):
            if not callable(getattr(made, method, None)):
                raise ValueError(f"cost ({self.cost}) must have a method {method}, see sim.cost.StepCost")
        require_methods("cost", self.cost, made, StepCost)
        with blaming(cost=self.cost):
            self._try_out(made)
        return made  # type: ignore[no-any-return]

    def _try_out(self, made: StepCost) -> None:
        """Raise ValueError unless what a user's cost answers are integers. One that does the work is not asked."""
        if getattr(made, "needs_work", False):
            return
        windows = len(getattr(made, "windows", ()))
        require_int(f"cost ({self.cost}): step", made.step(StepBatch(1, 1, window_keys=(1,) * windows)), 0)
        affine = made.decode_affine(1)
        if affine is not None:
            if not isinstance(affine, tuple) or len(affine) != 2:
                raise ValueError(
                    f"cost ({self.cost}): decode_affine ({affine!r}) must be (base, slope), or None"
                )
            require_int(f"cost ({self.cost}): base + slope of decode_affine", sum(affine), 0)


def _roofline(setting: Setting) -> StepCost:
    return RooflineCost(
        setting.model,
        setting.gpu,
        setting.tensor_parallel_size,
        kv_bytes_per_token=setting.budget.bytes_per_token,
    )


COSTS: dict[str, Callable[[Setting], StepCost]] = {
    "roofline": _roofline,
    "distserve": lambda setting: DistServeCost(),
    "dynamo": lambda setting: DynamoCost(setting.budget.num_blocks * setting.build.tokens_per_block),
}
"""Models of time by name."""
