"""Find what an address in a compiled library is: its source line, the shared variable it belongs to."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kernels.host.build import HOST_DIR

_SYMTAB, _TLS = 2, 6  # SHT_SYMTAB, STT_TLS


class Section(NamedTuple):
    """One row of an ELF section table."""

    name: str
    kind: int
    address: int
    offset: int
    size: int
    link: int


class Variable(NamedTuple):
    """A thread-local variable: its place in the library's thread-local block."""

    name: str
    offset: int
    size: int


def _text(table: bytes, start: int) -> str:
    return table[start : table.index(b"\0", start)].decode()


def _sections(data: bytes) -> list[Section]:
    """Return the sections of a 64-bit little-endian ELF file (System V ABI, chapter 4)."""
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    rows = [struct.unpack_from("<IIQQQQII", data, offset + size * i) for i in range(count)]
    table = data[rows[names][4] : rows[names][4] + rows[names][5]]
    return [Section(_text(table, row[0]), row[1], row[3], row[4], row[5], row[6]) for row in rows]


def section(path: Path, name: str) -> Section | None:
    """Return the section called `name`, or None."""
    return next((found for found in _sections(path.read_bytes()) if found.name == name), None)


@cache
def shared_variables(path: Path) -> tuple[Variable, ...]:
    """Return the `__shared__` variables of a library, which are its thread-local ones."""
    data = path.read_bytes()
    sections = _sections(data)

    def found() -> Iterator[Variable]:
        for symbols in sections:
            if symbols.kind != _SYMTAB:
                continue
            strings = sections[symbols.link]
            table = data[strings.offset : strings.offset + strings.size]
            for at in range(symbols.offset, symbols.offset + symbols.size, 24):
                name, info, _, index, value, size = struct.unpack_from("<IBBHQQ", data, at)
                if info & 15 == _TLS and index != 0:
                    yield Variable(_variable_name(_text(table, name)), value, size)

    return tuple(sorted(found(), key=lambda variable: variable.offset))


def _variable_name(symbol: str) -> str:
    """Return the source name in a mangled local or global variable (`_ZZ6reduceE4part`, `_ZL5stage`, `tile`)."""
    if not symbol.startswith("_Z"):
        return symbol
    tail = symbol.rsplit("E", 1)[-1] if symbol.startswith("_ZZ") else symbol[3:]
    digits = len(tail) - len(tail.lstrip("0123456789"))
    if digits == 0:
        return symbol
    length = int(tail[:digits])
    return tail[digits : digits + length]


def source_line(path: Path, offset: int) -> tuple[str, int]:
    """Return (file, line) of the kernel source for the code at `offset` in the library, or ("", 0).

    Of the functions inlined there, the innermost that is neither the runner's nor NVIDIA's counts.
    """
    for tool in ("addr2line", "llvm-addr2line"):
        if shutil.which(tool) is None:
            continue
        command = [tool, "-i", "-e", str(path), hex(offset)]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        for row in shown.stdout.splitlines():
            file, _, line = row.split(" ")[0].rpartition(":")
            if line.isdigit() and int(line) > 0 and is_kernel_file(file):
                return Path(file).name, int(line)
        break
    return "", 0


def is_kernel_file(file: str) -> bool:
    """Return whether a source path from debug information is a kernel's, not a header of the runner or NVIDIA."""
    path = Path(file)
    if path.name in ("entries", "??", "") or HOST_DIR in path.parents:
        return False
    return not {"nvidia", "include", "libcudacxx"} & set(path.parts) and path.suffix != ".cpp"
