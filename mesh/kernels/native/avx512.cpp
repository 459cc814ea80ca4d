#include "weight.h"

#if defined(__x86_64__)
#include <cstdlib>
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define LANES_AVX512 1
#define NAME "avx512"

namespace kernels {
namespace in_avx512 {
#include "products.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
const Kernels* avx512() { return &in_avx512::kernels_here; }
}  // namespace kernels
#else
namespace kernels {
const Kernels* avx512() { return nullptr; }
}  // namespace kernels
#endif
