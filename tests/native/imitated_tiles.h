// The tile instructions of AMX in plain C++, as Intel's manual defines them, for mesh/kernels/native/amx.cpp on processors without them: give
// it to the compiler with -include. What a processor refuses ends the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define IMITATED_TILES 1

namespace imitated {

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64] = {};
};
inline thread_local Tile tiles[8];

inline void need(bool right, const char* what) {
  if (right) return;
  std::printf("imitated tiles: %s\n", what);
  std::abort();
}

inline void shapes(const void* layout) {
  const uint8_t* l = (const uint8_t*)layout;
  need((uintptr_t)layout % 64 == 0 && l[0] == 1 && l[1] == 0, "a layout is not of palette 1");
  for (int t = 0; t < 8; t++) {
    uint16_t bytes;
    std::memcpy(&bytes, l + 16 + 2 * t, 2);
    need(bytes <= 64 && l[48 + t] <= 16 && !bytes == !l[48 + t], "a tile has another size than can be");
    tiles[t] = Tile{};
    tiles[t].rows = l[48 + t], tiles[t].bytes = bytes;
  }
}
inline void release() {
  for (Tile& t : tiles) t = Tile{};
}
inline void zero(Tile& t) {
  need(t.rows > 0, "a tile without a size is used");
  std::memset(t.data, 0, sizeof t.data);
}
inline void load(Tile& t, const void* from, int64_t apart) {
  zero(t);
  for (int r = 0; r < t.rows; r++) std::memcpy(t.data[r], (const char*)from + r * apart, (size_t)t.bytes);
}
inline void store(const Tile& t, void* to, int64_t apart) {
  need(t.rows > 0, "a tile without a size is used");
  for (int r = 0; r < t.rows; r++) std::memcpy((char*)to + r * apart, t.data[r], (size_t)t.bytes);
}
inline void fit(const Tile& c, const Tile& a, const Tile& b) {
  need(c.rows > 0 && c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows, "tiles of other sizes are multiplied");
  need(&a != &b && &a != &c && &b != &c, "a tile is named twice");
}
inline float wide(const uint8_t* p) {  // subnormal numbers are zero
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = (half & 0x7f80 ? (uint32_t)half : half & 0x8000u) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void add_bfloat16(Tile& c, const Tile& a, const Tile& b) {
  fit(c, a, b);
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.bytes / 4; n++) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < a.bytes / 4; k++) {
        even = std::fmaf(wide(a.data[m] + 4 * k), wide(b.data[k] + 4 * n), even);
        odd = std::fmaf(wide(a.data[m] + 4 * k + 2), wide(b.data[k] + 4 * n + 2), odd);
      }
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      sum += even + odd;
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}
inline void add_digits(Tile& c, const Tile& a, const Tile& b) {  // signed bytes times unsigned ones
  fit(c, a, b);
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.bytes / 4; n++) {
      int32_t sum;
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < a.bytes / 4; k++)
        for (int i = 0; i < 4; i++) sum += (int8_t)a.data[m][4 * k + i] * b.data[k][4 * n + i];
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

}  // namespace imitated

#define TILE_SHAPES(layout) imitated::shapes(layout)
#define TILE_RELEASE() imitated::release()
#define TILE_ZERO(t) imitated::zero(imitated::tiles[t])
#define TILE_LOAD(t, from, apart) imitated::load(imitated::tiles[t], from, apart)
#define TILE_STORE(t, to, apart) imitated::store(imitated::tiles[t], to, apart)
#define TILE_ADD_BFLOAT16(c, a, b) imitated::add_bfloat16(imitated::tiles[c], imitated::tiles[a], imitated::tiles[b])
#define TILE_ADD_DIGITS(c, a, b) imitated::add_digits(imitated::tiles[c], imitated::tiles[a], imitated::tiles[b])
