// Candidate attention on a CPU: rows of a group share one read of their paged prefix. Twin of
// kernels/reference.py::candidate_attention. Knows addresses and strides, not torch; the Python side
// (vas_engine/model/backend.py) keeps the tensors alive.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define VAS_X86 1
#endif

#include "threads.h"

namespace py = pybind11;

namespace {

constexpr int TILE = 32;          // positions per tile
constexpr int PAD = 32;           // head sizes are padded to this, in scratch
constexpr int64_t CHUNK = 256;    // positions whose softmax is computed on its own and then merged
constexpr int MAX_QUERIES = 64;   // rows x heads per task

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float to_float(fp16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, body = (x.bits & 0x7fffu) << 13;
    uint32_t bits;
    float f;
    if ((x.bits & 0x7c00u) == 0x7c00u) {
        bits = body | 0x7f800000u;
    } else {
        std::memcpy(&f, &body, 4);
        f *= 0x1p112f;
        std::memcpy(&bits, &f, 4);
    }
    bits |= sign;
    std::memcpy(&f, &bits, 4);
    return f;
}

template <class Q>
inline Q from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}
template <>
inline fp16 from_float<fp16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (size >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
    if (size < 0x38800000u) {  // subnormal: adding 0.5 lets the float unit round at the right place
        float f;
        std::memcpy(&f, &size, 4);
        f += 0.5f;
        uint32_t shifted;
        std::memcpy(&shifted, &f, 4);
        return {static_cast<uint16_t>(sign | (shifted - 0x3f000000u))};
    }
    const uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u;
    return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

struct Task {
    int group, first, last, kv_head;
};

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// What the rows of one forward see; made once and used in every layer.
class Plan {
  public:
    Plan(const Array<int32_t> &tables, const Array<int32_t> &offsets, const Array<int32_t> &prefixes, const Array<int64_t> &slot_array,
         const Array<int64_t> &position_array)
        : prefix(prefixes.data(), prefixes.data() + prefixes.size()),
          slots(slot_array.data(), slot_array.data() + slot_array.size()),
          positions(position_array.data(), position_array.data() + position_array.size()),
          rows(static_cast<int>(prefixes.size())) {
        if (tables.ndim() != 2) throw std::invalid_argument("block_tables: needs [groups, blocks]");
        groups_ = static_cast<int>(tables.shape(0));
        width_ = tables.shape(1);
        tables_.assign(tables.data(), tables.data() + tables.size());
        offsets_.assign(offsets.data(), offsets.data() + offsets.size());
        if (static_cast<int>(slots.size()) != rows || static_cast<int>(positions.size()) != rows)
            throw std::invalid_argument("slots, positions and prefix_lens: need one entry a row");
        if (static_cast<int>(offsets_.size()) != groups_ + 1 || offsets_.front() != 0 || offsets_.back() != rows ||
            !std::is_sorted(offsets_.begin(), offsets_.end()))
            throw std::invalid_argument("group_offsets: needs groups + 1 ascending numbers, from 0 to the number of rows");
    }

    const int32_t *table(int group) const { return tables_.data() + group * width_; }

    // Every page and slot that would be touched exists.
    void check(int64_t num_blocks, int64_t block_size) {
        if (num_blocks == checked_blocks_ && block_size == checked_size_) return;
        for (int group = 0; group < groups_; ++group) {
            int64_t longest = 0;
            for (int row = offsets_[group]; row < offsets_[group + 1]; ++row) {
                if (prefix[row] < 0) throw std::invalid_argument("prefix_lens: a length is below 0");
                longest = std::max<int64_t>(longest, prefix[row]);
                if (slots[row] >= num_blocks * block_size) throw std::invalid_argument("slots: beyond the last block");
            }
            const int64_t blocks = (longest + block_size - 1) / block_size;
            if (blocks > width_) throw std::invalid_argument("prefix_lens: a prefix is longer than its block table");
            for (int64_t i = 0; i < blocks; ++i)
                if (table(group)[i] < 0 || table(group)[i] >= num_blocks)
                    throw std::invalid_argument("block_tables: no such block: " + std::to_string(table(group)[i]));
        }
        checked_blocks_ = num_blocks;
        checked_size_ = block_size;
    }

    // Tasks for heads that share a key head `share` at a time, in `kv_heads` sets.
    const std::vector<Task> &tasks(int share, int kv_heads) {
        if (share == share_ && kv_heads == kv_heads_) return tasks_;
        tasks_.clear();
        const int most = std::max(1, MAX_QUERIES / share);
        for (int group = 0; group < groups_; ++group)
            for (int row = offsets_[group]; row < offsets_[group + 1]; row += most)
                for (int head = 0; head < kv_heads; ++head)
                    tasks_.push_back({group, row, std::min(row + most, offsets_[group + 1]), head});
        // Later rows of a causal chunk see more: long tasks first, so that no thread ends up alone with one.
        std::stable_sort(tasks_.begin(), tasks_.end(), [this](const Task &a, const Task &b) {
            return static_cast<int64_t>(prefix[a.last - 1]) * (a.last - a.first) > static_cast<int64_t>(prefix[b.last - 1]) * (b.last - b.first);
        });
        share_ = share;
        kv_heads_ = kv_heads;
        return tasks_;
    }

    std::vector<int32_t> prefix;
    std::vector<int64_t> slots;  // where a row is written; -1: nowhere, and it sees its own key; -2: nowhere, and it does not
    std::vector<int64_t> positions;
    int rows;

  private:
    int groups_ = 0;
    int64_t width_ = 0, checked_blocks_ = -1, checked_size_ = -1;
    int share_ = 0, kv_heads_ = 0;
    std::vector<int32_t> tables_, offsets_;
    std::vector<Task> tasks_;
};

// One call, all strides in elements.
struct Call {
    const void *q, *k, *v, *k_pages, *v_pages;
    void *out;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head, block_size;
    int heads, kv_heads, dim, window;
    float scale, softcap;
    const Plan *plan;
};

struct Kernel {
    void (*whole)(const Call &, const Task &);
    void (*part)(const Call &, const Task &, int64_t, float *);
    void (*merge)(const Call &, const Task &, int64_t, const float *, size_t);
};

#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wunused-function"

namespace portable {
#define LANES 4
#include "attention_kernel.h"
#undef LANES
}  // namespace portable

#ifdef VAS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace avx2 {
#define LANES 8
#include "attention_kernel.h"
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include "attention_kernel.h"
#undef LANES
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
namespace avx512_bf16 {
#define LANES 16
#define BF16_DOT 1
#include "attention_kernel.h"
#undef BF16_DOT
#undef LANES
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

using Lookup = const Kernel *(*)(int, int);

struct Level {
    const char *name;
    Lookup kernel;
    bool usable;
};

const std::vector<Level> &levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found;
#ifdef VAS_X86
        __builtin_cpu_init();
        const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        found.push_back({"avx512_bf16", avx512_bf16::kernel, v4 && __builtin_cpu_supports("avx512bf16")});
        found.push_back({"avx512", avx512::kernel, v4});
        found.push_back({"avx2", avx2::kernel, v3});
#endif
        found.push_back({"portable", portable::kernel, true});
        return found;
    }();
    return all;
}

const Level *best_level() {
    for (const Level &level : levels())
        if (level.usable) return &level;
    return nullptr;
}

const Level *current = best_level();

void use_level(const std::string &name) {
    for (const Level &level : levels())
        if (level.usable && name == level.name) {
            current = &level;
            return;
        }
    throw std::invalid_argument("level: this processor or build has no " + name);
}

size_t item_size(int type) {
    if (type < 0 || type > 2) throw std::invalid_argument("dtype: needs 0 (float32), 1 (bfloat16) or 2 (float16)");
    return type == 0 ? 4 : 2;
}

const char *address(uintptr_t pointer) { return reinterpret_cast<const char *>(pointer); }

// Pages of one layer: two arrays [num_blocks, block_size, kv_heads, dim].
class Pages {
  public:
    Pages(uintptr_t keys, uintptr_t values, int type, int64_t num_blocks, int64_t block_size, int kv_heads, int dim)
        : keys_(keys), values_(values), type_(type), size_(item_size(type)), num_blocks_(num_blocks), block_size_(block_size), kv_heads_(kv_heads), dim_(dim) {}

    // Writes slotted rows (when k is given), then attends. Strides in elements; the last axis is dense everywhere.
    void attend(Plan &plan, int threads, int q_type, int heads, uintptr_t q, int64_t q_row, int64_t q_head, uintptr_t k, int64_t k_row, int64_t k_head,
                uintptr_t v, int64_t v_row, int64_t v_head, uintptr_t out, float scale, float softcap, int window) {
        item_size(q_type);
        if (heads < 1 || heads % kv_heads_ != 0) throw std::invalid_argument("q: its heads are no multiple of the key heads");
        plan.check(num_blocks_, block_size_);
        py::gil_scoped_release free;
        if (k != 0)
            for (int row = 0; row < plan.rows; ++row)
                if (plan.slots[row] >= 0) copy_row(address(k), address(v), row, k_row, k_head, v_row, v_head, plan.slots[row]);
        const Call call{address(q), address(k), address(v), address(keys_), address(values_), reinterpret_cast<void *>(out),
                        q_row, q_head, k_row, k_head, v_row, v_head, block_size_, heads, kv_heads_, dim_, window, scale, softcap, &plan};
        run(call, plan, threads, *current->kernel(q_type, type_));
    }

    // Rows `rows[i]` of k and v to `slots[i]`; slot -1 is left out.
    void write(uintptr_t k, int64_t k_row, int64_t k_head, uintptr_t v, int64_t v_row, int64_t v_head, const Array<int64_t> &rows, const Array<int64_t> &slots) {
        if (rows.size() != slots.size()) throw std::invalid_argument("slots: needs one entry for each of rows");
        for (py::ssize_t i = 0; i < slots.size(); ++i) {
            const int64_t slot = slots.data()[i];
            if (slot >= num_blocks_ * block_size_) throw std::invalid_argument("slots: beyond the last block");
            if (slot >= 0) copy_row(address(k), address(v), rows.data()[i], k_row, k_head, v_row, v_head, slot);
        }
    }

  private:
    void copy_row(const char *k, const char *v, int64_t row, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head, int64_t slot) const {
        const size_t bytes = dim_ * size_;
        char *key = reinterpret_cast<char *>(keys_) + slot * kv_heads_ * bytes;
        char *value = reinterpret_cast<char *>(values_) + slot * kv_heads_ * bytes;
        for (int head = 0; head < kv_heads_; ++head) {
            std::memcpy(key + head * bytes, k + (row * k_row + head * k_head) * size_, bytes);
            std::memcpy(value + head * bytes, v + (row * v_row + head * v_head) * size_, bytes);
        }
    }

    static void run(const Call &call, Plan &plan, int threads, const Kernel &kernel) {
        const std::vector<Task> &tasks = plan.tasks(call.heads / call.kv_heads, call.kv_heads);
        const int64_t count = static_cast<int64_t>(tasks.size());
        if (count == 0) return;
        int64_t longest = 0;
        for (const Task &task : tasks) longest = std::max<int64_t>(longest, *std::max_element(&plan.prefix[task.first], &plan.prefix[task.last - 1] + 1));
        const int64_t chunks = (longest + CHUNK - 1) / CHUNK;
        if (threads > 1 && chunks > 1 && count < 4 * threads) return run_split(call, tasks, threads, kernel, chunks);
        vas::parallel_for(count, threads, [&](int64_t i, int) { kernel.whole(call, tasks[i]); });
    }

    // Few rows over long prefixes: the chunks are the tasks.
    static void run_split(const Call &call, const std::vector<Task> &tasks, int threads, const Kernel &kernel, int64_t chunks) {
        const int share = call.heads / call.kv_heads;
        int most = 0;
        for (const Task &task : tasks) most = std::max(most, task.last - task.first);
        const size_t dim = (call.dim + PAD - 1) / PAD * PAD, stride = static_cast<size_t>(most) * share * (dim + 2);
        const int64_t count = static_cast<int64_t>(tasks.size());
        std::vector<float> parts(stride * chunks * count);
        vas::parallel_for(count * chunks, threads, [&](int64_t i, int) {
            kernel.part(call, tasks[i / chunks], i % chunks, parts.data() + stride * i);
        });
        vas::parallel_for(count, threads, [&](int64_t i, int) { kernel.merge(call, tasks[i], chunks, parts.data() + stride * chunks * i, stride); });
    }

    uintptr_t keys_, values_;
    int type_;
    size_t size_;
    int64_t num_blocks_, block_size_;
    int kv_heads_, dim_;
};

}  // namespace

PYBIND11_MODULE(_attention, m) {
    m.doc() = "Paged attention on a CPU.";
    py::class_<Plan>(m, "Plan").def(
        py::init<const Array<int32_t> &, const Array<int32_t> &, const Array<int32_t> &, const Array<int64_t> &, const Array<int64_t> &>(),
        py::arg("block_tables"), py::arg("group_offsets"), py::arg("prefix_lens"), py::arg("slots"), py::arg("positions"));
    py::class_<Pages>(m, "Pages")
        .def(py::init<uintptr_t, uintptr_t, int, int64_t, int64_t, int, int>(), py::arg("keys"), py::arg("values"), py::arg("dtype"),
             py::arg("num_blocks"), py::arg("block_size"), py::arg("kv_heads"), py::arg("dim"))
        .def("attend", &Pages::attend)
        .def("write", &Pages::write);
    m.def("level", [] { return std::string(current->name); }, "Instruction set in use.");
    m.def("levels", [] {
        py::list names;
        for (const Level &level : levels())
            if (level.usable) names.append(level.name);
        return names;
    }, "Instruction sets that this processor can run, best first.");
    m.def("use_level", &use_level, py::arg("level"), "Chooses another of levels(), for tests and measurements.");
}
