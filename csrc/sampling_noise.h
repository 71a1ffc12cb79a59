// Keyed noise of one token; the definition is gumbel_noise in kernels/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

namespace vas {

struct PhiloxWords {
  uint32_t word[4];
};

// Philox4x32 with 10 rounds (Salmon et al., SC 2011).
inline PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// -log(-log(1 - v)), v = (high 2^32 + low + 1/2) / 2^64; above 1/2 from 1 - v, which the complements give exactly.
inline double gumbel_of_words(uint32_t high, uint32_t low) {
  const bool upper = high >= 0x80000000u;
  const uint32_t flip = upper ? 0xFFFFFFFFu : 0u;
  const double part =
      (static_cast<double>(high ^ flip) * 4294967296.0 + static_cast<double>(low ^ flip) + 0.5) * 0x1p-64;
  return -std::log(upper ? -std::log(part) : -std::log1p(-part));
}

// A stream is one (seed, position); token selects the variate.
struct NoiseStream {
  uint64_t seed;
  int64_t position;

  struct Words {
    uint32_t high, low;
  };

  Words words(int64_t token) const {
    const uint64_t p = static_cast<uint64_t>(position);
    const PhiloxWords w = philox4x32(static_cast<uint32_t>(token >> 1), static_cast<uint32_t>(p),
                                     static_cast<uint32_t>(p >> 32), 0, static_cast<uint32_t>(seed),
                                     static_cast<uint32_t>(seed >> 32));
    return token & 1 ? Words{w.word[2], w.word[3]} : Words{w.word[0], w.word[1]};
  }

  double gumbel(int64_t token) const {
    const Words w = words(token);
    return gumbel_of_words(w.high, w.low);
  }
};

}  // namespace vas
