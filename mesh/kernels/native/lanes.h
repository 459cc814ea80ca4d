// Sixteen floats at a time, as the compiler's vector types: one source for every processor. Included once for each, inside its namespace.
// Nothing from the C++ library is called here: a function that is compiled twice for two processors must not be shared between them.

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Unsigned __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE V all(float f) { return V{f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f}; }
INLINE V zero() { return all(0.0f); }
INLINE V iota() { return V{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

INLINE V from_int8(const void* p) {
  Bytes b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, I), V);
}
INLINE I bytes(const void* p) {
  Unsigned b;
  __builtin_memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, I);
}
INLINE V from_uint8(const void* p) { return __builtin_convertvector(bytes(p), V); }
INLINE V from_bfloat16(const void* p) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  I wide = __builtin_convertvector(h, I) << 16;
  return (V)wide;
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

INLINE V from_float16(const void* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  uint16_t h[16];
  float f[16];
  __builtin_memcpy(h, p, sizeof h);
#if defined(__F16C__)
  _mm256_storeu_ps(f, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)h)));
  _mm256_storeu_ps(f + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(h + 8))));
#else
  for (int i = 0; i < 16; i++) f[i] = half(h[i]);
#endif
  return load(f);
#endif
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(PICK)
#define PICK(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

// The sums of four vectors, each added up as a tree: lanes 8 apart, then 4, 2, 1.
INLINE void sums(const V& a, const V& b, const V& c, const V& d, float* out) {
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
INLINE float sum(V v) {
  float out[4];
  sums(v, v, v, v, out);
  return out[0];
}
INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE float largest(V v) {
  float f[16], m;
  store(f, v);
  m = f[0];
  for (int i = 1; i < 16; i++) m = f[i] > m ? f[i] : m;
  return m;
}

// e^x to 2 units in the last place; 0 below -87, the largest number above 88.
INLINE V exponential(V x) {
  x = x < -87.0f ? all(-87.0f) : x;
  V below = x;
  x = x > 88.0f ? all(88.0f) : x;
  V shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer, in the low bits
  V n = shifted - 12582912.0f;
  V r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  V p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  V e = p * (r * r) + r + 1.0f;
  I power = (__builtin_convertvector(n, I) + 127) << 23;
  e = e * (V)power;
  return below <= -87.0f ? zero() : e;
}
