"""CUDA kernels over a paged KV cache, compiled for a GPU by CuPy or for the CPU by a C++ compiler."""
