#include "weight.h"

#if defined(__x86_64__)
#include <cstdlib>
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif
#define LANES_AVX512 1
#define LANES_VNNI 1
#define NAME "avx512vnni"

namespace kernels {
namespace in_avx512vnni {
#include "products.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
const Kernels* avx512vnni() { return &in_avx512vnni::kernels_here; }
}  // namespace kernels
#else
namespace kernels {
const Kernels* avx512vnni() { return nullptr; }
}  // namespace kernels
#endif
