"""TimingConfig: which model of time a run uses, and how to make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from allocator.checks import as_int
from allocator.config import BuildConfig, MemoryBudget
from allocator.field_docs import with_field_docs
from allocator.model import ModelSpec
from sim.calibration import CalibratedCost, Calibration
from sim.cost import RooflineCost, StepBatch, StepCost
from sim.hardware import GPUSpec
from sim.published import DistServeCost, DynamoCost
from sim.request import MAX_TIME_PS
from sim.user_code import attribute, failed_in, require_methods


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
    package.module:Class, a sim.cost.StepCost made with one argument (sim.timing.Setting)."""
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
            if not callable(attribute("cost", self.cost, made, method, None)):
                raise ValueError(f"cost ({self.cost}) must have a method {method}, see sim.cost.StepCost")
        require_methods("cost", self.cost, made, StepCost, "sim.cost.StepCost")
        cost = UsersCost(self.cost, made)
        if not cost.needs_work:  # one that does the work has none to do yet
            cost.step(StepBatch(1, 1, window_keys=(1,) * len(cost.windows)))
            cost.decode_affine(1)
        return cost


_KEYS_TRIED = (1, 1000)
"""Keys of each sequence for which both methods of a user's cost are asked."""


class UsersCost:
    """A user's model of time: what it answers is looked at, and what goes wrong in it is told in a line.

    Integers of any type (NumPy's, for example) become Python's.
    """

    def __init__(self, name: str, made: StepCost) -> None:
        """Take the name it was chosen by, and what was made from that.

        Raises ValueError for windows that cannot be, UserCodeError for what a property raises.
        """
        self._name = name
        self._made = made
        self.needs_work = bool(attribute("cost", name, made, "needs_work", False))
        hidden = [each for each in ("windows", "window_slopes") if _hides(type(made), each)]
        if hidden:
            raise ValueError(
                f"cost ({name}): {hidden[0]} must be set in __init__, after RooflineCost's, which sets its own"
            )
        self.windows = self._integers("windows")
        self.window_slopes = self._integers("window_slopes")
        if len(self.windows) != len(self.window_slopes):
            raise ValueError(
                f"cost ({name}): windows {self.windows} and window_slopes {self.window_slopes} must be equally many"
            )

    def step(self, batch: StepBatch) -> int:
        """Return the duration of a step, picoseconds.

        Raises UserCodeError for what the user's raises, ValueError for an answer that is none.
        """
        try:
            answer = self._made.step(batch)
        except (Exception, SystemExit) as error:
            raise failed_in("step", "cost", self._name, error) from error
        return self._integer("step", answer, 0)

    def decode_affine(self, decode_sequences: int) -> tuple[int, int] | None:
        """Return base and slope of a step of so many decoding sequences, picoseconds, or None if it has none.

        Raises UserCodeError for what the user's raises, ValueError for an answer that is none, or not what `step` says.
        """
        try:
            answer = self._made.decode_affine(decode_sequences)
        except (Exception, SystemExit) as error:
            raise failed_in("decode_affine", "cost", self._name, error) from error
        if answer is None:
            return None
        try:
            base, slope = answer
        except (TypeError, ValueError):
            raise ValueError(
                f"cost ({self._name}): decode_affine ({answer!r}) must be (base, slope), or None"
            ) from None
        slope = self._integer("slope of decode_affine", slope, 0)
        # Each of them attends to one key at least, which may make up for a negative base.
        base = self._integer("base of decode_affine", base, -slope * decode_sequences)
        if not self.needs_work:
            for keys in _KEYS_TRIED:
                self._compare(decode_sequences, keys, base, slope)
        return base, slope

    def _compare(self, sequences: int, keys: int, base: int, slope: int) -> None:
        """Raise ValueError unless step says of sequences of so many keys each what decode_affine says."""
        seen = tuple(sequences * min(keys, window) for window in self.windows)
        step_ps = self.step(StepBatch(sequences, sequences * keys, window_keys=seen))
        in_windows = sum(each * extra for each, extra in zip(seen, self.window_slopes, strict=True))
        expected = base + slope * sequences * keys + in_windows
        if step_ps != expected:
            raise ValueError(
                f"cost ({self._name}): decode_affine ({base}, {slope}) must say what step does, but of {sequences} "
                f"sequences with {keys} keys each they say {expected} and {step_ps}"
            )

    def _integer(self, what: str, given: object, minimum: int) -> int:
        found = as_int(f"cost ({self._name}): {what}", given, minimum)
        if found > MAX_TIME_PS:
            raise ValueError(
                f"cost ({self._name}): {what} ({found}) must be at most {MAX_TIME_PS} picoseconds"
            )
        return found

    def _integers(self, what: str) -> tuple[int, ...]:
        """Return an attribute with a number for each window, none if it is not there."""
        given = attribute("cost", self._name, self._made, what, ())
        if not isinstance(given, tuple | list):
            raise ValueError(f"cost ({self._name}): {what} ({given!r}) must be a tuple")
        return tuple(self._integer(what, each, 0) for each in given)


def _hides(kind: type, attribute: str) -> bool:
    """Return whether a class derived from RooflineCost has an attribute that its instances have already."""
    if not issubclass(kind, RooflineCost):
        return False
    return any(attribute in vars(base) for base in kind.__mro__[: kind.__mro__.index(RooflineCost)])


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
