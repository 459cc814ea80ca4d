// The choice among the kernels, once for a process.
#include <cstdlib>
#include <cstring>

#include "weight.h"

namespace kernels {

namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#else
bool has_avx512() { return false; }
bool has_vnni() { return false; }
bool has_avx2() { return false; }
#endif

const Kernels& choose() {
  const Kernels* usable[] = {has_vnni() ? avx512vnni() : nullptr, has_avx512() ? avx512() : nullptr, has_avx2() ? avx2() : nullptr, neon(), portable()};
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
