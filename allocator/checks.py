"""Validation shared by the configuration classes: every failure is one line, the value and the rule."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real


def require_int(name: str, value: object, minimum: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} ({value!r}) must be an integer")
    if value < minimum:
        raise ValueError(f"{name} ({value}) must be at least {minimum}")


def as_int(name: str, value: object, minimum: int) -> int:
    """Return `value` as an int. Raises ValueError unless it is an integer of at least `minimum`."""
    if type(value) is not int:
        require_int(name, value, minimum)
        return int(value)  # type: ignore[call-overload, no-any-return]  # an Integral, NumPy's for example
    if value < minimum:
        raise ValueError(f"{name} ({value}) must be at least {minimum}")
    return value


def require_optional_int(name: str, value: object, minimum: int) -> None:
    """Raise ValueError unless `value` is None or an integer of at least `minimum`."""
    if value is not None:
        require_int(name, value, minimum)


def require_power_of_two(name: str, value: int) -> None:
    """Raise ValueError unless `value` is 1, 2, 4, ..."""
    require_int(name, value, 1)
    if value & (value - 1):
        raise ValueError(f"{name} ({value}) must be a power of two")


def require_fraction(name: str, value: float) -> None:
    """Raise ValueError unless 0 < `value` <= 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} ({value!r}) must be a number")
    if not 0 < value <= 1:
        raise ValueError(f"{name} ({value}) must lie in (0, 1]")


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(choices)}")
