// Inner loops for AVX-512.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#include <immintrin.h>

#define VAS_LANES 8
#define VAS_TABLE kAvx512Kernels
#define VAS_NAME "avx512"
#include "sampling_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
