// Body of the inner loops, included once per instruction set with VAS_LANES (doubles per vector) and
// VAS_TABLE (name of the table) defined. It uses the compiler's vector types, so one text serves every width.
// Nothing here may call a function that other files also instantiate: the linker could keep the copy compiled for the
// wider instruction set.

#include "sampling_kernels.h"

namespace vas {
namespace {

constexpr int kLanes = VAS_LANES;
constexpr int kBlock = 16;  // tokens per step of the race, whatever the width
using Doubles = double __attribute__((vector_size(kLanes * 8)));
using Words = uint64_t __attribute__((vector_size(kLanes * 8)));
using Longs = int64_t __attribute__((vector_size(kLanes * 8)));
using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = uint32_t __attribute__((vector_size(kLanes * 4)));
using Halves = uint16_t __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
inline To cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load_vector(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline void store_vector(double* to, Doubles v) { __builtin_memcpy(to, &v, sizeof v); }

inline Doubles splat(double x) { return x - Doubles{}; }
inline Words splat_words(uint64_t x) { return x - Words{}; }

constexpr double kInf = __builtin_inf();
constexpr float kInfFloat = __builtin_inff();

#if VAS_LANES == 8
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
inline Words multiply(Words a, Words b) { return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
inline uint32_t at_most(Doubles a, Doubles b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ); }
inline uint32_t floats_at_most(Floats a, Floats b) { return _mm256_cmp_ps_mask((__m256)a, (__m256)b, _CMP_LE_OQ); }
#elif VAS_LANES == 4
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
inline Words multiply(Words a, Words b) { return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline uint32_t at_most(Doubles a, Doubles b) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_LE_OQ)));
}
inline uint32_t floats_at_most(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmple_ps((__m128)a, (__m128)b)));
}
#else
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }
inline Words multiply(Words a, Words b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
inline uint32_t at_most(Doubles a, Doubles b) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(a[lane] <= b[lane]) << lane;
  return mask;
}
inline uint32_t floats_at_most(Floats a, Floats b) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(a[lane] <= b[lane]) << lane;
  return mask;
}
#endif

inline Doubles larger(Doubles a, Doubles b) { return a > b ? a : b; }

inline Floats floats_of_bfloat16(Halves h) { return cast<Floats>(__builtin_convertvector(h, Ints) << 16); }

// Moves exponent and mantissa to float32's place and multiplies by 2^112, which also handles subnormals; infinities and
// NaNs keep an exponent of all ones.
inline Floats floats_of_float16(Halves h) {
  const Ints bits = __builtin_convertvector(h, Ints);
  const Ints magnitude = (bits & 0x7FFF) << 13, special = (bits & 0x7C00) == 0x7C00;
  const Floats scaled = cast<Floats>(magnitude) * 0x1p112f;
  return cast<Floats>(cast<Ints>(scaled) | (special & 0x7F800000) | ((bits & 0x8000) << 16));
}

template <DType kType>
inline Floats load_floats(const void* row, int64_t index) {
  if constexpr (kType == DType::kFloat32) {
    return load_vector<Floats>(static_cast<const float*>(row) + index);
  } else {
    const Halves h = load_vector<Halves>(static_cast<const uint16_t*>(row) + index);
    return kType == DType::kBFloat16 ? floats_of_bfloat16(h) : floats_of_float16(h);
  }
}

template <DType kType>
inline Doubles load_scores(const void* row, int64_t index) {
  return __builtin_convertvector(load_floats<kType>(row, index), Doubles);
}

template <DType kType>
inline float load_float(const void* row, int64_t index) {
  constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;
  alignas(64) char one[kLanes * 4] = {};
  __builtin_memcpy(one, static_cast<const char*>(row) + index * kBytes, kBytes);
  return load_floats<kType>(one, 0)[0];
}

template <DType kType>
void load_chunk(const void* row, int64_t begin, int n, double scale, double* scores) {
  const Doubles factor = splat(scale);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store_vector(scores + i, load_scores<kType>(row, begin + i) * factor);
  if (i < n) {
    alignas(64) char last[kLanes * 4] = {};
    constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;
    __builtin_memcpy(last, static_cast<const char*>(row) + (begin + i) * kBytes, (n - i) * kBytes);
    store_vector(scores + i, load_scores<kType>(last, 0) * factor);
  }
  for (i = n; i % kBlock; ++i) scores[i] = -kInf;
}

void load(const void* row, DType dtype, int64_t begin, int n, double scale, double* scores) {
  if (dtype == DType::kFloat32) return load_chunk<DType::kFloat32>(row, begin, n, scale, scores);
  if (dtype == DType::kBFloat16) return load_chunk<DType::kBFloat16>(row, begin, n, scale, scores);
  load_chunk<DType::kFloat16>(row, begin, n, scale, scores);
}

inline double largest_lane(Doubles v) {
  double largest = v[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

Extent extent(const double* scores, int n) {
  constexpr int kUnroll = kBlock / kLanes;
  Doubles best[kUnroll];
  Longs fine[kUnroll];
  for (int u = 0; u < kUnroll; ++u) best[u] = splat(-kInf), fine[u] = ~Longs{};
  for (int i = 0; i < n; i += kBlock) {
    for (int u = 0; u < kUnroll; ++u) {
      const Doubles s = load_vector<Doubles>(scores + i + u * kLanes);
      best[u] = larger(s, best[u]);
      fine[u] &= s < splat(kInf);
    }
  }
  for (int u = 1; u < kUnroll; ++u) best[0] = larger(best[u], best[0]), fine[0] &= fine[u];
  bool bad = false;
  for (int lane = 0; lane < kLanes; ++lane) bad |= fine[0][lane] == 0;
  return {largest_lane(best[0]), bad};
}

template <DType kType>
bool absorb_chunk(const void* row, int64_t begin, int n, float* maxima) {
  Ints fine = ~Ints{};
  const Floats inf = kInfFloat - Floats{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats x = load_floats<kType>(row, begin + i);
    Floats best = load_vector<Floats>(maxima + i);
    best = x > best ? x : best;
    __builtin_memcpy(maxima + i, &best, sizeof best);
    fine &= cast<Ints>(x < inf);
  }
  bool bad = false;
  for (; i < n; ++i) {
    const float x = load_float<kType>(row, begin + i);
    if (x > maxima[i]) maxima[i] = x;
    bad |= !(x < kInfFloat);
  }
  for (int lane = 0; lane < kLanes; ++lane) bad |= fine[lane] == 0;
  return bad;
}

template <DType kType>
int raw_at_least_chunk(const void* row, int64_t begin, int n, float threshold, int32_t* indices) {
  const Floats limit = threshold - Floats{};
  int count = 0, i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Floats a = load_floats<kType>(row, begin + i), b = load_floats<kType>(row, begin + i + kLanes);
    uint32_t mask = floats_at_most(limit, a) | floats_at_most(limit, b) << kLanes;
    for (; mask; mask &= mask - 1) indices[count++] = i + __builtin_ctz(mask);
  }
  for (; i < n; ++i) {
    if (load_float<kType>(row, begin + i) >= threshold) indices[count++] = i;
  }
  return count;
}

bool absorb(const void* row, DType dtype, int64_t begin, int n, float* maxima) {
  if (dtype == DType::kFloat32) return absorb_chunk<DType::kFloat32>(row, begin, n, maxima);
  if (dtype == DType::kBFloat16) return absorb_chunk<DType::kBFloat16>(row, begin, n, maxima);
  return absorb_chunk<DType::kFloat16>(row, begin, n, maxima);
}

int raw_at_least(const void* row, DType dtype, int64_t begin, int n, float threshold, int32_t* indices) {
  if (dtype == DType::kFloat32) return raw_at_least_chunk<DType::kFloat32>(row, begin, n, threshold, indices);
  if (dtype == DType::kBFloat16) return raw_at_least_chunk<DType::kBFloat16>(row, begin, n, threshold, indices);
  return raw_at_least_chunk<DType::kFloat16>(row, begin, n, threshold, indices);
}

inline int sum_lanes(Longs v) {
  int64_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return static_cast<int>(sum);
}

int count_at_least(const double* values, double threshold) {
  const Doubles limit = splat(threshold);
  Longs count{};  // a comparison gives -1
  for (int i = 0; i < kChunk; i += kLanes) count -= load_vector<Doubles>(values + i) >= limit;
  return sum_lanes(count);
}

void rank(const double* values, int n, int32_t* above) {
  for (int i = 0; i < n; ++i) {
    const Doubles mine = splat(values[i]);
    Longs count{};
    for (int j = 0; j < n; j += kLanes) count -= load_vector<Doubles>(values + j) > mine;
    above[i] = sum_lanes(count);
  }
}

int at_least(const double* scores, int n, double threshold, int32_t* indices) {
  const Doubles limit = splat(threshold);
  int count = 0;
  for (int i = 0; i < n; i += kBlock) {
    uint32_t mask = 0;
    for (int u = 0; u < kBlock; u += kLanes) mask |= at_most(limit, load_vector<Doubles>(scores + i + u)) << u;
    for (; mask; mask &= mask - 1) {
      const int index = i + __builtin_ctz(mask);
      if (index < n) indices[count++] = index;
    }
  }
  return count;
}

// exp(z) for z <= 0 to about 1e-15 relative: z = k log 2 + r, the Taylor series of degree 12 in r. Below -708 it gives 0.
inline Doubles exp_negative(Doubles z) {
  const Doubles floor = splat(-708.0), magic = splat(0x1.8p52);
  const Doubles safe = z < floor ? floor : z;
  const Doubles shifted = fma(safe, splat(1.4426950408889634), magic), k = shifted - magic;
  Doubles r = fma(k, splat(-0x1.62e42fefa38p-1), safe);
  r = fma(k, splat(-0x1.ef35793c7673p-45), r);
  Doubles p = splat(1.0 / 479001600);
  constexpr double kSeries[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};
  for (double c : kSeries) p = fma(p, r, splat(c));
  const Doubles scaled = cast<Doubles>(cast<Words>(p) + (cast<Words>(shifted) << 52));
  return z < floor ? Doubles{} : scaled;
}

double weigh(const double* scores, int n, double shift, double* weights) {
  constexpr int kUnroll = kBlock / kLanes;
  const Doubles offset = splat(shift);
  Doubles sums[kUnroll] = {};
  for (int i = 0; i < n; i += kBlock) {
    for (int u = 0; u < kUnroll; ++u) {
      const Doubles w = exp_negative(load_vector<Doubles>(scores + i + u * kLanes) - offset);
      store_vector(weights + i + u * kLanes, w);
      sums[u] += w;
    }
  }
  for (int u = 1; u < kUnroll; ++u) sums[0] += sums[u];
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[0][lane];
  return sum;
}

struct Keys {
  uint32_t k0[10], k1[10];
  Words first;  // what the constant counter words make of c0 in the first round
  uint64_t c1;  // c1 after the first round
};

inline Keys key_schedule(uint64_t seed, int64_t position) {
  Keys keys;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) keys.k0[round] = k0, keys.k1[round] = k1;
  // In the first round only c0 differs between lanes: the other product is one number.
  const uint64_t p = static_cast<uint64_t>(position), product = 0xCD9E8D57u * (p >> 32 & 0xFFFFFFFFu);
  keys.first = splat_words((product >> 32) ^ (p & 0xFFFFFFFFu) ^ keys.k0[0]);
  keys.c1 = product & 0xFFFFFFFFu;
  return keys;
}

// First and third output words of the counters (in the low halves of the lanes; the upper halves hold rubbish).
inline void philox_words(Words counter, const Keys& keys, Words& even, Words& odd) {
  const Words m0 = splat_words(0xD2511F53), m1 = splat_words(0xCD9E8D57);
  Words p0 = multiply(counter, m0), p1;
  Words c0 = keys.first, c1 = splat_words(keys.c1), c2 = (p0 >> 32) ^ splat_words(keys.k1[0]), c3 = p0;
#pragma GCC unroll 9
  for (int round = 1; round < 10; ++round) {
    p0 = multiply(c0, m0);
    p1 = multiply(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ splat_words(keys.k0[round]);
    c2 = (p0 >> 32) ^ c3 ^ splat_words(keys.k1[round]);
    c1 = p1;
    c3 = p0;
  }
  even = c0;
  odd = c2;
}

// 2^52 + the low 32 bits of each lane, as a double.
inline Doubles lift(Words w) { return cast<Doubles>((w & 0xFFFFFFFF) | 0x4330000000000000); }

// Token wins only if its exponential variate -log(1 - v) >= v is below weight * rate, so only if the upper half of its 64
// bits is at most weight * rate * 2^32. Adding 2^52 to both sides rounds monotonically: no possible winner is lost.
Survivors race(const double* weights, int n, int start, int64_t begin, uint64_t seed, int64_t position, double rate) {
  constexpr int kHalf = kLanes * 2;  // tokens per vector of counters
  const Keys keys = key_schedule(seed, position);
  const Doubles factor = splat(rate * 0x1.0000001p32), base = splat(0x1p52);
  Words lane;
  Longs evens, odds;
  for (int j = 0; j < kLanes; ++j) lane[j] = j, evens[j] = 2 * j, odds[j] = 2 * j + 1;
  for (int i = start; i < n; i += kBlock) {
    uint32_t found = 0;
    for (int u = 0; u < kBlock; u += kHalf) {
      Words even, odd;
      philox_words(lane + static_cast<uint64_t>((begin + i + u) >> 1), keys, even, odd);
      const Doubles a = load_vector<Doubles>(weights + i + u), b = load_vector<Doubles>(weights + i + u + kLanes);
      const uint32_t e = at_most(lift(even), fma(__builtin_shuffle(a, b, evens), factor, base));
      const uint32_t o = at_most(lift(odd), fma(__builtin_shuffle(a, b, odds), factor, base));
      if (__builtin_expect(e | o, 0)) {
        for (int j = 0; j < kLanes; ++j) found |= ((e >> j & 1) << (u + 2 * j)) | ((o >> j & 1) << (u + 2 * j + 1));
      }
    }
    if (__builtin_expect(found, 0)) return {i, found};
  }
  return {n, 0};
}

}  // namespace

extern const Kernels VAS_TABLE;
const Kernels VAS_TABLE = {VAS_NAME, load, extent, absorb, raw_at_least, count_at_least, rank, at_least, weigh, race};

}  // namespace vas
