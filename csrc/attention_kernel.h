// The arithmetic of candidate attention for one instruction set. No include guard: attention.cpp includes this once per
// instruction set, inside a namespace of its own, with LANES (floats per vector) set and, where the processor multiplies
// bfloat16 pairs, BF16_DOT.
//
// A tile is TILE positions, aligned in the sequence, so that a row's result depends on its own sequence only and not on
// the rows computed beside it. A tile's keys are transposed once and then serve every query of the task; scores of a
// tile lie next to one another in a vector.

#include "attention_vectors.h"

constexpr int NV = TILE / LANES;  // vectors per tile row

// keys[j] (dim numbers each, dim a multiple of LANES) -> out[d][j]
template <class T>
static void transpose_keys(const T *const *keys, int dim, float *out) {
    for (int d = 0; d < dim; d += LANES)
        for (int j = 0; j < TILE; j += LANES) {
            vf rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) rows[i] = widen(keys[j + i] + d);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) store(out + (d + i) * TILE + j, rows[i]);
        }
}

template <int MB>
static inline void dot_block(const float *q, int stride, const float *keys, int dim, float *scores) {
    vf acc[MB][2][NV] = {};
    for (int d = 0; d < dim; d += 2)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) {
                const vf key = load<vf>(keys + (d + half) * TILE + n * LANES);
#pragma GCC unroll 4
                for (int m = 0; m < MB; ++m) acc[m][half][n] += q[m * stride + d + half] * key;
            }
    for (int m = 0; m < MB; ++m)
        for (int n = 0; n < NV; ++n) store(scores + m * TILE + n * LANES, acc[m][0][n] + acc[m][1][n]);
}

#ifdef BF16_DOT
// The same on pairs of bfloat16: a pair is one 32-bit lane.
static void transpose_pairs(const bf16 *const *keys, int dim, uint32_t *out) {
    for (int d = 0; d < dim; d += 2 * LANES)
        for (int j = 0; j < TILE; j += LANES) {
            vu rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) rows[i] = load<vu>(keys[j + i] + d);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) store(out + (d / 2 + i) * TILE + j, rows[i]);
        }
}

template <int MB>
static inline void dot_pairs(const uint32_t *q, int stride, const uint32_t *keys, int pairs, float *scores) {
    vf acc[MB][NV] = {};
    for (int d = 0; d < pairs; ++d)
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) {
            const vu key = load<vu>(keys + d * TILE + n * LANES);
#pragma GCC unroll 4
            for (int m = 0; m < MB; ++m) {
                const __m512i query = _mm512_set1_epi32((int)q[m * stride + d]);
                acc[m][n] = (vf)_mm512_dpbf16_ps((__m512)acc[m][n], (__m512bh)key, (__m512bh)query);
            }
        }
    for (int m = 0; m < MB; ++m)
        for (int n = 0; n < NV; ++n) store(scores + m * TILE + n * LANES, acc[m][n]);
}
#endif

// out[m] = out[m] * keep[m] + sum_j weights[m][j] * values[j]
template <int MB, int DB>
static inline void mix_block(
    float *out, int dim, const float *keep, const float *weights, const float *const *values, int d0) {
    vf acc[MB][DB];
#pragma GCC unroll 4
    for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < DB; ++n) acc[m][n] = load<vf>(out + m * dim + d0 + n * LANES) * keep[m];
#pragma GCC unroll 1
    for (int j = 0; j < TILE; ++j) {
        vf value[DB];
#pragma GCC unroll 4
        for (int n = 0; n < DB; ++n) value[n] = load<vf>(values[j] + d0 + n * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < MB; ++m) {
            const float w = weights[m * TILE + j];
#pragma GCC unroll 4
            for (int n = 0; n < DB; ++n) acc[m][n] += w * value[n];
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MB; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < DB; ++n) store(out + m * dim + d0 + n * LANES, acc[m][n]);
}

template <int MB>
static inline void mix(float *out, int dim, const float *keep, const float *weights, const float *const *values) {
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) mix_block<MB, 4>(out, dim, keep, weights, values, d);
    for (; d < dim; d += LANES) mix_block<MB, 1>(out, dim, keep, weights, values, d);
}

static inline vf soft_cap(vf score, float cap) { return cap > 0.0f ? cap * tanh_v(score / cap) : score; }

// Queries of one task: rows x heads that share a key head, as floats padded to `dim` numbers.
struct Queries {
    int count = 0, dim = 0;
    std::vector<float> values;
    std::vector<uint32_t> pairs;
    std::vector<int64_t> low, high;  // a query sees positions [low, high)
};

// Running softmax of every query of a task.
struct Softmax {
    std::vector<float> out, top, sum;

    void reset(int count, int dim) {
        out.assign((size_t)count * dim, 0.0f);
        top.assign(count, -INFINITY);
        sum.assign(count, 0.0f);
    }
};

template <class T>
struct TileRows {
    const T *keys[TILE];
    const T *values[TILE];
};

struct Scratch {
    Queries queries;
    Softmax part, total;
    std::vector<float> keys, values, scores;
    std::vector<uint32_t> key_pairs;
    std::vector<char> padded;
};

// Scores of a tile become weights; `keep` is what the sums so far are multiplied with.
static void softmax_tile(
    const Queries &queries, int first, int count, int64_t start, const Call &call, float *scores, float *keep, Softmax &state) {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int m = 0; m < count; ++m) {
        const int query = first + m;
        const int64_t low = queries.low[query] - start, high = queries.high[query] - start;
        float *row = scores + m * TILE;
        keep[m] = 1.0f;
        if (high <= 0 || low >= TILE || high <= low) {
            std::memset(row, 0, TILE * sizeof(float));
            continue;
        }
        const int32_t from = low < 0 ? 0 : (int32_t)low, to = high > TILE ? TILE : (int32_t)high;
        vf score[NV];
        vi seen[NV];
        vf best = splat(-INFINITY);
        for (int n = 0; n < NV; ++n) {
            const vi place = lane + n * LANES;
            seen[n] = (place >= from) & (place < to);
            const vf value = soft_cap(load<vf>(row + n * LANES) * call.scale, call.softcap);
            score[n] = choose(seen[n], value, splat(-INFINITY));
            best = choose((vi)(score[n] > best), score[n], best);
        }
        const float old = state.top[query], peak = max_v(best);
        const float top = peak > old ? peak : old;
        vf total = vf{};
        for (int n = 0; n < NV; ++n) {
            const vf weight = (vf)(seen[n] & (vi)exp_v(score[n] - top));
            total += weight;
            store(row + n * LANES, weight);
        }
        if (top > old) keep[m] = old == -INFINITY ? 0.0f : exp_s(old - top);
        state.top[query] = top;
        state.sum[query] = state.sum[query] * keep[m] + sum_v(total);
    }
}

template <class T>
static const float *const *widen_values(const T *const *rows, int dim, std::vector<float> &room, const float **out) {
    room.resize((size_t)TILE * dim);
    for (int j = 0; j < TILE; ++j) {
        float *to = room.data() + (size_t)j * dim;
        for (int d = 0; d < dim; d += LANES) store(to + d, widen(rows[j] + d));
        out[j] = to;
    }
    return out;
}

static const float *const *widen_values(const float *const *rows, int, std::vector<float> &, const float **) {
    return rows;
}

template <class T>
static void attend_tile(const TileRows<T> &rows, int64_t start, const Call &call, Scratch &s, Softmax &state) {
    const Queries &queries = s.queries;
    const int dim = queries.dim;
    bool pairs = false;
#ifdef BF16_DOT
    if constexpr (std::is_same_v<T, bf16>) {
        if (!queries.pairs.empty()) {
            pairs = true;
            s.key_pairs.resize((size_t)dim / 2 * TILE);
            transpose_pairs(rows.keys, dim, s.key_pairs.data());
        }
    }
#endif
    if (!pairs) {
        s.keys.resize((size_t)dim * TILE);
        transpose_keys(rows.keys, dim, s.keys.data());
    }
    const float *room[TILE];
    const float *const *values = widen_values(rows.values, dim, s.values, room);
    float scores[4 * TILE], keep[4];
    for (int m = 0; m < queries.count; m += 4) {
        const int count = queries.count - m < 4 ? queries.count - m : 4;
        bool any = false;
        for (int i = m; i < m + count; ++i) any |= queries.high[i] > start && queries.low[i] < start + TILE;
        if (!any) continue;
        const auto dots = [&](auto size) {
            constexpr int MB = decltype(size)::value;
#ifdef BF16_DOT
            if (pairs) {
                const uint32_t *q = queries.pairs.data() + (size_t)m * dim / 2;
                dot_pairs<MB>(q, dim / 2, s.key_pairs.data(), dim / 2, scores);
            } else
#endif
                dot_block<MB>(queries.values.data() + (size_t)m * dim, dim, s.keys.data(), dim, scores);
            softmax_tile(queries, m, MB, start, call, scores, keep, state);
            mix<MB>(state.out.data() + (size_t)m * dim, dim, keep, scores, values);
        };
        switch (count) {
            case 1: dots(std::integral_constant<int, 1>{}); break;
            case 2: dots(std::integral_constant<int, 2>{}); break;
            case 3: dots(std::integral_constant<int, 3>{}); break;
            default: dots(std::integral_constant<int, 4>{}); break;
        }
    }
}

template <class Q>
static void load_queries(const Call &call, const Task &task, Scratch &s) {
    Queries &queries = s.queries;
    const int share = call.heads / call.kv_heads, rows = task.last - task.first;
    const int dim = (call.dim + PAD - 1) / PAD * PAD;
    queries.count = rows * share;
    queries.dim = dim;
    queries.values.assign((size_t)queries.count * dim, 0.0f);
    queries.low.resize(queries.count);
    queries.high.resize(queries.count);
    queries.pairs.clear();
    const Q *base = static_cast<const Q *>(call.q);
    for (int r = 0; r < rows; ++r) {
        const int row = task.first + r;
        const int64_t high = call.plan->prefix[row];
        const int64_t low = call.window > 0 ? call.plan->positions[row] - call.window + 1 : 0;
        for (int h = 0; h < share; ++h) {
            const int m = r * share + h;
            const Q *from = base + row * call.q_row + (task.kv_head * share + h) * call.q_head;
            float *to = queries.values.data() + (size_t)m * dim;
            int d = 0;
            for (; d + LANES <= call.dim; d += LANES) store(to + d, widen(from + d));
            for (; d < call.dim; ++d) to[d] = to_float(from[d]);
            queries.low[m] = low < 0 ? 0 : low;
            queries.high[m] = high;
        }
    }
#ifdef BF16_DOT
    if constexpr (std::is_same_v<Q, bf16>) {
        queries.pairs.assign((size_t)queries.count * dim / 2, 0u);
        for (int m = 0; m < queries.count; ++m) {
            const int row = task.first + m / share, head = task.kv_head * share + m % share;
            const bf16 *from = base + row * call.q_row + head * call.q_head;
            std::memcpy(queries.pairs.data() + (size_t)m * dim / 2, from, (size_t)call.dim * sizeof(bf16));
        }
    }
#endif
}

// Pointers to the keys and values of a tile; positions that no query of the task sees are rows of zeros.
template <class T>
static void gather(const Call &call, const Task &task, int64_t start, int64_t low, int64_t high, Scratch &s, TileRows<T> &rows) {
    const int dim = s.queries.dim;
    const bool padded = dim != call.dim;
    const size_t need = (size_t)dim * sizeof(T) * (padded ? 2 * TILE + 1 : 1);
    if (s.padded.size() < need) s.padded.assign(need, 0);
    T *room = reinterpret_cast<T *>(s.padded.data());
    std::memset(room, 0, (size_t)dim * sizeof(T));
    const T *zero = room;
    const int32_t *table = call.plan->table(task.group);
    const T *keys = static_cast<const T *>(call.k_pages), *values = static_cast<const T *>(call.v_pages);
    int64_t block = start / call.block_size, offset = start % call.block_size;
    for (int j = 0; j < TILE; ++j) {
        const int64_t position = start + j;
        rows.keys[j] = rows.values[j] = zero;
        if (position >= low && position < high) {
            const int64_t at = ((table[block] * call.block_size + offset) * call.kv_heads + task.kv_head) * call.dim;
            rows.keys[j] = keys + at;
            rows.values[j] = values + at;
            if (padded) {
                T *k = room + (size_t)dim * (1 + 2 * j), *v = k + dim;
                std::memset(k, 0, (size_t)dim * 2 * sizeof(T));
                std::memcpy(k, keys + at, call.dim * sizeof(T));
                std::memcpy(v, values + at, call.dim * sizeof(T));
                rows.keys[j] = k;
                rows.values[j] = v;
            }
        }
        if (++offset == call.block_size) {
            offset = 0;
            ++block;
        }
    }
}

// One chunk of the prefix, positions [chunk * CHUNK, (chunk + 1) * CHUNK), into an empty state.
template <class T>
static void attend_chunk(const Call &call, const Task &task, int64_t chunk, int64_t low, int64_t high, Scratch &s, Softmax &state) {
    state.reset(s.queries.count, s.queries.dim);
    const int64_t from = std::max<int64_t>(chunk * CHUNK, low / TILE * TILE), to = std::min<int64_t>((chunk + 1) * CHUNK, high);
    TileRows<T> rows;
    for (int64_t start = from; start < to; start += TILE) {
        gather<T>(call, task, start, low, high, s, rows);
        attend_tile<T>(rows, start, call, s, state);
    }
}

// Adds one state to another; in this order, whoever computed them, so that results do not depend on how work was split.
static void merge(Softmax &total, const float *out, const float *top, const float *sum, int count, int dim) {
    for (int m = 0; m < count; ++m) {
        if (sum[m] == 0.0f) continue;
        float *to = total.out.data() + (size_t)m * dim;
        const float *from = out + (size_t)m * dim;
        if (total.sum[m] == 0.0f) {
            std::memcpy(to, from, dim * sizeof(float));
            total.top[m] = top[m];
            total.sum[m] = sum[m];
            continue;
        }
        const float peak = std::max(total.top[m], top[m]);
        const float a = exp_s(total.top[m] - peak), b = exp_s(top[m] - peak);
        for (int d = 0; d < dim; d += LANES) {
            vf kept = load<vf>(to + d) * a;
            store(to + d, kept + load<vf>(from + d) * b);
        }
        total.top[m] = peak;
        total.sum[m] = total.sum[m] * a + sum[m] * b;
    }
}

// A row's own key and value, which are in no page.
template <class T>
static void see_self(const Call &call, const Task &task, Scratch &s, Softmax &state) {
    if (call.k == nullptr) return;
    const int share = call.heads / call.kv_heads, dim = s.queries.dim;
    std::vector<float> &key = s.keys, &value = s.values;
    key.resize(std::max<size_t>(key.size(), dim));
    value.resize(std::max<size_t>(value.size(), dim));
    for (int row = task.first; row < task.last; ++row) {
        if (call.plan->slots[row] != -1) continue;
        const T *k = static_cast<const T *>(call.k) + row * call.k_row + task.kv_head * call.k_head;
        const T *v = static_cast<const T *>(call.v) + row * call.v_row + task.kv_head * call.v_head;
        for (int d = 0; d < dim; ++d) {
            key[d] = d < call.dim ? to_float(k[d]) : 0.0f;
            value[d] = d < call.dim ? to_float(v[d]) : 0.0f;
        }
        for (int h = 0; h < share; ++h) {
            const int m = (row - task.first) * share + h;
            const float *q = s.queries.values.data() + (size_t)m * dim;
            vf dot = vf{};
            for (int d = 0; d < dim; d += LANES) dot += load<vf>(q + d) * load<vf>(key.data() + d);
            const float score = soft_cap(splat(sum_v(dot) * call.scale), call.softcap)[0];
            const float old = state.top[m], top = score > old || score != score ? score : old;
            const float keep = old == -INFINITY ? 0.0f : exp_s(old - top), weight = exp_s(score - top);
            float *out = state.out.data() + (size_t)m * dim;
            for (int d = 0; d < dim; d += LANES) {
                vf kept = load<vf>(out + d) * keep;
                store(out + d, kept + load<vf>(value.data() + d) * weight);
            }
            state.top[m] = top;
            state.sum[m] = state.sum[m] * keep + weight;
        }
    }
}

template <class Q>
static void finish(const Call &call, const Task &task, const Scratch &s, const Softmax &state) {
    const int share = call.heads / call.kv_heads;
    for (int m = 0; m < s.queries.count; ++m) {
        const int row = task.first + m / share, head = task.kv_head * share + m % share;
        Q *to = static_cast<Q *>(call.out) + ((int64_t)row * call.heads + head) * call.dim;
        const float *from = state.out.data() + (size_t)m * s.queries.dim;
        const float factor = state.sum[m] == 0.0f ? 0.0f : 1.0f / state.sum[m];
        for (int d = 0; d < call.dim; ++d) to[d] = from_float<Q>(from[d] * factor);
    }
}

static void task_range(const Call &call, const Scratch &s, int64_t &low, int64_t &high) {
    low = INT64_MAX;
    high = 0;
    for (int m = 0; m < s.queries.count; ++m) {
        if (s.queries.low[m] >= s.queries.high[m]) continue;
        low = std::min(low, s.queries.low[m]);
        high = std::max(high, s.queries.high[m]);
    }
    if (high == 0) low = 0;
}

static Scratch &scratch() {
    static thread_local Scratch room;
    return room;
}

// A task from its first key to its output.
template <class Q, class T>
static void run_whole(const Call &call, const Task &task) {
    Scratch &s = scratch();
    load_queries<Q>(call, task, s);
    int64_t low, high;
    task_range(call, s, low, high);
    const int64_t first = low / CHUNK, last = (high + CHUNK - 1) / CHUNK;
    if (last - first <= 1) {
        attend_chunk<T>(call, task, first, low, high, s, s.total);
    } else {
        s.total.reset(s.queries.count, s.queries.dim);
        for (int64_t chunk = first; chunk < last; ++chunk) {
            attend_chunk<T>(call, task, chunk, low, high, s, s.part);
            merge(s.total, s.part.out.data(), s.part.top.data(), s.part.sum.data(), s.queries.count, s.queries.dim);
        }
    }
    see_self<T>(call, task, s, s.total);
    finish<Q>(call, task, s, s.total);
}

// One chunk of a task, left in `part`: out [count, dim], top [count], sum [count].
template <class Q, class T>
static void run_part(const Call &call, const Task &task, int64_t chunk, float *part) {
    Scratch &s = scratch();
    load_queries<Q>(call, task, s);
    int64_t low, high;
    task_range(call, s, low, high);
    attend_chunk<T>(call, task, chunk, low, high, s, s.part);
    const size_t count = s.queries.count, numbers = count * s.queries.dim;
    std::memcpy(part, s.part.out.data(), numbers * sizeof(float));
    std::memcpy(part + numbers, s.part.top.data(), count * sizeof(float));
    std::memcpy(part + numbers + count, s.part.sum.data(), count * sizeof(float));
}

template <class Q, class T>
static void run_merge(const Call &call, const Task &task, int64_t chunks, const float *parts, size_t stride) {
    Scratch &s = scratch();
    load_queries<Q>(call, task, s);
    const size_t count = s.queries.count, numbers = count * s.queries.dim;
    s.total.reset(s.queries.count, s.queries.dim);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float *part = parts + chunk * stride;
        merge(s.total, part, part + numbers, part + numbers + count, s.queries.count, s.queries.dim);
    }
    see_self<T>(call, task, s, s.total);
    finish<Q>(call, task, s, s.total);
}

static const Kernel *kernel(int q_type, int page_type) {
#define VAS_ROW(Q) {{run_whole<Q, float>, run_part<Q, float>, run_merge<Q, float>}, {run_whole<Q, bf16>, run_part<Q, bf16>, run_merge<Q, bf16>}, {run_whole<Q, fp16>, run_part<Q, fp16>, run_merge<Q, fp16>}}
    static const Kernel table[3][3] = {VAS_ROW(float), VAS_ROW(bf16), VAS_ROW(fp16)};
#undef VAS_ROW
    return &table[q_type][page_type];
}
