"""Products of narrow weights and attention, compiled for the processor and called inside XLA's programs. See docs/engine.md.

library   finding the compiled kernels, and saying why there are none
calls     the calls, as functions that JAX traces
native    the kernels in C++: what they are given (weight.h), sixteen lanes (lanes.h), the kernels (products.inc, once a processor),
          products of pairs and of tiles where there are instructions for them (avx512bf16.cpp, amx.cpp), work in pieces on XLA's threads
          (pool.h), what XLA calls (handlers.cpp)
"""
