// Advanced SIMD is part of every 64-bit Arm processor: the compiler uses it for the vector types without being asked.
#include "weight.h"

#if defined(__aarch64__)
#include <cstdlib>
#define NAME "neon"

namespace kernels {
namespace in_neon {
#include "products.inc"
}
const Kernels* neon() { return &in_neon::kernels_here; }
}  // namespace kernels
#else
namespace kernels {
const Kernels* neon() { return nullptr; }
}  // namespace kernels
#endif
