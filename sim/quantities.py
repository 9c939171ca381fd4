"""Write quantities for people: durations and shares, as tables and figures show them."""

from __future__ import annotations

NONE = "–"
"""What stands for a figure that does not exist."""


def seconds_text(seconds: float | None) -> str:
    """Write a duration with three significant digits and the unit that suits it."""
    if seconds is None:
        return NONE
    if seconds < 0.0009995:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    return f"{seconds:,.0f} s"


def percent_text(share: float | None) -> str:
    """Write a share in percent with three significant digits, two decimals at most."""
    if share is None:
        return NONE
    return f"{share:.2%}" if 0 < share < 0.09995 else f"{share:.1%}"


def rough_percent_text(share: float) -> str:
    """Write a share in percent as a headline does: whole, a digit more below ten percent, "<0.1%" next to 0."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"
