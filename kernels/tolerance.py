"""How far a low-precision attention output may be from the exact one, row by row."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place of 1: what rounding a result to the type may cost."""


def row_bounds(dtype: str, expected: NDArray[np.float64], plain: NDArray[Any]) -> NDArray[np.float64]:
    """Return the largest error each row may have: float64 `[...]` for arrays `[..., head_dim]`.

    A row may be off by twice the error that a plain low-precision computation makes in that same row (the rule
    by which FlashAttention is tested), by the rounding of its largest element, and by 1e-5. A bound for a whole
    batch would hide one wrong row among many.
    """
    plain_error = np.abs(plain.astype(np.float64) - expected).max(-1)
    bounds: NDArray[np.float64] = 2 * plain_error + UNIT_ROUNDOFF[dtype] * np.abs(expected).max(-1) + 1e-5
    return bounds
