// Inner loops for any processor, and the choice among them at run time.
#define VAS_LANES 2
#define VAS_TABLE kGenericKernels
#define VAS_NAME "generic"
#include "sampling_kernels_impl.h"

#include <atomic>
#include <cstring>

namespace vas {
namespace {

bool runs(const Kernels& table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&table == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  }
  if (&table == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &table == &kGenericKernels;
}

const Kernels* find(const char* name) {
  const Kernels* const tables[] = {
#if defined(__x86_64__)
      &kAvx512Kernels, &kAvx2Kernels,
#endif
      &kGenericKernels};
  for (const Kernels* table : tables) {
    if (runs(*table) && (!std::strcmp(name, "auto") || !std::strcmp(name, table->name))) return table;
  }
  return nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{find("auto")};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool set_kernels(const char* name) {
  const Kernels* table = find(name);
  if (table) current().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace vas
