// Inner loops for AVX2.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#define VAS_LANES 4
#define VAS_TABLE kAvx2Kernels
#define VAS_NAME "avx2"
#include "sampling_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
