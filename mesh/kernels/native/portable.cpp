// For processors that have none of the others: whatever the compiler makes of the vector types.
#include <cstdlib>

#include "weight.h"

#define NAME "portable"

namespace kernels {
namespace in_portable {
#include "products.inc"
}
const Kernels* portable() { return &in_portable::kernels_here; }
}  // namespace kernels
