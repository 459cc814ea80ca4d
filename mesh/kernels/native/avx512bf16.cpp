// Products of bfloat16, two at a time, where the processor multiplies them (AVX-512 BF16). All else is avx512vnni.cpp's.
#include "weight.h"

#if defined(__x86_64__)
#include <cstdlib>
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif
#define LANES_AVX512 1

namespace kernels {
namespace in_avx512bf16 {
#include "products.inc"

INLINE __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

// Rows r .. r + R - 1 and outputs o .. o + C - 1. A lane adds the products of the elements 2 l and 2 l + 1 of each 32.
template <int R, int C>
static void dots(const Tile& t, int64_t r, int64_t o) {
  const int64_t in = t.weight->in, block = C * in * 2;
  const uint16_t *w = (const uint16_t*)t.weight->codes + o * in, *x = t.rounded + r * in;
  V acc[R][C];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int c = 0; c < C; c++) acc[i][c] = zero();
  for (int64_t k = 0; k < in; k += 32) {
    if (r == 0) fetch<kBfloat16, C>((const uint8_t*)w + block, k, block <= kNear);
    __m512bh b[C];
    UNROLL for (int c = 0; c < C; c++) b[c] = pairs(w + c * in + k);
    UNROLL for (int i = 0; i < R; i++) {
      const __m512bh a = pairs(x + i * in + k);
      UNROLL for (int c = 0; c < C; c++) acc[i][c] = (V)_mm512_dpbf16_ps((__m512)acc[i][c], b[c], a);
    }
  }
  put<R, C>(t, r, o, acc);
}

template <int C>
static void dots_of(const Tile& t, int64_t r, int64_t last, int64_t o) {
  for (; r + kRows <= last; r += kRows) dots<kRows, C>(t, r, o);
  if (last - r == 3) dots<3, C>(t, r, o);
  if (last - r == 2) dots<2, C>(t, r, o);
  if (last - r == 1) dots<1, C>(t, r, o);
}

constexpr int64_t kTogetherRows = 64;  // whose inputs stay in the processor's cache while all outputs of a piece are multiplied with them

static void tile_of_pairs(const Tile& t) {
  if (!t.rounded) return avx512vnni()->tile(t);
  for (int64_t r = 0; r < t.rows; r += kTogetherRows) {
    const int64_t last = t.rows - r < kTogetherRows ? t.rows : r + kTogetherRows;
    int64_t o = t.first;
    for (; o + kOutputs <= t.last; o += kOutputs) dots_of<kOutputs>(t, r, last, o);
    for (; o < t.last; o++) dots_of<1>(t, r, last, o);
  }
}

static bool reads_rounded(const Weight& w) { return w.kind == kBfloat16 && w.in % 32 == 0; }

static void to_rounded(const float* x, int64_t in, int64_t row, uint16_t* to) {
  for (int64_t k = 0; k < in; k += 32, x += 32)
    _mm512_storeu_si512(to + row * in + k, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(x + 16), (__m512)load(x)));
}

}  // namespace in_avx512bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx512bf16() {
  static const Kernels these = [] {
    Kernels k = *avx512vnni();
    k.name = "avx512bf16", k.tile = in_avx512bf16::tile_of_pairs;
    k.reads_rounded = in_avx512bf16::reads_rounded, k.to_rounded = in_avx512bf16::to_rounded;
    return k;
  }();
  return &these;
}
}  // namespace kernels
#else
namespace kernels {
const Kernels* avx512bf16() { return nullptr; }
}  // namespace kernels
#endif
