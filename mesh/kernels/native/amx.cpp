// Products of 16 outputs with 16 rows at a time, where the processor multiplies tiles (AMX): of bfloat16, and of codes of 4, 6 and 8 bits with
// whole numbers, which have the same bits as those of whole.inc. All else is avx512bf16.cpp's.
//
// tests/native/imitated_tiles.h has the instructions in plain C++, for processors without them.
#include "weight.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <immintrin.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16,avx2,fma,f16c")
#endif
#define LANES_AVX512 1
#define LANES_VNNI 1

// The compiler does not know what a tile reads: what was written before must be in memory.
#define WRITTEN() __asm__ volatile("" ::: "memory")
#if !defined(IMITATED_TILES)
#define TILE_SHAPES(shapes) _tile_loadconfig(shapes)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, apart) _tile_loadd(t, from, apart)
#define TILE_STORE(t, to, apart) _tile_stored(t, to, apart)
#define TILE_ADD_BFLOAT16(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_ADD_DIGITS(c, a, b) _tile_dpbsud(c, a, b)
#endif

namespace kernels {
namespace in_amx {
#include "products.inc"

// What each of the eight tiles holds, as the processor reads it: sums are 0 to 3, left sides 4 and 5, right sides 6 and 7.
class Shapes {
 public:
  // rows and bytes of a row of the sums, the left and the right sides
  void set(int rows, int columns, int left_bytes) {
    if (rows == rows_ && columns == columns_ && left_bytes == left_bytes_) return;
    rows_ = rows, columns_ = columns, left_bytes_ = left_bytes;
    Layout layout = {};
    layout.palette = 1;
    for (int t = 0; t < 8; t++) {
      layout.rows[t] = (uint8_t)(t < 6 ? rows : left_bytes / 4);
      layout.bytes[t] = (uint16_t)(t == 4 || t == 5 ? left_bytes : columns * 4);
    }
    WRITTEN();
    TILE_SHAPES(&layout);
  }
  ~Shapes() {
    if (rows_) TILE_RELEASE();
  }

 private:
  struct alignas(64) Layout {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  int rows_ = 0, columns_ = 0, left_bytes_ = 0;
};

// -- bfloat16 ------------------------------------------------------------------------------------------------------------

// Rows lie in panels of 16: two elements of each of the 16, then the next two of each.
static void to_rounded(const float* x, int64_t in, int64_t row, uint16_t* to) {
  uint16_t* panel = to + row / 16 * 16 * in + row % 16 * 2;
  for (int64_t k = 0; k < in; k += 2) {
    uint32_t two[2];
    __builtin_memcpy(two, x + k, sizeof two);
    const uint32_t pair = two[0] >> 16 | (two[1] & 0xffff0000);
    __builtin_memcpy(panel + k * 16, &pair, sizeof pair);
  }
}

// The sums [outputs, rows] of a tile to the rows of the result. Only `outputs` of 16 and `rows` of 16 are there.
static void put_sums(const Tile& t, int64_t o, int outputs, int64_t r, int rows, const float* sums) {
  B turned[16];
  UNROLL for (int i = 0; i < 16; i++) turned[i] = _mm512_loadu_si512(sums + i * 16);
  turn(turned);
  for (int i = 0; i < rows; i++) {
    const V y[1] = {(V)turned[i]};
    put_lanes<1>(t, r + i, o, outputs, y);
  }
}

// The outputs from o on with the rows from r on: `outputs` of them, or 32; `rows` of them, or 32.
template <bool more_outputs, bool more_rows>
static void tiles_of_bfloat16(const Tile& t, Shapes& shapes, int64_t o, int outputs, int64_t r, int rows) {
  const int64_t in = t.weight->in;
  const uint16_t* w = (const uint16_t*)t.weight->codes + o * in;
  const uint16_t *x = t.rounded + r * in, *after = x + 16 * in;
  shapes.set(outputs, rows, 64);
  TILE_ZERO(0);
  if constexpr (more_outputs) TILE_ZERO(1);
  if constexpr (more_rows) TILE_ZERO(2);
  if constexpr (more_outputs && more_rows) TILE_ZERO(3);
  for (int64_t k = 0; k < in; k += 32) {
    TILE_LOAD(4, w + k, in * 2);
    TILE_LOAD(6, x + k * 16, 64);
    TILE_ADD_BFLOAT16(0, 4, 6);
    if constexpr (more_outputs) {
      TILE_LOAD(5, w + 16 * in + k, in * 2);
      TILE_ADD_BFLOAT16(1, 5, 6);
    }
    if constexpr (more_rows) {
      TILE_LOAD(7, after + k * 16, 64);
      TILE_ADD_BFLOAT16(2, 4, 7);
    }
    if constexpr (more_outputs && more_rows) TILE_ADD_BFLOAT16(3, 5, 7);
  }
  alignas(64) float sums[16 * 16] = {};
  WRITTEN();
  TILE_STORE(0, sums, 64);
  put_sums(t, o, outputs, r, rows, sums);
  if constexpr (more_outputs) {
    TILE_STORE(1, sums, 64);
    put_sums(t, o + 16, outputs, r, rows, sums);
  }
  if constexpr (more_rows) {
    TILE_STORE(2, sums, 64);
    put_sums(t, o, outputs, r + 16, rows, sums);
  }
  if constexpr (more_outputs && more_rows) {
    TILE_STORE(3, sums, 64);
    put_sums(t, o + 16, outputs, r + 16, rows, sums);
  }
}

static void products_of_bfloat16(const Tile& t) {
  Shapes shapes;
  WRITTEN();
  for (int64_t r = 0; r < t.rows;) {
    const bool two = t.rows - r >= 32;
    const int rows = (int)(t.rows - r < 16 ? t.rows - r : 16);
    int64_t o = t.first;
    for (; o + 32 <= t.last; o += 32) two ? tiles_of_bfloat16<true, true>(t, shapes, o, 16, r, 16) : tiles_of_bfloat16<true, false>(t, shapes, o, 16, r, rows);
    for (; o < t.last; o += 16) {
      const int outputs = (int)(t.last - o < 16 ? t.last - o : 16);
      two ? tiles_of_bfloat16<false, true>(t, shapes, o, outputs, r, 16) : tiles_of_bfloat16<false, false>(t, shapes, o, outputs, r, rows);
    }
    r += two ? 32 : 16;
  }
}

static bool reads_rounded(const Weight& w) { return w.kind == kBfloat16 && w.in % 32 == 0; }

// -- codes with whole numbers --------------------------------------------------------------------------------------------------

constexpr int64_t kLeastRows = 8;  // that are worth tiles

// `rows` rows from r on, with 16 outputs whose codes are in the processor's cache, [blocks, 8] times 64 bytes.
template <int kind>
static void rows_of_codes(const Tile& t, Shapes& shapes, Lanes<kind>& lanes, const B* codes, int64_t r, int rows, int64_t o) {
  const int64_t blocks = t.weight->in / 32, apart = blocks * (int64_t)sizeof(Whole);
  const Whole* x = t.whole + r * blocks;
  const int parts = kind == kSixBitTiles && lanes.shift == 4 ? 2 : 1, words = 8 / parts;
  shapes.set(rows, 16, words * 4);
  V acc[16];
  for (int i = 0; i < rows; i++) acc[i] = zero();
  for (int64_t block = 0; block < blocks; block++) {
    const Factored of = lanes.template of_block<true>(block);
    for (int part = 0; part < parts; part++) {
      alignas(64) int32_t sums[3][16][16];
      const int8_t* digits = x[block].digits[0] + part * words * 4;
      TILE_LOAD(6, codes + block * 8 + part * words, 64);
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_LOAD(4, digits, apart);
      TILE_ADD_DIGITS(0, 4, 6);
      TILE_LOAD(5, digits + sizeof x->digits[0], apart);
      TILE_ADD_DIGITS(1, 5, 6);
      TILE_LOAD(4, digits + 2 * sizeof x->digits[0], apart);
      TILE_ADD_DIGITS(2, 4, 6);
      TILE_STORE(0, sums[0], 64);
      TILE_STORE(1, sums[1], 64);
      TILE_STORE(2, sums[2], 64);
      for (int i = 0; i < rows; i++) {
        const Whole& w = x[i * blocks + block];
        B sum[3];
        begin<kind>(w, part * words, (part + 1) * words, of.plain, sum);
        UNROLL for (int d = 0; d < 3; d++) sum[d] = _mm512_add_epi32(sum[d], _mm512_load_si512(sums[d][i]));
        add_sums<kind>(joined<kind>(sum, of.plain), w, of, part, acc[i]);
      }
    }
  }
  for (int i = 0; i < rows; i++) {
    const V y[1] = {acc[i]};
    put_lanes<1>(t, r + i, o, 16, y);
  }
}

template <int kind>
static void products_of_codes(const Tile& t) {
  Shapes shapes;
  for (int64_t o = t.first; o < t.last; o += 16) {
    Lanes<kind> lanes(*t.weight, o, 16);
    B* codes = (B*)unpacked.of(t.weight->in / 32 * 8 * 16);
    blocks_of<kind>(t, lanes, o, [&](int64_t block, const B(&some)[8]) __attribute__((always_inline)) {
      UNROLL for (int i = 0; i < 8; i++) codes[block * 8 + i] = some[i];
    });
    WRITTEN();
    for (int64_t r = 0; r < t.rows; r += 16) rows_of_codes<kind>(t, shapes, lanes, codes, r, (int)(t.rows - r < 16 ? t.rows - r : 16), o);
  }
}

static void tile_of_tiles(const Tile& t) {
  if (t.rounded) return products_of_bfloat16(t);
  if (t.whole && t.rows >= kLeastRows) {
    switch (t.weight->kind) {
      case kTiles: return products_of_codes<kTiles>(t);
      case kSixBitTiles: return products_of_codes<kSixBitTiles>(t);
      case kByteTiles: return products_of_codes<kByteTiles>(t);
      default: break;
    }
  }
  avx512vnni()->tile(t);
}

// -- whether they work here ------------------------------------------------------------------------------------------------------

// A product of each kind, beside the same without tiles.
static bool are_right() {
  constexpr int64_t out = 48, in = 64, rows = 21;
  static uint16_t weights[out * in], rounded[2][32 * in];
  static uint8_t codes[out * in];
  static float x[rows * in], scale[out * 2], y[2][rows * out];
  static Whole whole[rows * in / 32];
  uint32_t seed = 1;
  auto next = [&] { return (float)((seed = seed * 1664525 + 1013904223) >> 16) / 32768 - 1; };
  for (float& f : x) f = next();
  for (float& f : scale) f = next();
  for (uint8_t& code : codes) code = (uint8_t)(next() * 127 + 128);
  for (uint16_t& w : weights) {
    const float f = next();
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    w = (uint16_t)(bits >> 16);
  }
  Weight w;
  w.kind = kByteTiles, w.out = out, w.in = in, w.group = 32, w.offset = 128, w.codes = codes, w.scale.data = scale;
  for (int64_t r = 0; r < rows; r++) to_whole(x + r * in, in, whole + r * (in / 32));
  tile_of_tiles(Tile{&w, 0, out, x, rows, in, y[0], nullptr, whole, nullptr});
  avx512vnni()->tile(Tile{&w, 0, out, x, rows, in, y[1], nullptr, whole, nullptr});
  if (__builtin_memcmp(y[0], y[1], sizeof y[0])) return false;
  w = Weight();
  w.kind = kBfloat16, w.out = out, w.in = in, w.codes = weights;
  round(x, rows * in);
  for (int64_t r = 0; r < rows; r++) to_rounded(x + r * in, in, r, rounded[0]), avx512bf16()->to_rounded(x + r * in, in, r, rounded[1]);
  tile_of_tiles(Tile{&w, 0, out, x, rows, in, y[0], nullptr, nullptr, rounded[0]});
  avx512bf16()->tile(Tile{&w, 0, out, x, rows, in, y[1], nullptr, nullptr, rounded[1]});
  for (int64_t i = 0; i < rows * out; i++)
    if (!(__builtin_fabsf(y[0][i] - y[1][i]) < 1e-4f)) return false;
  return true;
}

}  // namespace in_amx
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// A process has to ask for tiles. Some virtual machines say that they have them and end a program that uses one, so a child tries it first.
bool amx_works() {
#if defined(IMITATED_TILES)
  return in_amx::are_right();
#else
  constexpr int kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kAskFor, kTileData)) return false;
  const pid_t child = fork();
  if (child < 0) return false;
  if (!child) {
    const rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    signal(SIGILL, SIG_DFL), signal(SIGSEGV, SIG_DFL);
    _exit(in_amx::are_right() ? 0 : 1);
  }
  int status = 1;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
  return WIFEXITED(status) && !WEXITSTATUS(status);
#endif
}

const Kernels* amx() {
  static const Kernels these = [] {
    Kernels k = *avx512bf16();
    k.name = "amx", k.tile = in_amx::tile_of_tiles, k.reads_rounded = in_amx::reads_rounded, k.to_rounded = in_amx::to_rounded;
    return k;
  }();
  return &these;
}
}  // namespace kernels
#else
namespace kernels {
bool amx_works() { return false; }
const Kernels* amx() { return nullptr; }
}  // namespace kernels
#endif
