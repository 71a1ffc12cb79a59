// Vectors of LANES floats and what attention computes with them; included by attention_kernel.h, as often as that is.

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

template <class V, class T>
static inline V load(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

template <class V, class T>
static inline void store(T *p, V v) {
    std::memcpy(p, &v, sizeof(V));
}

static inline vf splat(float x) { return x - vf{}; }
static inline vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

static inline vf widen(const float *p) { return load<vf>(p); }
static inline vf widen(const bf16 *p) {
    return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16);
}
static inline vf widen(const fp16 *p) {
    // Exponent and fraction moved in place and scaled by 2^112 give normal and subnormal numbers alike; an exponent of
    // all ones (inf, NaN) must stay one.
    const vu h = __builtin_convertvector(load<vh>(p), vu);
    const vu bits = (h & 0x7fffu) << 13;
    const vf scaled = (vf)bits * 0x1p112f;
    const vi special = (vi)((h & 0x7c00u) == 0x7c00u);
    const vu sign = (h & 0x8000u) << 16;
    const vu magnitude = ((vu)special & (bits | 0x7f800000u)) | (~(vu)special & (vu)scaled);
    return (vf)(magnitude | sign);
}

// exp with a relative error of about 1e-7; below -87 the result is that of -87. NaN stays NaN. 2^n times the Taylor sum
// of the rest, ln 2 split in two parts whose products with n lose nothing that counts (Cody & Waite 1980).
static inline vf exp_v(vf x) {
    x = choose((vi)(x < -87.0f), splat(-87.0f), x);
    x = choose((vi)(x > 88.0f), splat(88.0f), x);
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = x * 1.44269504088896341f + magic;
    const vf n = shifted - magic;
    const vf r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
    vf p = splat(1.0f / 720.0f);
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const vi exponent = ((vi)shifted - (vi)magic) << 23;
    return (vf)((vi)p + exponent);
}

// tanh with the coefficients of tanhf in Cephes (Moshier) below 0.625, above it by exp.
static inline vf tanh_v(vf x) {
    const vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z + -5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z + -3.33332819422e-1f;
    const vf small = x + x * z * p;
    const vf sign = (vf)((vi)x & (int32_t)0x80000000);
    const vf size = (vf)((vi)x & 0x7fffffff);
    const vf large = (vf)((vi)(1.0f - 2.0f / (exp_v(size + size) + 1.0f)) | (vi)sign);
    return choose((vi)(size < 0.625f), small, large);
}

static inline float exp_s(float x) { return exp_v(splat(x))[0]; }

template <int S, int... I>
static inline vf swap_lanes(vf v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ S)...);
}

// Lane i and lane i ^ S are combined, S halving: every lane ends with the whole.
template <int S = LANES / 2>
static inline vf sum_lanes(vf v) {
    v += swap_lanes<S>(v, std::make_integer_sequence<int, LANES>{});
    if constexpr (S > 1) return sum_lanes<S / 2>(v);
    return v;
}

template <int S = LANES / 2>
static inline vf max_lanes(vf v) {
    const vf other = swap_lanes<S>(v, std::make_integer_sequence<int, LANES>{});
    v = choose((vi)(v > other), v, other);
    if constexpr (S > 1) return max_lanes<S / 2>(v);
    return v;
}

static inline float sum_v(vf v) { return sum_lanes(v)[0]; }
static inline float max_v(vf v) { return max_lanes(v)[0]; }

template <int S, class V, int... I>
static inline V take_low(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & S) ? LANES + I - S : I)...);
}

template <int S, class V, int... I>
static inline V take_high(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & S) ? LANES + I : I + S)...);
}

template <int S, class V>
static inline void transpose_stage(V *rows) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
        if (i & S) continue;
        const V a = rows[i], b = rows[i + S];
        rows[i] = take_low<S>(a, b, lanes);
        rows[i + S] = take_high<S>(a, b, lanes);
    }
}

// LANES x LANES, in place.
template <class V>
static inline void transpose(V *rows) {
    transpose_stage<1>(rows);
    transpose_stage<2>(rows);
    if constexpr (LANES >= 8) transpose_stage<4>(rows);
    if constexpr (LANES >= 16) transpose_stage<8>(rows);
}
