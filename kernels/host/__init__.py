"""The CPU runner: CUDA kernels compiled as C++ and run by fibers, with CUDA's rules checked."""
