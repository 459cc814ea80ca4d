// Sixteen floats at a time: one vector of AVX-512, two of AVX2, four of Advanced SIMD, or what the compiler makes of its own vector types.
// Included once for each processor, inside its namespace; LANES_AVX512, LANES_AVX2 or LANES_NEON says for which.
// Nothing from the C++ library is called here: a function that is compiled twice for two processors must not be shared between them.

#define INLINE static inline __attribute__((always_inline))

#if defined(LANES_AVX2)

// V: sixteen floats; I: sixteen 32-bit integers.
struct V {
  __m256 low, high;
};
struct I {
  __m256i low, high;
};

INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v.low), _mm256_storeu_ps(p + 8, v.high); }
INLINE V all(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
INLINE V operator+(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE V operator-(V a, V b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
INLINE V operator*(V a, V b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE V operator/(V a, V b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
INLINE V larger(V a, V b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE V smaller(V a, V b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
INLINE float first(V v) { return _mm256_cvtss_f32(v.low); }
// a * b + c, rounded once
INLINE V madd(V a, V b, V c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }

INLINE I operator&(I a, int b) { return {_mm256_and_si256(a.low, _mm256_set1_epi32(b)), _mm256_and_si256(a.high, _mm256_set1_epi32(b))}; }
INLINE I operator|(I a, I b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
INLINE I operator>>(I a, int b) { return {_mm256_srli_epi32(a.low, b), _mm256_srli_epi32(a.high, b)}; }
INLINE I operator<<(I a, int b) { return {_mm256_slli_epi32(a.low, b), _mm256_slli_epi32(a.high, b)}; }
INLINE V floats(I i) { return {_mm256_cvtepi32_ps(i.low), _mm256_cvtepi32_ps(i.high)}; }
INLINE I bytes(const void* p) {
  const __m128i b = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))};
}
INLINE V from_int8(const void* p) {
  const __m128i b = _mm_loadu_si128((const __m128i*)p);
  return floats(I{_mm256_cvtepi8_epi32(b), _mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))});
}
INLINE V from_bfloat16(const void* p) {
  const __m128i *h = (const __m128i*)p;
  const I wide = I{_mm256_cvtepu16_epi32(_mm_loadu_si128(h)), _mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1))} << 16;
  return {_mm256_castsi256_ps(wide.low), _mm256_castsi256_ps(wide.high)};
}
INLINE V from_float16(const void* p) {
  const __m128i *h = (const __m128i*)p;
  return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
// 16 where a bit is set, else 0; the first of sixteen bits lowest
INLINE I sixteens(uint32_t bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), set = _mm256_set1_epi32((int)bits);
  const __m256i low = _mm256_cmpeq_epi32(_mm256_and_si256(set, each), each);
  const __m256i above = _mm256_slli_epi32(each, 8), high = _mm256_cmpeq_epi32(_mm256_and_si256(set, above), above);
  return I{low, high} & 16;
}
// To the nearest bfloat16, to even between two.
INLINE __m256 eight_rounded(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // what is no number stays so
  const __m256 all = _mm256_blendv_ps(_mm256_castsi256_ps(near), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_and_ps(all, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff0000)));
}
INLINE V to_bfloat16(V v) { return {eight_rounded(v.low), eight_rounded(v.high)}; }
// v * 2^n for whole numbers n
INLINE V times_power(V v, V n) {
  const __m256i low = _mm256_slli_epi32(_mm256_cvtps_epi32(n.low), 23), high = _mm256_slli_epi32(_mm256_cvtps_epi32(n.high), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v.low), low)),
          _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v.high), high))};
}

// The sums of four vectors, each added up as a tree: lanes 8 apart, then 4, 2, 1.
INLINE void sums(V a, V b, V c, V d, float* out) {
  auto eight = [](V v) { return _mm256_add_ps(v.low, v.high); };
  auto four = [](__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
  __m128 r0 = four(eight(a)), r1 = four(eight(b)), r2 = four(eight(c)), r3 = four(eight(d));
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(r0, r2), _mm_add_ps(r1, r3)));
}

#elif defined(LANES_NEON)

struct V {
  float32x4_t v[4];
};
struct I {
  uint32x4_t v[4];
};

INLINE V load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
INLINE void store(float* p, V a) { vst1q_f32(p, a.v[0]), vst1q_f32(p + 4, a.v[1]), vst1q_f32(p + 8, a.v[2]), vst1q_f32(p + 12, a.v[3]); }
INLINE V all(float f) {
  const float32x4_t x = vdupq_n_f32(f);
  return {{x, x, x, x}};
}
INLINE V operator+(V a, V b) { return {{vaddq_f32(a.v[0], b.v[0]), vaddq_f32(a.v[1], b.v[1]), vaddq_f32(a.v[2], b.v[2]), vaddq_f32(a.v[3], b.v[3])}}; }
INLINE V operator-(V a, V b) { return {{vsubq_f32(a.v[0], b.v[0]), vsubq_f32(a.v[1], b.v[1]), vsubq_f32(a.v[2], b.v[2]), vsubq_f32(a.v[3], b.v[3])}}; }
INLINE V operator*(V a, V b) { return {{vmulq_f32(a.v[0], b.v[0]), vmulq_f32(a.v[1], b.v[1]), vmulq_f32(a.v[2], b.v[2]), vmulq_f32(a.v[3], b.v[3])}}; }
INLINE V operator/(V a, V b) { return {{vdivq_f32(a.v[0], b.v[0]), vdivq_f32(a.v[1], b.v[1]), vdivq_f32(a.v[2], b.v[2]), vdivq_f32(a.v[3], b.v[3])}}; }
INLINE V larger(V a, V b) { return {{vmaxq_f32(a.v[0], b.v[0]), vmaxq_f32(a.v[1], b.v[1]), vmaxq_f32(a.v[2], b.v[2]), vmaxq_f32(a.v[3], b.v[3])}}; }
INLINE V smaller(V a, V b) { return {{vminq_f32(a.v[0], b.v[0]), vminq_f32(a.v[1], b.v[1]), vminq_f32(a.v[2], b.v[2]), vminq_f32(a.v[3], b.v[3])}}; }
INLINE float first(V a) { return vgetq_lane_f32(a.v[0], 0); }
INLINE V madd(V a, V b, V c) {
  return {{vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]), vfmaq_f32(c.v[2], a.v[2], b.v[2]), vfmaq_f32(c.v[3], a.v[3], b.v[3])}};
}

INLINE I operator&(I a, int b) {
  const uint32x4_t x = vdupq_n_u32((uint32_t)b);
  return {{vandq_u32(a.v[0], x), vandq_u32(a.v[1], x), vandq_u32(a.v[2], x), vandq_u32(a.v[3], x)}};
}
INLINE I operator|(I a, I b) { return {{vorrq_u32(a.v[0], b.v[0]), vorrq_u32(a.v[1], b.v[1]), vorrq_u32(a.v[2], b.v[2]), vorrq_u32(a.v[3], b.v[3])}}; }
INLINE I operator<<(I a, int b) {
  const int32x4_t x = vdupq_n_s32(b);
  return {{vshlq_u32(a.v[0], x), vshlq_u32(a.v[1], x), vshlq_u32(a.v[2], x), vshlq_u32(a.v[3], x)}};
}
INLINE I operator>>(I a, int b) { return a << -b; }
INLINE V floats(I a) {
  return {{vcvtq_f32_u32(a.v[0]), vcvtq_f32_u32(a.v[1]), vcvtq_f32_u32(a.v[2]), vcvtq_f32_u32(a.v[3])}};
}
INLINE I bytes(const void* p) {
  const uint8x16_t b = vld1q_u8((const uint8_t*)p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(b)), high = vmovl_u8(vget_high_u8(b));
  return {{vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)), vmovl_u16(vget_low_u16(high)), vmovl_u16(vget_high_u16(high))}};
}
INLINE V from_int8(const void* p) {
  const int8x16_t b = vld1q_s8((const int8_t*)p);
  const int16x8_t low = vmovl_s8(vget_low_s8(b)), high = vmovl_s8(vget_high_s8(b));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
INLINE float32x4_t four_bfloat16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE V from_bfloat16(const void* p) {
  const uint16_t* h = (const uint16_t*)p;
  return {{four_bfloat16(h), four_bfloat16(h + 4), four_bfloat16(h + 8), four_bfloat16(h + 12)}};
}
INLINE float32x4_t four_float16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE V from_float16(const void* p) {
  const uint16_t* h = (const uint16_t*)p;
  return {{four_float16(h), four_float16(h + 4), four_float16(h + 8), four_float16(h + 12)}};
}
INLINE I sixteens(uint32_t bits) {
  const uint32_t ones[4] = {1, 2, 4, 8};
  const uint32x4_t each = vld1q_u32(ones);
  auto set = [&](uint32_t four) { return vandq_u32(vtstq_u32(vdupq_n_u32(four), each), vdupq_n_u32(16)); };
  return {{set(bits), set(bits >> 4), set(bits >> 8), set(bits >> 12)}};
}
INLINE float32x4_t four_rounded(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t near = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vreinterpretq_f32_u32(vandq_u32(vbslq_u32(vceqq_f32(v, v), near, quiet), vdupq_n_u32(0xffff0000)));
}
INLINE V to_bfloat16(V v) { return {{four_rounded(v.v[0]), four_rounded(v.v[1]), four_rounded(v.v[2]), four_rounded(v.v[3])}}; }
INLINE float32x4_t four_power(float32x4_t v, float32x4_t n) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(vcvtq_s32_f32(n), 23)));
}
INLINE V times_power(V v, V n) {
  return {{four_power(v.v[0], n.v[0]), four_power(v.v[1], n.v[1]), four_power(v.v[2], n.v[2]), four_power(v.v[3], n.v[3])}};
}

// The sums of four vectors, each added up as a tree: lanes 8 apart, then 4, 2, 1.
INLINE void sums(V a, V b, V c, V d, float* out) {
  auto four = [](V x) { return vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3])); };
  auto one = [](float32x4_t x) {
    const float32x2_t pair = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
  };
  out[0] = one(four(a)), out[1] = one(four(b)), out[2] = one(four(c)), out[3] = one(four(d));
}

#else

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));

INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE V all(float f) { return V{f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f}; }
INLINE float first(V v) { return v[0]; }
INLINE V madd(V a, V b, V c) { return a * b + c; }  // rounded once where the processor can
INLINE V to_bfloat16(V v) {
  const I bits = (I)v, near = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
  return (V)((v == v ? near : quiet) & (int32_t)0xffff0000);
}

#if defined(LANES_AVX512)
INLINE V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE V smaller(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE V floats(I i) { return (V)_mm512_cvtepi32_ps((__m512i)i); }
INLINE I bytes(const void* p) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE V from_int8(const void* p) { return floats((I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE V from_bfloat16(const void* p) {
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLINE V from_float16(const void* p) { return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE I sixteens(uint32_t bits) { return (I)_mm512_maskz_set1_epi32((__mmask16)bits, 16); }
INLINE V times_power(V v, V n) { return (V)_mm512_scalef_ps((__m512)v, (__m512)n); }
#else
INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE V smaller(V a, V b) { return a < b ? a : b; }
INLINE V floats(I i) { return __builtin_convertvector(i, V); }
INLINE I bytes(const void* p) {
  uint8_t b[16];
  I i;
  __builtin_memcpy(b, p, sizeof b);
  for (int j = 0; j < 16; j++) i[j] = b[j];
  return i;
}
INLINE V from_int8(const void* p) {
  int8_t b[16];
  V v;
  __builtin_memcpy(b, p, sizeof b);
  for (int j = 0; j < 16; j++) v[j] = b[j];
  return v;
}
INLINE V from_bfloat16(const void* p) {
  uint16_t h[16];
  I i;
  __builtin_memcpy(h, p, sizeof h);
  for (int j = 0; j < 16; j++) i[j] = (int32_t)((uint32_t)h[j] << 16);
  return (V)i;
}
INLINE float half(uint16_t h);
INLINE V from_float16(const void* p) {
  uint16_t h[16];
  V v;
  __builtin_memcpy(h, p, sizeof h);
  for (int j = 0; j < 16; j++) v[j] = half(h[j]);
  return v;
}
INLINE I sixteens(uint32_t bits) {
  I i;
  for (int j = 0; j < 16; j++) i[j] = (int32_t)(bits >> j & 1) << 4;
  return i;
}
INLINE V times_power(V v, V n) { return (V)((I)v + (__builtin_convertvector(n, I) << 23)); }
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(PICK)
#define PICK(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

// The sums of four vectors, each added up as a tree: lanes 8 apart, then 4, 2, 1.
INLINE void sums(V a, V b, V c, V d, float* out) {
  V ab = PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  V cd = PICK(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         PICK(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  V t = PICK(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        PICK(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  t = t + PICK(t, t, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  t = t + PICK(t, t, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  out[0] = t[0], out[1] = t[4], out[2] = t[8], out[3] = t[12];
}

#endif

INLINE V zero() { return all(0.0f); }
INLINE V from_uint8(const void* p) { return floats(bytes(p)); }
INLINE float sum(V v) {
  float out[4];
  sums(v, v, v, v, out);
  return out[0];
}
INLINE float largest(V v) {
  float f[16], m;
  store(f, v);
  m = f[0];
  for (int i = 1; i < 16; i++) m = f[i] > m ? f[i] : m;
  return m;
}

// Threads of XLA take subnormal floats for zero, so none may occur on the way.
INLINE float half(uint16_t h) {
  const uint32_t magnitude = h & 0x7fff;
  float f = (float)magnitude * 0x1p-24f;
  if (magnitude >= 0x0400) {
    const uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000 : 0x38000000);
    __builtin_memcpy(&f, &bits, 4);
  }
  return h & 0x8000 ? -f : f;
}

// 2 to the power of exponent - 127, for a normal float's biased exponent.
INLINE float power(int exponent) {
  const uint32_t bits = (uint32_t)exponent << 23;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// e^x to 2 units in the last place, for x from -87 to 88; beyond, that of the bound.
INLINE V exponential(V x) {
  x = smaller(larger(x, all(-87.0f)), all(88.0f));
  const V n = madd(x, all(1.44269504f), all(12582912.0f)) - all(12582912.0f);  // rounded to a whole number
  const V r = madd(n, all(-1.42860677e-6f), madd(n, all(-0.693145752f), x));
  V p = all(1.9875691500e-4f);
  p = madd(p, r, all(1.3981999507e-3f));
  p = madd(p, r, all(8.3334519073e-3f));
  p = madd(p, r, all(4.1665795894e-2f));
  p = madd(p, r, all(1.6666665459e-1f));
  p = madd(p, r, all(5.0000001201e-1f));
  return times_power(madd(p, r * r, r + all(1.0f)), n);
}

// The nearest 16-bit float, to even between two; beyond the largest, the largest. `f` is finite.
INLINE uint16_t to_half(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7bff);
  if (magnitude >= 0x38800000) return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  const int shift = 126 - (int)(magnitude >> 23);
  if (shift > 24) return (uint16_t)sign;
  const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000, rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
  const uint32_t down = mantissa >> shift;
  return (uint16_t)(sign | (down + (rest > middle || (rest == middle && (down & 1)))));
}

// Sixteen numbers of a cache, which is of floats, of 16-bit floats or of codes of 8 bits.
INLINE V entries(const float* p) { return load(p); }
INLINE V entries(const uint16_t* p) { return from_float16(p); }
INLINE V entries(const int8_t* p) { return from_int8(p); }
INLINE void enter(float* p, float f) { *p = f; }
INLINE void enter(uint16_t* p, float f) { *p = to_half(f); }
