"""Turn a CUDA source into the C++ that the host compiler sees."""

from __future__ import annotations

import re

import numpy as np

from kernels.signature import Signature, blank_comments

_ALIGNMENT = r"(?:(?:__align__|alignas)\s*\([^)]*\)\s*)*"
_EXTERN_SHARED = re.compile(
    rf"\bextern\s+{_ALIGNMENT}__shared__\s+{_ALIGNMENT}"
    r"(?P<type>[A-Za-z_][\w:<>,\s]*?)\s*\b(?P<name>[A-Za-z_]\w*)\s*\[\s*\]\s*;"
)


def dynamic_shared_as_pointer(source: str) -> str:
    """Return `source` with each `extern __shared__ T name[];` made a pointer, since C++ has no such arrays.

    This is the one change made to a CUDA source; lines stay where they are. Raises ValueError for such a declaration
    outside a function.
    """
    text = blank_comments(source)
    pieces, position = [], 0
    for match in _EXTERN_SHARED.finditer(text):
        before = text[: match.start()]
        if before.count("{") == before.count("}"):
            raise ValueError(
                f"extern __shared__ {match['name']}[] must be declared inside the kernel that uses it"
            )
        kind = " ".join(match["type"].split())
        lines = "\n" * match.group().count("\n")
        pieces += [
            source[position : match.start()],
            f"{kind}* const {match['name']} = ::cuda_host::dynamic_shared<{kind}>();{lines}",
        ]
        position = match.end()
    return "".join([*pieces, source[position:]])


def _entry(name: str, signature: Signature) -> str:
    """Return the C++ function that calls kernel `name` with arguments by address, checked against the table."""
    count = len(signature)
    types = ", ".join(f"class A{i}" for i in range(count))
    names = ", ".join(f"A{i}" for i in range(count))
    values = ", ".join(f"*static_cast<A{i}*>(arguments[{i}])" for i in range(count))
    checks = []
    for i, param in enumerate(signature):
        size = 8 if param.kind == "pointer" else np.dtype(param.kind).itemsize
        checks.append(f'static_assert(sizeof(A{i}) == {size}, "{name}: {param.name} is not {param.kind}");')
    template = f"template <{types}>\n" if count else ""
    return (
        f"{template}static void cuda_host_call_{name}(void (*kernel)({names}), void* const* arguments) {{\n"
        f"    {' '.join(checks)}\n    (void)arguments;\n    kernel({values});\n}}\n"
        f'extern "C" __attribute__((visibility("default"))) void cuda_host_entry_{name}(void* const* arguments) {{\n'
        f"    cuda_host_call_{name}({name}, arguments);\n}}\n"
    )


def translation_unit(prelude: str, source: str, name: str, signatures: dict[str, Signature]) -> str:
    """Return the C++ that the host compiler sees for a CUDA source called `name`.

    It ends with a function `cuda_host_entry_<kernel>` for each kernel, and a table of them by name.
    """
    entries = "".join(_entry(kernel, signature) for kernel, signature in signatures.items())
    rows = "".join(f'    {{"{kernel}", cuda_host_entry_{kernel}}},\n' for kernel in signatures)
    return (
        f'#include "cuda_host.h"\n{prelude}#line 1 "{name}"\n{dynamic_shared_as_pointer(source)}\n'
        f'#line 1 "entries"\n{entries}'
        f"extern const ::cuda_host::Entry cuda_host_entries[] = {{\n{rows}    {{nullptr, nullptr}},\n}};\n"
    )
