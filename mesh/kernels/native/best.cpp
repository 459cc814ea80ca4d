// The choice among the kernels, once for a process.
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "weight.h"

namespace kernels {

namespace {

// What the processor can do and the system saves the registers of. __builtin_cpu_supports is not asked: some compilers that can build this
// link a form of it that always says no.
struct Processor {
#if defined(__x86_64__)
  unsigned basic = 0, extended = 0, more = 0;  // ECX of leaf 1, EBX and ECX of leaf 7
  unsigned features = 0, second = 0;           // EDX of leaf 7, EAX of its second part
  unsigned saved = 0;                          // of XCR0

  Processor() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) basic = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) extended = b, more = c, features = d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) second = a;
    if (basic & bit_OSXSAVE) __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  }
  static bool all(unsigned bits, unsigned of) { return (bits & of) == bits; }
  bool avx2() const { return all(6, saved) && all(bit_FMA | bit_F16C, basic) && all(bit_AVX2, extended); }
  bool avx512() const { return all(0xe6, saved) && avx2() && all(bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ, extended); }
  bool vnni() const { return avx512() && all(bit_AVX512VNNI, more); }
  bool bf16() const { return vnni() && all(bit_AVX512BF16, second); }
#if defined(IMITATED_TILES)
  bool tiles() const { return bf16(); }
#else
  bool tiles() const { return all(0x60000, saved) && bf16() && all(kTileFeatures, features); }
  static constexpr unsigned kTileFeatures = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
#endif
#else
  bool avx2() const { return false; }
  bool avx512() const { return false; }
  bool vnni() const { return false; }
  bool bf16() const { return false; }
  bool tiles() const { return false; }
#endif
};

const Kernels& choose() {
  const Processor has;
  const Kernels* usable[] = {has.tiles() && amx_works() ? amx() : nullptr, has.bf16() ? avx512bf16() : nullptr, has.vnni() ? avx512vnni() : nullptr, has.avx512() ? avx512() : nullptr, has.avx2() ? avx2() : nullptr, neon(), portable()};
  const char* wanted = std::getenv("MESH_KERNELS");
  for (const Kernels* each : usable)
    if (each && wanted && !std::strcmp(each->name, wanted)) return *each;
  for (const Kernels* each : usable)
    if (each) return *each;
  return *portable();
}

}  // namespace

const Kernels& best() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace kernels
