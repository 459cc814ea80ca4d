// Products of narrow weights with the kernels of this processor: one thread, its processor time, from a cache and from memory.
//
//     g++ -O2 -std=c++17 -Wno-psabi bench/kernels.cpp $(ls mesh/kernels/native/*.cpp | grep -v handlers) -pthread -o /tmp/kernels
//     for each in avx512 avx512vnni; do MESH_KERNELS=$each /tmp/kernels; done
//
// Where the kernels read tiles, weights are in tiles, as a stage lays them out. Groups are of 32 inputs, of 6 bits of 16; scales are of 16
// bits. A figure is the lower quartile of 15 rounds.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "../mesh/kernels/native/weight.h"

using namespace kernels;

namespace {

constexpr int64_t kOut = 2048, kIn = 2048, kPiece = 64;
constexpr size_t kLargePage = 2 << 20;

double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// Random weights of one kind, one after the other in large pages.
struct Weights {
  std::vector<Weight> all;
  std::vector<std::vector<uint16_t>> scales;
  uint8_t* memory;

  Weights(int bits, int count) {
    Weight w;
    w.out = kOut, w.in = kIn, w.group = bits == 6 ? 16 : 32;
    w.kind = bits == 4 ? kTiles : bits == 6 ? kSixBitTiles : kByteTiles;
    w.offset = (float)(1 << (bits - 1));
    if (!best().reads_whole || !best().reads_whole(w)) {
      w.kind = bits == 4 ? kNibbles : bits == 6 ? kSixBits : kInt8;
      if (bits == 8) w.offset = 0;
    }
    const size_t codes = kOut * kIn * (bits == 8 ? 8 : 4) / 8, high = bits == 6 ? kOut * kIn / 4 : 0;
    const size_t size = ((codes + high) * count + kLargePage) / kLargePage * kLargePage;
    memory = (uint8_t*)aligned_alloc(kLargePage, size);
    if (!memory) std::abort();
    madvise(memory, size, MADV_HUGEPAGE);
    for (size_t i = 0; i < size; i++) memory[i] = (uint8_t)rand();
    for (int i = 0; i < count; i++) {
      scales.emplace_back(kOut * kIn / w.group);
      for (uint16_t& each : scales.back()) each = (uint16_t)(0x2000 + rand() % 4096);
      w.codes = memory + i * (codes + high), w.high = high ? memory + i * (codes + high) + codes : nullptr;
      w.scale.data = scales.back().data(), w.scale.kind = kFloat16;
      all.push_back(w);
    }
  }
  ~Weights() { free(memory); }
};

double product(const Weights& weights, int rows, int times) {
  std::vector<float> x(rows * kIn), y(rows * kOut);
  for (float& each : x) each = (float)rand() / (float)RAND_MAX - 0.5f;
  std::vector<Whole> whole(rows * kIn / 32);
  std::vector<double> rounds;
  for (int round = 0; round < 15; round++) {
    const double start = seconds();
    for (int i = 0; i < times; i++) {
      const Weight& w = weights.all[i % weights.all.size()];
      const bool reads = best().reads_whole && best().reads_whole(w);
      for (int r = 0; reads && r < rows; r++) best().to_whole(x.data() + r * kIn, kIn, whole.data() + r * kIn / 32);
      for (int64_t o = 0; o < kOut; o += kPiece)
        best().tile(Tile{&w, o, o + kPiece, x.data(), rows, kIn, y.data(), nullptr, reads ? whole.data() : nullptr});
    }
    rounds.push_back((seconds() - start) / times);
  }
  std::sort(rounds.begin(), rounds.end());
  return rounds[rounds.size() / 4];
}

}  // namespace

int main() {
  std::printf("%s, billions of numbers a second\n| bits | from | 1 row | 2 | 4 | 8 | 32 |\n|---|---|---|---|---|---|---|\n", best().name);
  for (int bits : {4, 6, 8}) {
    for (int count : {1, 24}) {
      const Weights weights(bits, count);
      std::printf("| %d | %s |", bits, count > 1 ? "memory" : "a cache");
      for (int rows : {1, 2, 4, 8, 32}) std::printf(" %.1f |", 1e-9 * kOut * kIn * rows / product(weights, rows, count > 1 ? count : 4));
      std::printf("\n");
    }
  }
}
