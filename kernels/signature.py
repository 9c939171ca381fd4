"""The parameters of a CUDA kernel, read from its declaration, and Python arguments made to fit them.

Both backends take their argument types from this one table, so a scalar of the wrong width fails on both.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCALAR_TYPES: dict[str, type[np.generic]] = {
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
    "float32": np.float32,
    "float64": np.float64,
}

C_TYPES: dict[str, Any] = {
    "int32": ctypes.c_int32,
    "uint32": ctypes.c_uint32,
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
}

# Spellings of the scalar types, as sorted words. `long` and `size_t` name different widths on different systems.
_SPELLINGS = {
    "int": "int32",
    "int signed": "int32",
    "signed": "int32",
    "int32_t": "int32",
    "unsigned": "uint32",
    "int unsigned": "uint32",
    "uint32_t": "uint32",
    "long long": "int64",
    "int long long": "int64",
    "int64_t": "int64",
    "long long unsigned": "uint64",
    "int long long unsigned": "uint64",
    "uint64_t": "uint64",
    "float": "float32",
    "double": "float64",
}


@dataclass(frozen=True)
class Param:
    """One kernel parameter: its name, and "pointer" or the scalar type that an argument must fit."""

    name: str
    kind: str
    read_only: bool = False
    """Whether it points to const: the kernel cannot write through it."""
    element: str | None = None
    """The scalar type it points to, where it is one of those that arrays are checked against."""


Signature = tuple[Param, ...]


def blank_comments(source: str) -> str:
    """Return `source` with comments and the insides of string literals replaced by spaces: same length and lines."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''

    def blank(match: re.Match[str]) -> str:
        text = match.group()
        if text[0] in "\"'":
            return text if text == '"C"' else text[0] + " " * (len(text) - 2) + text[-1]
        return re.sub(r"[^\n]", " ", text)

    return re.sub(pattern, blank, source, flags=re.DOTALL)


def _closing(text: str, opening: int) -> int:
    """Return the index of the bracket that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    raise ValueError(f"unbalanced brackets after {text[opening : opening + 40]!r}")


def _split(text: str) -> list[str]:
    """Split a parameter list at its outermost commas."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        if char in "(<[{":
            depth += 1
        elif char in ")>]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _parse_param(kernel: str, text: str) -> Param:
    text = re.sub(r"\b__restrict__\b|\b__grid_constant__\b", " ", text)
    words = re.findall(r"[A-Za-z_][\w:]*(?:<[^<>]*>)?|[*&\[\]=.]+", text)
    if "*" in text and "=" not in text and "[" not in text and text.count("*") == 1:
        before, after = text.split("*")
        name = after.replace("const", " ").strip()
        if re.fullmatch(r"[A-Za-z_]\w*", name):
            pointee = sorted(word for word in before.split() if word not in ("const", "volatile"))
            is_const = re.search(r"\bconst\b", before) is not None
            return Param(name, "pointer", is_const, _SPELLINGS.get(" ".join(pointee)))
    elif len(words) >= 2 and all(re.fullmatch(r"[A-Za-z_]\w*", word) for word in words):
        *type_words, name = [word for word in words if word != "const"]
        kind = _SPELLINGS.get(" ".join(sorted(type_words)))
        if kind is not None:
            return Param(name, kind)
    supported = "a pointer, int, unsigned, long long, unsigned long long, float or double"
    raise ValueError(
        f"kernel {kernel}: parameter `{' '.join(text.split())}` must be {supported}, with a name"
    )


def parse_signatures(source: str) -> dict[str, Signature]:
    """Return the signature of every `extern "C" __global__ void name(...)` in `source`, by name.

    Preprocessor conditionals are not evaluated. Raises ValueError, naming the kernel and the parameter, for a
    parameter type that is not a pointer or a scalar of fixed width, and for a kernel that is not extern "C".
    """
    text = blank_comments(source)
    signatures: dict[str, Signature] = {}
    for match in re.finditer(r"\b__global__\b", text):
        position = match.end()
        bounds = re.compile(r"\s*(?:(?:static|inline|void)\b\s*)*__launch_bounds__\s*(?=\()")
        while found := bounds.match(text, position):
            position = _closing(text, found.end()) + 1
        head = re.compile(r"\s*(?:void\s+)?([A-Za-z_]\w*)\s*(?=\()").match(text, position)
        if head is None:
            line = text.count("\n", 0, match.start()) + 1
            raise ValueError(f"line {line}: expected `void name(` after __global__")
        name = head.group(1)
        before = text[max(text.rfind(mark, 0, match.start()) for mark in ";}\n#") + 1 : match.start()]
        block_start = text.rfind("{", 0, match.start())
        in_block = re.search(r'extern\s+"C"\s*$', text[: max(block_start, 0)]) is not None
        preceding = text[: match.start()].rstrip()
        if (
            'extern "C"' not in " ".join(before.split())
            and not in_block
            and not preceding.endswith('extern "C"')
        ):
            raise ValueError(f'kernel {name} must be declared extern "C": it is looked up by that name')
        end = _closing(text, head.end())
        inside = text[head.end() + 1 : end].strip()
        params = () if inside in ("", "void") else tuple(_parse_param(name, part) for part in _split(inside))
        if signatures.setdefault(name, params) != params:
            raise ValueError(f"kernel {name} is declared twice with different parameters")
    return signatures


def check_count(kernel: str, signature: Signature, args: Sequence[object]) -> None:
    """Raise TypeError unless there are as many arguments as parameters."""
    if len(args) != len(signature):
        names = ", ".join(param.name for param in signature)
        raise TypeError(f"{kernel} takes {len(signature)} arguments ({names}), not {len(args)}")


def convert_scalar(kernel: str, param: Param, value: object) -> np.generic:
    """Return `value` as the parameter's own NumPy scalar type.

    A Python int or float, or a NumPy scalar, is accepted where the parameter can hold its value: an integer that
    fits, or any real number for a floating-point parameter. Raises TypeError for another kind of object, ValueError
    for an integer out of range.
    """
    scalar = SCALAR_TYPES[param.kind]
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if issubclass(scalar, np.integer):
        if not is_integer:
            raise TypeError(
                f"{kernel}: {param.name} must be an integer ({param.kind}), not {type(value).__name__}"
            )
        info = np.iinfo(scalar)
        number = int(value)  # type: ignore[call-overload]
        if not info.min <= number <= info.max:
            raise ValueError(f"{kernel}: {param.name} ({number}) does not fit in {param.kind}")
        return scalar(number)
    if not is_integer and not isinstance(value, (float, np.floating)):
        raise TypeError(f"{kernel}: {param.name} must be a number ({param.kind}), not {type(value).__name__}")
    return scalar(value)


def check_element(kernel: str, param: Param, array: Any) -> None:
    """Raise TypeError if an array holds another type than the pointer says; signedness apart.

    Vector types, half-precision types and type names of the kernel's own are not known here, and so not checked.
    """
    dtype = getattr(array, "dtype", None)
    if param.element is None or dtype is None:
        return
    wanted = np.dtype(param.element)
    integers = wanted.kind in "iu" and dtype.kind in "iu"
    if dtype.itemsize != wanted.itemsize or not (integers or dtype.kind == wanted.kind):
        raise TypeError(f"{kernel}: {param.name} must be an array of {param.element}, not {dtype}")


def check_dimensions(kernel: str, grid: Sequence[int], block: Sequence[int], shared_bytes: int) -> None:
    """Raise ValueError unless a CUDA device could launch such a grid of such blocks."""
    limits = {"grid": (grid, (2**31 - 1, 65535, 65535)), "block": (block, (1024, 1024, 64))}
    for what, (given, most) in limits.items():
        if len(given) != 3:
            raise ValueError(f"{kernel}: {what} {tuple(given)} must have three dimensions")
        for size, limit, axis in zip(given, most, "xyz", strict=True):
            if not 1 <= size <= limit:
                raise ValueError(f"{kernel}: {what} {axis} ({size}) must be from 1 to {limit}")
    threads = block[0] * block[1] * block[2]
    if threads > 1024:
        raise ValueError(f"{kernel}: a block of {threads} threads exceeds 1024")
    if not 0 <= shared_bytes <= 227 * 1024:
        raise ValueError(f"{kernel}: shared_bytes ({shared_bytes}) must be from 0 to {227 * 1024}")
