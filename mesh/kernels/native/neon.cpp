// Advanced SIMD, which every 64-bit Arm processor has.
#include "weight.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdlib>
#define LANES_NEON 1
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
