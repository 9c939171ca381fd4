"""The CPU runner: CUDA kernels compiled as C++ and run by fibers, with CUDA's rules checked.

From a source to a launch: translate.py makes the C++ text, build.py compiles it and keeps the library, runner.py
launches it in this process and address.py in a sanitized one; symbols.py finds the source line of an address.

What a kernel includes: cuda_host.h, with warp.h, atomics.h, device_math.h and runtime.h behind it. What runs it:
machine.h (who holds what), schedule.h (who runs next), warp_ops.cpp, barriers.cpp, signals.cpp (spins and faults),
blocks.cpp, workers.cpp; watch.cpp sees every access of a kernel compiled for that; failures.h words the errors.
"""
