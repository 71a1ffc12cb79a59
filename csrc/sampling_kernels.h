// Inner loops over a chunk of the vocabulary, one table of functions per instruction set.
#pragma once

#include <cstdint>

namespace vas {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Tokens handled at a time: their scores and weights (float64) stay in the first-level cache.
constexpr int kChunk = 1024;

struct Extent {
  double max;
  bool bad;  // a NaN or +inf among them
};

struct Survivors {
  int block;      // first token of the block, or n when none is left
  uint32_t mask;  // bit j: token block + j may win
};

// All arrays of scores hold kChunk entries; n of them count and the rest up to a multiple of 16 are -inf.
struct Kernels {
  const char* name;
  // scores[i] = row[begin + i] * scale
  void (*load)(const void* row, DType dtype, int64_t begin, int n, double scale, double* scores);
  Extent (*extent)(const double* scores, int n);
  // maxima[i] = max(maxima[i], row[begin + i]); returns whether a NaN or +inf was among them.
  bool (*absorb)(const void* row, DType dtype, int64_t begin, int n, float* maxima);
  // Indices (from begin) of logits >= threshold; returns how many.
  int (*raw_at_least)(const void* row, DType dtype, int64_t begin, int n, float threshold, int32_t* indices);
  // How many of kChunk values are at least this.
  int (*count_at_least)(const double* values, double threshold);
  // above[i] = how many of n values exceed values[i]; values are padded like scores.
  void (*rank)(const double* values, int n, int32_t* above);
  // Indices of scores >= threshold; returns how many.
  int (*at_least)(const double* scores, int n, double threshold, int32_t* indices);
  // weights[i] = exp(scores[i] - shift); returns their sum.
  double (*weigh)(const double* scores, int n, double shift, double* weights);
  // The next block from `start` (a multiple of 16) with a token whose 64-bit uniform may be below weight * rate.
  Survivors (*race)(const double* weights, int n, int start, int64_t begin, uint64_t seed, int64_t position,
                    double rate);
};

const Kernels& kernels();  // the best this processor can run, or what set_kernels asked for

// For tests: use the table of this name ("avx512", "avx2", "generic", or "auto"); false if the processor cannot.
bool set_kernels(const char* name);

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace vas
