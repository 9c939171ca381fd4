"""Sources, constants and arguments mean the same on both backends, and libraries are built once."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import compile as kernels_compile
from kernels import gpu, toolkit
from kernels.compile import (
    Param,
    backend_available,
    compile_source,
    constants_prelude,
    load,
    parse_signatures,
    resolve_backend,
)
from kernels.host import build

ROOT = Path(kernels.__file__).parents[1]
needs_cpu = pytest.mark.skipif(not backend_available("cpu"), reason="no C++ compiler or no CUDA headers")


# --- signatures ---------------------------------------------------------------------------------------------------

SOURCE = """
// extern "C" __global__ void not_a_kernel(int x)
/* extern "C" __global__ void nor_this(int y) {} */
const char* text = "extern \\"C\\" __global__ void nor_that(int z)";
extern "C" __global__ void __launch_bounds__(THREADS, (MIN + 1) / 2) first(
    float* __restrict__ out,      // [n], written
    const __half* const in,       /* [n] */
    int n, unsigned int m, const long long stride, unsigned long long big,
    float scale, double exact,
    int64_t wide, uint32_t narrow) {}
extern "C" __global__ __launch_bounds__(128) void second() {}
extern "C" {
__global__ void third(Shared<int, 4>*state, unsigned flags) {}
}
extern "C" __global__ void third(Shared<int, 4>* again, unsigned int);
"""


def test_signatures_come_from_the_declarations() -> None:
    source = SOURCE.replace("again, unsigned int", "state, unsigned flags")
    assert parse_signatures(source) == {
        "first": (
            Param("out", "pointer", element="float32"),
            Param("in", "pointer", read_only=True),
            Param("n", "int32"),
            Param("m", "uint32"),
            Param("stride", "int64"),
            Param("big", "uint64"),
            Param("scale", "float32"),
            Param("exact", "float64"),
            Param("wide", "int64"),
            Param("narrow", "uint32"),
        ),
        "second": (),
        "third": (Param("state", "pointer"), Param("flags", "uint32")),
    }


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ("size_t n", "size_t n"),
        ("long n", "long n"),
        ("float* x, float4 v", "float4 v"),
        ("float** rows", r"float\*\* rows"),
        ("float x[4]", r"float x\[4\]"),
        ("int", "int"),
        ("float& x", "float& x"),
        ("bool flag", "bool flag"),
        ("int n = 3", "int n = 3"),
    ],
)
def test_an_unsupported_parameter_is_named(parameters: str, named: str) -> None:
    with pytest.raises(
        ValueError, match=f"^kernel sum: parameter `{named}` must be a pointer, int, .*, with a name$"
    ):
        parse_signatures(f'extern "C" __global__ void sum({parameters}) {{}}')


def test_a_kernel_must_be_extern_c_and_declared_one_way() -> None:
    with pytest.raises(ValueError, match=r'^kernel sum must be declared extern "C"'):
        parse_signatures("__global__ void sum(int n) {}")
    with pytest.raises(ValueError, match=r"^kernel sum is declared twice with different parameters$"):
        parse_signatures('extern "C" __global__ void sum(int n); extern "C" __global__ void sum(float n) {}')
    with pytest.raises(ValueError, match=r"^line 2: expected `void name"):
        parse_signatures('\nextern "C" __global__ int sum(int n) {}')


# --- constants ----------------------------------------------------------------------------------------------------


def test_constants_become_one_line_each() -> None:
    constants = {"T": "__half", "WIDTH": 64, "WIDE": 2**40, "EXACT": True, "SCALE": 0.1, "LOW": -(2**63)}
    assert constants_prelude(constants) == (
        "#include <cuda_fp16.h>\n"
        "using T = __half;\n"
        "constexpr int WIDTH = 64;\n"
        "constexpr long long WIDE = 1099511627776ll;\n"
        "constexpr bool EXACT = true;\n"
        f"constexpr float SCALE = {(0.1).hex()}f;\n"
        "constexpr long long LOW = -9223372036854775807ll - 1;\n"
    )


@pytest.mark.parametrize(
    ("constants", "error", "message"),
    [
        ({"2D": 1}, ValueError, "constant name '2D' must be a C++ identifier"),
        ({"N": 2**63}, ValueError, "constant N (9223372036854775808) must fit in 64 bits"),
        ({"S": float("inf")}, ValueError, "constant S (inf) must be finite"),
        ({"S": None}, TypeError, "constant S must be an int, bool, float or str, not NoneType"),
    ],
)
def test_bad_constants_are_named(constants: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        constants_prelude(constants)
    assert str(caught.value) == message


CONSTANTS = """
extern "C" __global__ void show(long long* integers, float* floats) {
    static_assert(sizeof(T) == 2, "");
    integers[0] = WIDTH; integers[1] = WIDE; integers[2] = LOW; integers[3] = EXACT; integers[4] = __LINE__;
    floats[0] = SCALE; floats[1] = TINY;
}
"""


@needs_cpu
def test_a_kernel_sees_its_constants_and_its_own_line_numbers() -> None:
    constants = {
        "T": "__half",
        "WIDTH": -5,
        "WIDE": 2**40,
        "LOW": -(2**63),
        "EXACT": True,
        "SCALE": 0.1,
        "TINY": 1e-40,
    }
    module = compile_source(CONSTANTS, constants=constants, backend="cpu")
    integers, floats = np.zeros(5, np.int64), np.zeros(2, np.float32)
    module.launch("show", (1, 1, 1), (1, 1, 1), [integers, floats])
    assert integers.tolist() == [-5, 2**40, -(2**63), 1, 4]
    np.testing.assert_array_equal(floats, np.array([0.1, 1e-40], np.float32))


@needs_cpu
def test_load_compiles_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "value.cuh").write_text("template <class X> __device__ X twice(X x) { return x + x; }\n")
    (tmp_path / "show.cu").write_text(
        '#include "value.cuh"\nextern "C" __global__ void show(float* x) { x[0] = twice(N) + sizeof(N); }\n'
    )
    monkeypatch.setattr(kernels_compile, "CUDA_DIR", tmp_path)

    def value(**constants: Any) -> float:
        x = np.zeros(1, np.float32)
        load("show.cu", constants, backend="cpu").launch("show", (1, 1, 1), (1, 1, 1), [x])
        return float(x[0])

    assert load("show.cu", {"N": 1}, backend="cpu") is load("show.cu", {"N": 1}, backend="cpu")
    # 1, 1.0 and True are equal in Python, and different constants.
    assert (value(N=1), value(N=1.0), value(N=True)) == (6, 6, 2)
    assert load("show.cu", {"N": 1}, backend="cpu") is not load("show.cu", {"N": 1.0}, backend="cpu")
    modes = [load("show.cu", {"N": 1}, backend="cpu", sanitize=mode) for mode in (None, "memory")]  # type: ignore[arg-type]
    assert modes[0] is not modes[1]


@needs_cpu
def test_compilation_errors_name_the_source_line() -> None:
    with pytest.raises(
        build.CompileError, match=r"wrong does not compile for the CPU:\n(.*\n)*wrong.cu:2:.*undeclared"
    ):
        compile_source(
            'extern "C" __global__ void f(int n) {\n    undeclared = n;\n}', backend="cpu", name="wrong.cu"
        )
    with pytest.raises(ValueError, match=r"^extern __shared__ s\[\] must be declared inside the kernel"):
        compile_source('extern __shared__ int s[];\nextern "C" __global__ void f() {}', backend="cpu")
    with pytest.raises(ValueError, match=r"^sanitize \(thread\) must be address, memory or None$"):
        compile_source('extern "C" __global__ void f() {}', backend="cpu", sanitize="thread")


# --- arguments, on both backends ----------------------------------------------------------------------------------

ARGUMENTS = """
extern "C" __global__ void take(const float* x, float* y, int i, unsigned u, long long l, float f, double d) {
    if (y) { y[0] = i; y[1] = u; y[2] = l >> 32; y[3] = f; y[4] = d; y[5] = x == nullptr; }
}
"""


class FakeArray:
    """What CuPy's arrays are to the argument conversion."""

    __cuda_array_interface__: dict[str, Any] = {}  # noqa: RUF012


class FakeFunction:
    def __init__(self) -> None:
        self.max_dynamic_shared_size_bytes = 48 * 1024 - 512
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
        self.calls.append((grid, block, args, shared_mem))


class FakeRawModule:
    made: list[FakeRawModule] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.functions: dict[str, FakeFunction] = {}
        self.made.append(self)

    def get_function(self, name: str) -> FakeFunction:
        return self.functions.setdefault(name, FakeFunction())


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> list[FakeRawModule]:
    module = ModuleType("cupy")
    module.RawModule = FakeRawModule  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(kernels_compile, "_gpu_problem", lambda: None)
    FakeRawModule.made = []
    return FakeRawModule.made


BAD_ARGUMENTS = {
    "count": ((None, None, 1), TypeError, r"^take takes 7 arguments \(x, y, i, u, l, f, d\), not 3$"),
    "float for int": (
        (None, None, 1.0, 1, 1, 1, 1),
        TypeError,
        "^take: i must be an integer .int32., not float$",
    ),
    "bool for int": (
        (None, None, True, 1, 1, 1, 1),
        TypeError,
        "^take: i must be an integer .int32., not bool$",
    ),
    "too large": (
        (None, None, 2**31, 1, 1, 1, 1),
        ValueError,
        "^take: i .2147483648. does not fit in int32$",
    ),
    "negative": ((None, None, 1, -1, 1, 1, 1), ValueError, "^take: u .-1. does not fit in uint32$"),
    "numpy too large": ((None, None, np.int64(2**40), 1, 1, 1, 1), ValueError, "does not fit in int32$"),
    "text for float": (
        (None, None, 1, 1, 1, "1", 1),
        TypeError,
        "^take: f must be a number .float32., not str$",
    ),
    "number for pointer": (
        (None, 7, 1, 1, 1, 1, 1),
        TypeError,
        "^take: y must be a .* array or None, not int$",
    ),
    "list for pointer": (
        ([1.0], None, 1, 1, 1, 1, 1),
        TypeError,
        "^take: x must be a .* array or None, not list$",
    ),
}
BAD_SHAPES = {
    "grid": ((1, 70000, 1), (1, 1, 1), 0, r"^take: grid y \(70000\) must be from 1 to 65535$"),
    "empty": ((0, 1, 1), (1, 1, 1), 0, r"^take: grid x \(0\) must be from 1 to"),
    "block": ((1, 1, 1), (1, 1, 65), 0, r"^take: block z \(65\) must be from 1 to 64$"),
    "threads": ((1, 1, 1), (64, 32, 1), 0, "^take: a block of 2048 threads exceeds 1024$"),
    "shared": ((1, 1, 1), (1, 1, 1), 300000, r"^take: shared_bytes \(300000\) must be from 0 to 232448$"),
    "two axes": ((1, 1), (1, 1, 1), 0, r"^take: grid \(1, 1\) must have three dimensions$"),
}
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "gpu"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_fail_alike(backend: Any, case: str, fake_cupy: list[FakeRawModule]) -> None:
    args, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        compile_source(ARGUMENTS, backend=backend).launch("take", (1, 1, 1), (1, 1, 1), args)


class TypedArray(FakeArray):
    """A device array, as far as its type goes."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_an_array_of_another_type_than_the_pointer_fails_alike(
    backend: Any, dtype: Any, fake_cupy: list[FakeRawModule]
) -> None:
    x = np.zeros(4, dtype) if backend == "cpu" else TypedArray(dtype)
    module = compile_source(ARGUMENTS, backend=backend)
    message = f"^take: x must be an array of float32, not {np.dtype(dtype)}$"
    with pytest.raises(TypeError, match=message):
        module.launch("take", (1, 1, 1), (1, 1, 1), (x, None, 1, 1, 1, 1, 1))


def test_arrays_may_differ_in_sign_and_hold_what_is_not_known() -> None:
    source = """
    extern "C" __global__ void k(unsigned* counts, const long long* slots, uint4* rows, T* elements) {}
    """
    elements = [param.element for param in parse_signatures(source)["k"]]
    assert elements == ["uint32", "int64", None, None]
    if backend_available("cpu"):
        module = compile_source(source, constants={"T": "float"}, backend="cpu")
        arrays = [np.zeros(4, dtype) for dtype in (np.int32, np.uint64, np.float16, np.float64)]
        module.launch("k", (1, 1, 1), (1, 1, 1), arrays)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD_SHAPES)
def test_launches_no_device_could_run_fail_alike(
    backend: Any, case: str, fake_cupy: list[FakeRawModule]
) -> None:
    grid, block, shared, message = BAD_SHAPES[case]
    module = compile_source(ARGUMENTS, backend=backend)
    with pytest.raises(ValueError, match=message):
        module.launch("take", grid, block, (None, None, 1, 1, 1, 1, 1), shared_bytes=shared)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^source.cu has no kernel give: it has take$"):
        module.launch("give", (1, 1, 1), (1, 1, 1), ())


@needs_cpu
@given(
    i=st.integers(-(2**20), 2**20),
    u=st.integers(0, 2**20),
    wide=st.integers(-(2**20), 2**20),
    f=st.one_of(st.integers(-100, 100), st.floats(-100, 100, width=32)),
    d=st.floats(-100, 100, width=32),
    numpy=st.booleans(),
)
def test_numbers_arrive_in_the_width_of_their_parameter(
    i: int, u: int, wide: int, f: float, d: float, numpy: bool
) -> None:
    y = np.zeros(6, np.float32)
    args: list[Any] = [i, u, wide << 32, f, d]
    if numpy:
        args = [np.int64(i), np.uint8(u % 256), np.int64(wide << 32), np.float64(f), np.float32(d)]
        u %= 256
    compile_source(ARGUMENTS, backend="cpu").launch("take", (1, 1, 1), (1, 1, 1), [None, y, *args])
    np.testing.assert_array_equal(y, np.array([i, u, wide, f, d, 1], np.float32))


@needs_cpu
def test_a_read_only_array_is_not_written_through() -> None:
    x = np.zeros(6, np.float32)
    x.flags.writeable = False
    module = compile_source(ARGUMENTS, backend="cpu")
    module.launch("take", (1, 1, 1), (1, 1, 1), [x, None, 1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"^take: y points to non-const, but the array is read-only$"):
        module.launch("take", (1, 1, 1), (1, 1, 1), [x, x, 1, 1, 1, 1, 1])


def test_cupy_gets_scalars_of_the_exact_type(fake_cupy: list[FakeRawModule]) -> None:
    module = compile_source(ARGUMENTS, backend="gpu", constants={"N": 3}, name="take.cu")
    array = FakeArray()
    module.launch("take", (2, 3, 4), (32, 1, 1), [array, None, 1, np.int64(2), 3, 4, np.float32(5)])
    (made,) = fake_cupy
    assert made.options["backend"] == "nvrtc"
    assert "-std=c++17" in made.options["options"]
    first, *rest = made.options["code"].split("\n")
    assert first.startswith("// headers ")
    assert "\n".join(rest) == f'constexpr int N = 3;\n#line 1 "take.cu"\n{ARGUMENTS}'
    ((grid, block, args, shared),) = made.functions["take"].calls
    assert (grid, block, shared) == ((2, 3, 4), (32, 1, 1), 0)
    assert args[0] is array
    kinds = [np.uint64, np.int32, np.uint32, np.int64, np.float32, np.float64]
    assert [type(value) for value in args[1:]] == kinds
    assert [value.item() for value in args[1:]] == [0, 1, 2, 3, 4, 5]


def test_large_shared_memory_is_asked_for_first(fake_cupy: list[FakeRawModule]) -> None:
    module = compile_source(ARGUMENTS, backend="gpu")
    args = [None, None, 1, 1, 1, 1, 1]
    asked = []
    for shared in (1000, 48 * 1024 - 100, 100_000, 60_000):
        module.launch("take", (1, 1, 1), (1, 1, 1), args, shared_bytes=shared)
        asked.append(fake_cupy[0].functions["take"].max_dynamic_shared_size_bytes)
    # The default holds up to 48 KiB less the kernel's static shared memory; beyond, it is raised and stays.
    assert asked == [48 * 1024 - 512, 48 * 1024 - 100, 100_000, 100_000]


def test_cupy_recompiles_when_a_header_changes(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.cuh", tmp_path / "outer.cuh"
    inner.write_text("one")
    outer.write_text('#pragma once\n  #  include "inner.cuh"\n')
    (tmp_path / "unused.cuh").write_text("x")

    def text() -> str:
        return gpu.full_source("", '#include "outer.cuh"\n#include <cuda_fp16.h>\n', "a.cu", [tmp_path])

    before = text()
    (tmp_path / "unused.cuh").write_text("y")
    assert text() == before
    inner.write_text("two")
    assert text() != before


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_compile, "_gpu_problem", lambda: "CuPy is not installed (no module)")
    assert resolve_backend("auto") == "cpu"
    assert not backend_available("gpu")
    with pytest.raises(RuntimeError, match=r"^backend gpu: CuPy is not installed \(no module\)$"):
        compile_source(ARGUMENTS, backend="gpu")
    with pytest.raises(ValueError, match=r"^backend \(tpu\) must be auto, gpu or cpu$"):
        resolve_backend("tpu")
    with pytest.raises(ValueError, match=r"^backend \(auto\) must be gpu or cpu$"):
        backend_available("auto")


ON_BOTH = """
#include "weights.cuh"
extern "C" __global__ void reverse(const float* x, float* y, int n, unsigned u, long long l, float f, double d) {
    extern __shared__ float held[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) held[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        y[i] = held[n - 1 - i] * f + static_cast<float>(l >> 32) + static_cast<float>(d) * weight(u);
}
"""


@pytest.mark.gpu
@pytest.mark.skipif(not backend_available("gpu"), reason="needs an NVIDIA GPU that CuPy can use")
def test_a_gpu_computes_what_the_cpu_runner_does(tmp_path: Path) -> None:
    import cupy  # a GPU is optional

    (tmp_path / "weights.cuh").write_text(
        "__device__ float weight(unsigned u) { return static_cast<float>(u) * SCALE; }\n"
    )
    x = np.arange(20_000, dtype=np.float32)
    results = {}
    for backend in ("cpu", "gpu"):
        module = compile_source(
            ON_BOTH,
            constants={"SCALE": 0.5},
            backend=backend,
            name="reverse.cu",
            include_dirs=[tmp_path],  # type: ignore[arg-type]
        )
        array = np.asarray if backend == "cpu" else cupy.asarray
        given, out = array(x), array(np.full_like(x, np.nan))
        args = [given, out, x.size, 2**31 + 2, 3 << 32, 2, 0.25]
        module.launch("reverse", (1, 1, 1), (256, 1, 1), args, shared_bytes=x.nbytes)
        results[backend] = out if backend == "cpu" else cupy.asnumpy(out)
    expected = x[::-1] * 2 + 3 + np.float32(0.125) * np.float32(2**31 + 2)
    np.testing.assert_array_equal(results["cpu"], expected.astype(np.float32))
    np.testing.assert_array_equal(results["gpu"], results["cpu"])


# --- the compiler and its cache -----------------------------------------------------------------------------------

RACE = """
import sys, numpy as np
from pathlib import Path
from kernels.compile import compile_source
source = '#include "value.cuh"\\nextern "C" __global__ void f(int* x) { x[0] = VALUE; }'
module = compile_source(source, backend="cpu", name="race.cu", include_dirs=[sys.argv[1]])
x = np.zeros(1, np.int32)
module.launch("f", (1, 1, 1), (1, 1, 1), [x])
print(x[0])
"""


@needs_cpu
def test_processes_that_build_the_same_library_share_it(tmp_path: Path) -> None:
    header, cache = tmp_path / "value.cuh", tmp_path / "cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}

    def values(count: int) -> list[str]:
        command = [sys.executable, "-c", RACE, str(tmp_path)]
        processes = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        return [process.communicate()[0].strip() for process in processes]

    header.write_text("constexpr int VALUE = 11;")
    assert values(2) == ["11"] * 2
    files = sorted(path.name.split("-")[0] for path in (cache / "paged-kv-lab").iterdir())
    assert files == ["race", "runtime"], "one library each, and nothing left over"
    header.write_text("constexpr int VALUE = 22;")
    assert values(1) == ["22"]


@needs_cpu
def test_a_library_depends_on_what_its_headers_say_and_not_on_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build_with(folder: str, value: int) -> Path:
        place = tmp_path / folder
        place.mkdir()
        (place / "value.cuh").write_text(f"constexpr int VALUE = {value};")
        source = '#include "value.cuh"\nint answer() { return VALUE; }'
        flags = [f"-I{place}", "-fPIC"]
        return build.build(source, stem="answer", flags=flags, link=["-shared"], include_dirs=[place])

    first = build_with("here", 11)
    assert build_with("there", 11) == first
    assert build_with("elsewhere", 22) != first


@pytest.fixture
def no_compiler_cached() -> Any:
    build.find_compiler.cache_clear()
    yield
    build.find_compiler.cache_clear()


def test_a_missing_compiler_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, no_compiler_cached: None
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(
        RuntimeError, match=r"^CXX \(/nowhere/g\+\+ -m64\) is not a C\+\+ compiler that runs$"
    ):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError) as caught:
        build.find_compiler()
    assert str(caught.value) == (
        "no C++17 compiler for the CPU runner: install g++ or clang++, or pip install ziglang"
    )
    assert not backend_available("cpu")


def test_missing_headers_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "_candidates", lambda: [tmp_path])
    find = toolkit.cuda_include_dirs.__wrapped__
    with pytest.raises(
        RuntimeError, match=r"^no CUDA headers \(cuda_fp16.h\) found: pip install nvidia-cuda-runtime-cu12"
    ):
        find()
    (tmp_path / "cuda_fp16.h").touch()
    with pytest.raises(
        RuntimeError, match=r"^no CCCL headers \(nv/target\) found for .*: pip install .*cccl-cu12"
    ):
        find()
    (tmp_path / "nv").mkdir()
    (tmp_path / "nv" / "target").touch()
    assert find() == (tmp_path,)


# --- what the package may import ----------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_kernels_and_their_tests_need_little() -> None:
    package = {"kernels", "numpy", "ml_dtypes", "cupy", "cupyx"}
    helpers = {path.stem for path in Path(__file__).parent.glob("*.py")}
    tests = package | {"pytest", "hypothesis"} | helpers
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        assert imported(path) <= package | sys.stdlib_module_names, path
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("test_kernels*.py"), *folder.glob("kernel*.py")]):
        assert imported(path) <= tests | sys.stdlib_module_names, path
