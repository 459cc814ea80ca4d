// The kernels on odd shapes, against sums in double precision, with every array exactly as long as it has to be: a read or a write past
// one of them ends this program when it is compiled with -fsanitize=address. Prints "ok N" after N comparisons.
//
//     check_kernels [seed]            MESH_KERNELS names the processor's kernels
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../mesh/kernels/native/pool.h"
#include "../../mesh/kernels/native/weight.h"

using namespace kernels;

namespace {

std::mt19937 source;
int compared = 0;

float normal() { return std::normal_distribution<float>()(source); }
int below(int n) { return (int)(source() % (unsigned)n); }

// Exactly `count` elements, so that one more is out of bounds.
template <typename T>
struct Exact {
  std::unique_ptr<T[]> data;
  size_t count;
  explicit Exact(size_t n) : data(new T[n]()), count(n) {}
  T& operator[](size_t i) { return data[i]; }
  T* get() { return data.get(); }
};

uint16_t to_half(float f) {  // normal numbers only, truncated
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const int exponent = (int)(bits >> 23 & 255) - 127 + 15;
  if (exponent <= 0) return 0;
  return (uint16_t)((bits >> 16 & 0x8000) | (unsigned)exponent << 10 | (bits >> 13 & 1023));
}
double of_half(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const double value = exponent ? std::ldexp(1024 + (h & 1023), exponent - 25) : std::ldexp(h & 1023, -24);
  return h & 0x8000 ? -value : value;
}

void fail(const char* what, double got, double want) {
  std::printf("%s: %.9g where %.9g is right\n", what, got, want);
  std::exit(1);
}

void compare(const char* what, double got, double want, double scale) {
  compared++;
  if (!(std::fabs(got - want) <= 2e-6 * scale + 1e-30)) fail(what, got, want);
}

struct Stored {
  Weight weight;
  std::vector<std::shared_ptr<void>> held;
  std::vector<double> values;  // [out, in]
};

template <typename T>
T* hold(Stored& s, size_t n) {
  auto array = std::make_shared<Exact<T>>(n);
  s.held.push_back(array);
  return array->get();
}

// [out, groups] numbers of `size` bytes -> those of 16 outputs side by side.
void turn(char* data, int64_t out, int64_t groups, int size) {
  std::vector<char> rows(data, data + out * groups * size);
  for (int64_t o = 0; o < out; o++)
    for (int64_t g = 0; g < groups; g++)
      std::memcpy(data + ((o / 16 * groups + g) * 16 + o % 16) * size, rows.data() + (o * groups + g) * size, size);
}

// Factors [out, groups] in some form, and what they are.
Numbers numbers(Stored& s, int64_t out, int64_t groups, int form, std::vector<double>& values, bool tiles) {
  Numbers n;
  values.resize(out * groups);
  const size_t count = out * groups;
  if (form == 0) {
    float* data = hold<float>(s, count);
    for (size_t i = 0; i < count; i++) values[i] = data[i] = normal();
    n.data = data;
  } else if (form == 1) {
    uint16_t* data = hold<uint16_t>(s, count);
    for (size_t i = 0; i < count; i++) data[i] = to_half(normal()), values[i] = of_half(data[i]);
    n.data = data, n.kind = kFloat16;
  } else if (form == 2) {
    int8_t* data = hold<int8_t>(s, count);
    for (size_t i = 0; i < count; i++) values[i] = data[i] = (int8_t)below(16);
    n.data = data, n.kind = kInt8;
  } else {  // in two steps
    n.each = form == 3 ? 8 : 16;
    uint8_t* data = hold<uint8_t>(s, count);
    uint16_t* step = hold<uint16_t>(s, count / n.each);
    for (size_t i = 0; i < count / n.each; i++) step[i] = to_half(normal());
    for (size_t i = 0; i < count; i++) data[i] = (uint8_t)below(64), values[i] = data[i] * of_half(step[i / n.each]);
    n.data = data, n.kind = kUint8, n.step = step, n.step_kind = kFloat16;
  }
  if (tiles) {
    const int size = n.kind == kFloat32 ? 4 : n.kind == kFloat16 ? 2 : 1;
    turn((char*)n.data, out, groups, size);
    if (n.step) turn((char*)n.step, out, groups / n.each, 2);
  }
  return n;
}

Stored stored(Kind kind, int64_t out, int64_t in, int64_t group, int form, int mode) {
  Stored s;
  Weight& w = s.weight;
  w.kind = kind, w.out = out, w.in = in, w.group = group;
  std::vector<double> codes(out * in);
  const size_t count = out * in;
  const bool tiles = kind >= kTiles;
  const int bits = kind == kNibbles || kind == kTiles ? 4 : kind == kFiveBits ? 5 : 6;
  if (kind == kFloat32) {
    float* data = hold<float>(s, count);
    for (size_t i = 0; i < count; i++) codes[i] = data[i] = normal();
    w.codes = data;
  } else if (kind == kFloat16 || kind == kBfloat16) {
    uint16_t* data = hold<uint16_t>(s, count);
    for (size_t i = 0; i < count; i++) {
      const float f = normal();
      uint32_t word;
      std::memcpy(&word, &f, 4);
      data[i] = kind == kFloat16 ? to_half(f) : (uint16_t)(word >> 16);
      word = (uint32_t)data[i] << 16;
      float back;
      std::memcpy(&back, &word, 4);
      codes[i] = kind == kFloat16 ? of_half(data[i]) : back;
    }
    w.codes = data;
  } else if (kind == kByteTiles) {
    uint8_t* data = hold<uint8_t>(s, count);
    w.offset = 128;
    for (size_t i = 0; i < count; i++) data[i] = (uint8_t)below(256), codes[i] = data[i] - 128;
    turn((char*)data, out, in / 4, 4);
    w.codes = data;
  } else if (kind == kInt8 || kind == kUint8) {
    int8_t* data = hold<int8_t>(s, count);
    w.offset = kind == kUint8 ? 16 : 0;
    for (size_t i = 0; i < count; i++) {
      data[i] = (int8_t)below(256);
      codes[i] = kind == kInt8 ? data[i] : (uint8_t)data[i] - w.offset;
    }
    w.codes = data;
  } else {
    uint8_t* data = hold<uint8_t>(s, count / 2);
    uint8_t* high = bits == 4 ? nullptr : hold<uint8_t>(s, kind == kFiveBits ? count / 8 : count / 4);
    w.offset = mode == 1 ? 0 : (float)(1 << (bits - 1));
    for (size_t i = 0; i < count; i++) {
      const int code = below(1 << bits);
      const size_t at = i % 32;
      data[i / 32 * 16 + at % 16] |= (uint8_t)((code & 15) << (at < 16 ? 0 : 4));
      if (kind == kFiveBits) high[i / 8] |= (uint8_t)(code >> 4 << (i % 8));
      if (bits == 6) high[i / 64 * 16 + i % 16] |= (uint8_t)(code >> 4 << (i % 64 / 16 * 2));
      codes[i] = code - w.offset;
    }
    if (tiles) turn((char*)data, out, in / 8, 4);
    if (tiles && high) turn((char*)high, out, in / 16, 4);
    w.codes = data, w.high = high;
  }
  const int64_t groups = w.groups();
  std::vector<double> scale, other;
  if (form >= 0) w.scale = numbers(s, out, groups, form, scale, tiles);
  if (mode == 1) w.minimum = numbers(s, out, groups, form, other, tiles);
  if (mode == 2) w.zero = numbers(s, out, groups, 2, other, tiles);
  s.values.resize(count);
  for (int64_t o = 0; o < out; o++) {
    for (int64_t k = 0; k < in; k++) {
      const int64_t g = o * groups + (group ? k / group : 0);
      double v = codes[o * in + k];
      if (mode == 2) v -= other[g];
      if (form >= 0) v *= scale[g];
      if (mode == 1) v -= other[g];
      s.values[o * in + k] = v;
    }
  }
  return s;
}

// What to_bfloat16() has to make of a number: the nearest, to even between two.
float nearest_bfloat16(float f) {
  if (!std::isfinite(f)) return f;
  const double step = std::ldexp(1, std::max(std::ilogb(f ? f : 1e-38f), -126) - 7);
  return (float)(std::nearbyint(f / step) * step);
}

// `rounds`: the input is rounded to bfloat16.
void check_product(const Stored& s, int64_t rows, bool rounds = false) {
  const Weight& w = s.weight;
  const int64_t stride = (w.in + 15) / 16 * 16;
  Exact<float> x(rows * stride), y(rows * w.out), alone(w.out), residual(rows * w.out), bias(w.out);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < w.in; k++) x[r * stride + k] = normal();
  if (rounds) {
    Exact<float> before(x.count);
    std::copy(x.get(), x.get() + x.count, before.get());
    best().round(x.get(), (int64_t)x.count);
    for (size_t i = 0; i < x.count; i++) compare("rounded", x[i], nearest_bfloat16(before[i]), 0);
  }
  for (size_t i = 0; i < residual.count; i++) residual[i] = normal();
  for (size_t i = 0; i < bias.count; i++) bias[i] = normal();
  Weight biased = w;
  biased.bias = bias.get();
  const bool whole = best().reads_whole && best().reads_whole(w);
  Exact<Whole> numbers(whole ? rows * (w.in / 32) : 0);
  for (int64_t r = 0; whole && r < rows; r++) best().to_whole(x.get() + r * stride, w.in, numbers.get() + r * (w.in / 32));
  const bool pairs = rounds && best().reads_rounded && best().reads_rounded(w);
  Exact<uint16_t> rounded(pairs ? (rows + 15) / 16 * 16 * w.in : 0), own(pairs ? 16 * w.in : 0);
  for (int64_t r = 0; pairs && r < rows; r++) best().to_rounded(x.get() + r * stride, w.in, r, rounded.get());
  const int64_t middle = below((int)w.out + 1) / (w.kind >= kTiles ? 16 : 1) * (w.kind >= kTiles ? 16 : 1);
  for (auto [first, last] : {std::pair<int64_t, int64_t>{0, middle}, {middle, w.out}})
    best().tile(Tile{&biased, first, last, x.get(), rows, stride, y.get(), residual.get(), whole ? numbers.get() : nullptr, pairs ? rounded.get() : nullptr});
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t o = 0; o < w.out; o++) {
      double want = bias[o] + residual[r * w.out + o], scale = std::fabs(want);
      for (int64_t k = 0; k < w.in; k++) {
        want += s.values[o * w.in + k] * x[r * stride + k];
        scale += std::fabs(s.values[o * w.in + k] * x[r * stride + k]);
      }
      compare("product", y[r * w.out + o], want, scale);
    }
  }
  const int64_t r = below((int)rows);
  if (pairs) best().to_rounded(x.get() + r * stride, w.in, 0, own.get());
  best().tile(Tile{&biased, 0, w.out, x.get() + r * stride, 1, stride, alone.get(), residual.get() + r * w.out,
                   whole ? numbers.get() + r * (w.in / 32) : nullptr, pairs ? own.get() : nullptr});
  if (std::memcmp(alone.get(), y.get() + r * w.out, w.out * 4)) fail("a row alone differs from the same row among others", r, rows);
}

void products() {
  const int rows[] = {1, 2, 3, 4, 5, 8, 13, 33};
  for (int round = 0; round < 40; round++) {
    const int64_t out = 1 + below(37), odd = 1 + below(150), blocks = 64 * (1 + below(4));
    for (Kind kind : {kFloat32, kFloat16, kBfloat16}) check_product(stored(kind, out, odd, 0, -1, 0), rows[below(8)]);
    check_product(stored(kBfloat16, out, odd, 0, -1, 0), rows[below(8)], true);
    check_product(stored(kBfloat16, out, 32 * (1 + below(9)), 0, -1, 0), rows[below(8)], true);
    check_product(stored(kBfloat16, 1 + below(100), 32 * (1 + below(9)), 0, -1, 0), 1 + below(70), true);
    check_product(stored(kInt8, out, odd, 0, below(2), 0), rows[below(8)], true);
    check_product(stored(kInt8, out, odd, 0, below(2), 0), rows[below(8)]);
    for (int64_t group : {16, 32, 64}) {
      check_product(stored(kInt8, out, odd, group, below(2), 0), rows[below(8)]);
      check_product(stored(kInt8, out, odd, group, below(2), 2), rows[below(8)]);
      check_product(stored(kUint8, out, odd, group, below(2), 1), rows[below(8)]);
      check_product(stored(kUint8, out, odd, group, below(2), 2), rows[below(8)]);
      for (int mode : {0, 1, 2}) check_product(stored(kNibbles, out, blocks, group, below(3), mode), rows[below(8)]);
    }
    check_product(stored(kNibbles, out, 32 * (1 + below(9)), 32, below(3), below(2)), rows[below(8)]);
    check_product(stored(kNibbles, out, 32 * (1 + below(9)), 0, below(3), below(3)), rows[below(8)]);
    for (int64_t group : {0, 32, 64}) {
      Weight tiles;
      tiles.kind = kTiles, tiles.out = 16, tiles.in = 64, tiles.group = group;
      if (!best().reads_whole || !best().reads_whole(tiles)) break;
      for (int mode : {0, 1, 2})
        check_product(stored(kTiles, 16 * (1 + below(4)), 64 * (1 + below(4)), group, below(3), mode), rows[below(8)]);
      check_product(stored(kTiles, 16 * (1 + below(4)), 32 * (1 + below(9)), 32, below(3), below(3)), rows[below(8)]);
      check_product(stored(kTiles, 16 * (1 + below(4)), 256 * (1 + below(2)), 32, 3, below(2)), rows[below(8)]);
      for (int mode : {0, 2}) check_product(stored(kByteTiles, 16 * (1 + below(4)), 64 * (1 + below(4)), group, below(2), mode), rows[below(8)]);
      check_product(stored(kByteTiles, 16 * (1 + below(4)), 32 * (1 + below(9)), below(2) * 32, below(2), 0), rows[below(8)]);
      check_product(stored(kSixBitTiles, 16 * (1 + below(4)), 64 * (1 + below(4)), group ? group / 2 : 0, below(2), 0), rows[below(8)]);
      check_product(stored(kSixBitTiles, 16 * (1 + below(4)), 256 * (1 + below(2)), 16, 4, 0), rows[below(8)]);
    }
    for (int mode : {0, 1}) {
      check_product(stored(kNibbles, out, 256 * (1 + below(2)), 32, 3, mode), rows[below(8)]);
      check_product(stored(kFiveBits, out, 256 * (1 + below(2)), 32, 3, mode), rows[below(8)]);
      check_product(stored(kFiveBits, out, 32 * (1 + below(9)), 16 << below(3), below(2), mode), rows[below(8)]);
    }
    check_product(stored(kSixBits, out, 256 * (1 + below(2)), 16, 4, 0), rows[below(8)]);
  }
}

void norms() {
  for (int round = 0; round < 40; round++) {
    const int64_t in = 1 + below(100), rows = 1 + below(4), stride = (in + 15) / 16 * 16;
    Exact<float> x(rows * in), up(rows * in), scale(in), y(rows * stride);
    for (size_t i = 0; i < x.count; i++) x[i] = 3 * normal(), up[i] = normal();
    for (size_t i = 0; i < scale.count; i++) scale[i] = normal();
    best().rms_norm(x.get(), scale.get(), 1e-5f, rows, in, stride, y.get());
    for (int64_t r = 0; r < rows; r++) {
      double squares = 0;
      for (int64_t k = 0; k < in; k++) squares += (double)x[r * in + k] * x[r * in + k];
      for (int64_t k = 0; k < stride; k++) {
        const double want = k < in ? x[r * in + k] / std::sqrt(squares / in + 1e-5) * scale[k] : 0;
        compare("norm", y[r * stride + k], want, 1 + std::fabs(want));
      }
    }
    for (int activation : {kSilu, kGeluTanh}) {
      best().gated(activation, x.get(), up.get(), rows, in, stride, y.get());
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t k = 0; k < stride; k++) {
          double want = 0;
          if (k < in) {
            const double g = x[r * in + k];
            want = activation == kSilu ? g / (1 + std::exp(-g)) : 0.5 * g * (1 + std::tanh(0.7978845608 * (g + 0.044715 * g * g * g)));
            want *= up[r * in + k];
          }
          compare("activation", y[r * stride + k], want, 1 + std::fabs(want));
        }
      }
    }
  }
}

// The segments of a step: tokens of different rows, and of some rows several, one after the other.
void segments(Attention& a, int32_t* rows, int32_t* positions) {
  std::vector<int32_t> free(a.cache_rows);
  for (size_t i = 0; i < free.size(); i++) free[i] = (int32_t)i;
  std::shuffle(free.begin(), free.end(), source);
  for (int64_t t = 0; t < a.tokens;) {
    const int64_t left = a.tokens - t, most = (int64_t)free.size() == 1 ? left : 1 + below((int)left);
    const int64_t count = (int64_t)free.size() == 1 ? left : most, start = below((int)(a.length - count) + 1);
    for (int64_t i = 0; i < count; i++, t++) rows[t] = free.back(), positions[t] = (int32_t)(start + i);
    free.pop_back();
  }
}

// Each way to compute the same: all spans of an item in one piece, or one by one.
void attend(Attention& a, bool whole, float* partials) {
  a.partials = whole ? nullptr : partials;
  for (int64_t item = 0; item < a.tokens * a.kv_heads; item++) best().attention_write(a, item);
  for (int64_t item = 0; item < a.block_count * a.kv_heads; item++) {
    if (whole) {
      best().attention_whole(a, item);
      continue;
    }
    for (int64_t span = 0; span < a.spans; span++) best().attention_span(a, item, span);
    best().attention_merge(a, item);
  }
}

// The last token of the step alone has the same bits: its keys are in the cache by now.
void check_alone(const Attention& all, const float* context) {
  Attention a = all;
  const int64_t t = all.tokens - 1;
  a.tokens = 1, a.block_count = 1, a.spans = all.positions[t] / kSpan + 1;
  if (all.positions[t] >= all.length) return;
  a.q += t * a.heads * a.dim, a.k += t * a.kv_heads * a.dim, a.v += t * a.kv_heads * a.dim;
  if (a.cos) a.cos += t * a.half, a.sin += t * a.half;
  a.positions += t, a.writes += t, a.rows += t;
  const int32_t blocks[] = {0, 1};
  Exact<float> out(a.heads * a.dim), queries(a.heads * a.dim), partials(attention_partials(a, 1, a.heads));
  a.blocks = blocks, a.out = out.get(), a.queries = queries.get();
  attend(a, below(2), partials.get());
  if (std::memcmp(out.get(), context, out.count * 4)) fail("a token alone differs from the same token among others", t, all.tokens);
}

// A cache of floats, of 16-bit floats, or of codes with a scale after each `dim` of them.
struct Cache {
  Kind kind;
  size_t dim;
  Exact<float> floats;
  Exact<uint16_t> words;
  Exact<int8_t> codes;
  Cache(Kind kind, size_t heads, size_t dim)
      : kind(kind), dim(dim), floats(kind == kFloat32 ? heads * dim : 0), words(kind == kFloat16 ? heads * dim : 0), codes(kind == kInt8 ? heads * (dim + 4) : 0) {
    for (size_t i = 0; i < floats.count; i++) floats[i] = normal();
    for (size_t i = 0; i < codes.count; i++) codes[i] = (int8_t)(below(255) - 127);
    for (size_t head = 0; codes.count && head < heads; head++) {
      const float scale = std::fabs(normal()) / 64;
      std::memcpy(&codes[head * (dim + 4) + dim], &scale, 4);
    }
    for (size_t i = 0; i < words.count; i++) words[i] = (uint16_t)(0x2c00 + below(0x1400)) | (uint16_t)(below(2) << 15);  // 1/16 .. 4
  }
  void* get() { return kind == kInt8 ? (void*)codes.get() : kind == kFloat16 ? (void*)words.get() : (void*)floats.get(); }
  double scale(size_t head) {
    float f;
    std::memcpy(&f, &codes[head * (dim + 4) + dim], 4);
    return f;
  }
  double operator[](size_t i) {
    if (kind == kInt8) return codes[i / dim * (dim + 4) + i % dim] * scale(i / dim);
    return kind == kFloat16 ? of_half(words[i]) : floats[i];
  }
  // Whether `written` is what a cache keeps of `value`, which is known to some 1e-6.
  void check(size_t i, double value) {
    if (kind == kFloat32) return compare("key", floats[i], value, 2 + std::fabs(value));
    if (kind == kInt8) {
      if (std::fabs((*this)[i] - value) > scale(i / dim) * 0.5001 + 1e-5 * (2 + std::fabs(value))) fail("a key of 8 bits is not the nearest", (*this)[i], value);
      return;
    }
    const double step = std::fmax(std::ldexp(1, -24), std::ldexp(1, std::ilogb(value ? value : 1e-30) - 10));
    if (std::fabs(of_half(words[i]) - value) > step / 2 + 1e-5 * (2 + std::fabs(value))) fail("a key of 16 bits is not the nearest", (int64_t)i, words[i]);
  }
};

void attention() {
  for (int round = 0; round < 90; round++) {
    Attention a{};
    a.tokens = 1 + below(below(3) ? 40 : 3), a.kv_heads = 1 + below(3), a.heads = a.kv_heads * (1 + below(6));
    a.dim = below(2) ? 16 * (1 + below(6)) : 2 + below(99);
    a.length = a.tokens + below(600), a.slots = a.length + 16, a.cache_rows = 1 + below(5);
    a.half = below(3) ? a.dim / 2 : below((int)a.dim / 2) + 1;
    a.interleaved = below(2), a.window = below(3) ? 0 : 1 + below(300), a.softcap = below(3) ? 0 : 20, a.scale = 0.2f;
    Exact<float> q(a.tokens * a.heads * a.dim), k(a.tokens * a.kv_heads * a.dim), v(k.count), cos(a.tokens * a.half), sin(cos.count);
    const Kind kinds[] = {kFloat32, kFloat16, kInt8};
    a.cache = kinds[below(3)];
    const size_t held = a.cache_rows * a.kv_heads * a.slots;
    Cache keys(a.cache, held, a.dim), values(a.cache, held, a.dim);
    Exact<float> out(q.count), other(q.count), queries(q.count);
    for (auto* array : {&q, &k, &v, &cos, &sin})
      for (size_t i = 0; i < array->count; i++) (*array)[i] = normal();
    Exact<int32_t> positions(a.tokens), writes(a.tokens), row(a.tokens), blocks(a.tokens + 1);
    segments(a, row.get(), positions.get());
    int64_t last = 0;
    for (int64_t b = 0; b < a.tokens; b++) writes[b] = positions[b], last = std::max<int64_t>(last, positions[b]);
    a.q = q.get(), a.k = k.get(), a.v = v.get(), a.keys = keys.get(), a.values = values.get(), a.out = out.get();
    a.positions = positions.get(), a.writes = writes.get(), a.rows = row.get(), a.queries = queries.get();
    a.spans = last / kSpan + 1, a.block_count = attention_blocks(a, blocks.get()), a.blocks = blocks.get();
    if (below(4)) a.cos = cos.get(), a.sin = sin.get();
    Exact<float> partials(attention_partials(a, a.tokens, a.heads));
    attend(a, false, partials.get());
    a.out = other.get();
    attend(a, true, partials.get());
    if (std::memcmp(out.get(), other.get(), out.count * 4)) fail("spans one by one differ from all spans in one piece", round, 60);
    check_alone(a, &other[(a.tokens - 1) * a.heads * a.dim]);
    auto turn = [&](const float* x, int64_t b, std::vector<double>& y) {
      y.assign(x, x + a.dim);
      if (!a.cos) return;
      for (int64_t i = 0; i < a.half; i++) {
        const int64_t re = a.interleaved ? 2 * i : i, im = a.interleaved ? re + 1 : i + a.half;
        const double c = cos[b * a.half + i], s = sin[b * a.half + i];
        y[re] = x[re] * c - x[im] * s, y[im] = x[re] * s + x[im] * c;
      }
    };
    std::vector<double> key, query;
    for (int64_t b = 0; b < a.tokens; b++) {
      for (int64_t h = 0; h < a.heads; h++) {
        const int64_t kv = h / (a.heads / a.kv_heads), base = (row[b] * a.kv_heads + kv) * a.slots;
        turn(&k[(b * a.kv_heads + kv) * a.dim], b, key);
        for (int64_t d = 0; d < a.dim; d++) keys.check((base + writes[b]) * a.dim + d, key[d]);
        turn(&q[(b * a.heads + h) * a.dim], b, query);
        const int64_t first = a.window ? std::max<int64_t>(0, positions[b] + 1 - a.window) : 0;
        std::vector<double> p;
        double most = -1e300, total = 0;
        for (int64_t j = first; j <= positions[b]; j++) {
          double score = 0;
          for (int64_t d = 0; d < a.dim; d++) score += query[d] * a.scale * keys[(base + j) * a.dim + d];
          if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
          p.push_back(score), most = std::max(most, score);
        }
        for (double& e : p) total += e = std::exp(e - most);
        for (int64_t d = 0; d < a.dim; d++) {
          double want = 0;
          for (size_t j = 0; j < p.size(); j++) want += p[j] / total * values[(base + first + j) * a.dim + d];
          compare("attention", out[(b * a.heads + h) * a.dim + d], want, 10);
        }
      }
    }
  }
}

void likeliest() {
  const float odd[] = {-INFINITY, INFINITY, NAN, 0.0f, -0.0f, 3e38f};
  for (int round = 0; round < 400; round++) {
    const int64_t count = 1 + below(round % 4 ? 100 : 3000);
    Exact<float> logits(count);
    Exact<uint32_t> allowed((count + 31) / 32);
    const int kind = below(4);
    for (int64_t i = 0; i < count; i++) logits[i] = kind ? (float)(below(9) - 4) : -INFINITY;
    for (int n = below(4); n > 0 && kind > 1; n--) logits[below((int)count)] = odd[below(6)];
    const int sort = below(4);
    for (size_t i = 0; i < allowed.count; i++) allowed[i] = sort == 0 ? 0 : sort == 1 ? ~0u : below(3) ? (uint32_t)source() : 0;
    int64_t want = -1;
    bool unordered = false;
    for (int64_t i = 0; i < count; i++) {
      if (!(allowed[i / 32] >> i % 32 & 1)) continue;
      unordered = unordered || std::isnan(logits[i]);
      if (logits[i] > (want < 0 ? -INFINITY : logits[want])) want = i;
    }
    want = unordered ? count - 1 : want < 0 ? 0 : want;
    compare("the likeliest", best().likeliest(logits.get(), count, allowed.get()), (double)want, 0);
  }
}

// Threads that begin late, or never while a call runs.
struct Lazy {
  std::vector<std::thread> threads;
  int delay;
  int64_t num_threads() const { return 4; }
  template <typename F>
  void Schedule(F f) {
    threads.emplace_back([f, this] {
      std::this_thread::sleep_for(std::chrono::microseconds(delay));
      f();
    });
  }
};

void plans() {
  for (int delay : {0, 50, 20000}) {
    Lazy lazy{{}, delay};
    for (int round = 0; round < 200; round++) {
      struct Call {
        std::atomic<int> first{0}, second{0};
        bool early = false;
      } call;
      Plan* plan = new Plan(&call);
      plan->add(37, [](void* c, int64_t) { ((Call*)c)->first++; });
      plan->add(11, [](void* c, int64_t) {
        if (((Call*)c)->first != 37) ((Call*)c)->early = true;
        ((Call*)c)->second++;
      });
      run(plan, lazy);
      compare("pieces", call.first * 100 + call.second, 37 * 100 + 11, 0);
      if (call.early) fail("a phase began before the one before it was done", 0, 0);
    }
    for (std::thread& t : lazy.threads) t.join();
  }
}

}  // namespace

int main(int argc, char** argv) {
  source.seed(argc > 1 ? (unsigned)std::atoi(argv[1]) : 0);
  products();
  norms();
  attention();
  likeliest();
  plans();
  std::printf("%s: ok %d\n", best().name, compared);
}
