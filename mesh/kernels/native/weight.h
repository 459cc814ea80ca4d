// What the kernels are given: a weight as it is stored, and what one call does with it.
#pragma once

#include <cstdint>

namespace kernels {

// How a number is stored. The first five are types of arrays, the others are codes of a weight.
enum Kind : int32_t { kFloat32, kFloat16, kBfloat16, kInt8, kUint8, kNibbles, kFiveBits, kSixBits, kTiles, kSixBitTiles, kByteTiles };

// One number for each output or group of a weight, [out, groups]: data, or data * step with a step for `each` numbers in a row.
struct Numbers {
  const void* data = nullptr;  // nullptr: there are none
  Kind kind = kFloat32;
  const void* step = nullptr;
  Kind step_kind = kFloat32;
  int64_t each = 1;
};

// A weight [out, in]: (code - offset - zero) * scale - minimum.
//
// Codes of 4, 5 and 6 bits lie in blocks of 32 along `in`. The 16 bytes of a block have the low four bits of code j and, above them, those
// of code j + 16. The fifth bits of a block are 32 bits of `high`, the first one lowest. The upper two bits of 64 codes are 16 bytes of
// `high`: byte j has those of the codes j, j + 16, j + 32 and j + 48, the first ones lowest.
//
// Tiles have the codes of 16 outputs side by side, for kernels that read them as whole numbers: four bytes of each of the 16, then the next
// four of each. So have they the bytes of `high`, and the numbers of groups: the first group's of each of the 16, then the second's. `out` is
// a multiple of 16 then. Codes of 8 bits are from 0 on in tiles, with an offset of 128.
struct Weight {
  Kind kind = kFloat32;
  int64_t out = 0, in = 0;
  int64_t group = 0;  // elements of `in` that share scale, zero and minimum: a power of two; 0, or `in` and more: all of them
  float offset = 0;
  const void* codes = nullptr;
  const uint8_t* high = nullptr;
  Numbers scale, zero, minimum;
  const float* bias = nullptr;  // [out], or nullptr

  int shift() const { return group && group < in ? __builtin_ctzll((uint64_t)group) : 62; }  // group = 1 << shift, if there are several
  int64_t groups() const { return (in + (1LL << shift()) - 1) >> shift(); }
  // Of 8 bits, a scale for a whole output is applied to the sum, not to each weight.
  bool late() const { return kind == kInt8 && scale.data && groups() == 1 && !scale.step && !zero.data && !minimum.data; }
};

// 32 numbers of an input as whole numbers of 24 bits: x = (digit 0 + 256 * digit 1 + 65536 * digit 2) * unit, digits from -128 to 127. The
// unit is a power of two, the smallest in which all 32 have three digits; NaN where one of them is not finite.
struct Whole {
  int8_t digits[3][32];
  int32_t centred;         // what the sum of code * x has more than that of (code - 8) * x, the other way round
  float unit, units, sum;  // sum: of the 32 numbers, which are so many units
  int32_t low[2], high[2];  // of each half: the sums of digit 0, and of digit 1 + 256 * digit 2
};

// Some outputs of a product: y[r, o] = x[r] . weight[o] + bias[o] + residual[r, o]
struct Tile {
  const Weight* weight;
  int64_t first, last;  // outputs
  const float* x;       // [rows, stride], zero from weight->in on to the next multiple of 16
  int64_t rows, stride;
  float* y;               // [rows, out]
  const float* residual;  // [rows, out], or nullptr
  const Whole* whole;     // [rows, in / 32]: x once more, for a weight that is multiplied with whole numbers; else nullptr
  const uint16_t* rounded;  // x once more, in bfloat16 as to_rounded() lays it out, for a weight that is multiplied with that; else nullptr
};

// Attention of some tokens over the cache. Each token has its own row and position; a row may have several tokens, one after the other.
struct Attention {
  int64_t tokens, heads, kv_heads, dim, half;  // half: how many pairs of each head are rotated
  const float *q, *k, *v;                      // [tokens, heads * dim], [tokens, kv_heads * dim]
  const float *cos, *sin;                      // [tokens, half], or nullptr: nothing is rotated
  bool interleaved;                            // pairs side by side, else half a head apart
  const int32_t *positions, *writes, *rows;    // [tokens]
  const int32_t* blocks;                       // [block_count + 1]: where each block begins; see attention_blocks
  int64_t block_count;
  void *keys, *values;                   // the cache [all rows, kv_heads, slots, dim], written in place
  Kind cache;                            // kFloat32, kFloat16; kInt8: each key and value is `dim` codes, and then their scale, a float
  int64_t cache_rows, slots, length;     // length: the most positions that are read
  int64_t window;                        // positions that a token sees, its own included; 0: all
  float scale, softcap;
  float* out;       // [tokens, heads * dim]
  float* queries;   // scratch [tokens, heads * dim]: the rotated queries
  float* partials;  // scratch, see attention_partials; nullptr: each piece of work has its own
  int64_t spans;    // of the longest row
};

inline constexpr int64_t kSpan = 256;          // positions over which sums are made at a time
inline constexpr int64_t kBlockQueries = 32;   // queries that read a key together, if they are of one block

// The blocks of tokens that read their keys together: consecutive positions of one row. `blocks` has room for tokens + 1 numbers. Returns
// how many blocks there are.
inline int64_t attention_blocks(const Attention& a, int32_t* blocks) {
  const int64_t group = a.heads / a.kv_heads, most = group < kBlockQueries ? kBlockQueries / group : 1;
  int64_t count = 0;
  for (int64_t t = 0; t < a.tokens; t++) {
    const bool goes_on = t && a.rows[t] == a.rows[t - 1] && a.positions[t] == a.positions[t - 1] + 1 && t - blocks[count - 1] < most;
    if (!goes_on) blocks[count++] = (int32_t)t;
  }
  blocks[count] = (int32_t)a.tokens;
  return count;
}

// Floats of a head in whole vectors.
inline int64_t attention_padded(const Attention& a) { return (a.dim + 15) / 16 * 16; }
// Floats for the sums of one span: the context, the highest score and the sum.
inline int64_t attention_partial(const Attention& a) { return attention_padded(a) + 16; }
// The same for `tokens` tokens and `heads` heads.
inline int64_t attention_partials(const Attention& a, int64_t tokens, int64_t heads) { return tokens * heads * a.spans * attention_partial(a); }

// The kernels for one kind of processor.
struct Kernels {
  const char* name;
  // Every sum is over 16 lanes, lane l adding the elements l, l + 16, ... in order, or group by group over whole numbers: a row gives the same
  // bits in any company.
  void (*tile)(const Tile&);
  // Whether tile() reads the input of this weight as whole numbers. nullptr: of none.
  bool (*reads_whole)(const Weight&);
  void (*to_whole)(const float* x, int64_t in, Whole* to);
  // x [count] to the nearest bfloat16, to even between two; `count` is a multiple of 16
  void (*round)(float* x, int64_t count);
  // Whether tile() takes the input of this weight in bfloat16, if it is rounded. nullptr: of none.
  bool (*reads_rounded)(const Weight&);
  // Row number `row` of an input, which is rounded already. `to` has room for a multiple of 16 rows.
  void (*to_rounded)(const float* x, int64_t in, int64_t row, uint16_t* to);
  // y [rows, stride] = x [rows, in] / rms * scale
  void (*rms_norm)(const float* x, const float* scale, float epsilon, int64_t rows, int64_t in, int64_t stride, float* y);
  // y [rows, stride] = act(gate) * up
  void (*gated)(int activation, const float* gate, const float* up, int64_t rows, int64_t in, int64_t stride, float* y);
  void (*attention_write)(const Attention&, int64_t item);  // item: token * kv_heads + head
  // item: block * kv_heads + head. All spans of an item, merged; or one span, and merged when all are there (`partials` is given).
  // The sums of a token are made span by span in either way, so its bits depend on nothing but its own row.
  void (*attention_whole)(const Attention&, int64_t item);
  void (*attention_span)(const Attention&, int64_t item, int64_t span);
  void (*attention_merge)(const Attention&, int64_t item);
  // The first index of the largest of `count` numbers among those that `allowed` has a bit for, the lowest bit of a word first; 0 if none
  // of these is more than -inf, the last index if one of them is NaN.
  int32_t (*likeliest)(const float* logits, int64_t count, const uint32_t* allowed);
};

enum Activation : int { kSilu, kGeluTanh };

const Kernels* amx();         // avx512bf16() with products of tiles
bool amx_works();             // whether this process can use them; a child tries it
const Kernels* avx512bf16();  // avx512vnni() with products of bfloat16
const Kernels* avx512vnni();
const Kernels* avx512();
const Kernels* avx2();
const Kernels* neon();
const Kernels* portable();

// The fastest that this processor has; MESH_KERNELS names another one that it has as well.
const Kernels& best();

}  // namespace kernels
