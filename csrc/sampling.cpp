// Module vas_engine._sampling: plain buffers in and out, no torch. The Python side (vas_engine/sampling) names what is wrong
// with an argument; here a wrong one is only refused.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "sampling_choose.h"
#include "sampling_kernels.h"
#include "sampling_noise.h"
#include "sampling_select.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// The elements of a contiguous array of exactly this dtype and size; no conversion, which would copy.
template <class T>
T* elements(py::handle object, py::ssize_t size) {
  if (!py::isinstance<Array<T>>(object)) throw py::value_error("wrong dtype or layout");
  const auto array = py::reinterpret_borrow<Array<T>>(object);
  if (array.size() != size) throw py::value_error("wrong size");
  return const_cast<T*>(array.data());
}

vas::Settings settings_of(py::handle rows, py::handle arrays, int64_t history, int64_t bias) {
  const int64_t n = py::len(rows);
  auto field = [&](const char* name) { return arrays.attr(name); };
  vas::Settings s{};
  s.count = n;
  s.rows = elements<int64_t>(rows, n);
  s.temperature = elements<double>(field("temperature"), n);
  s.top_p = elements<double>(field("top_p"), n);
  s.min_p = elements<double>(field("min_p"), n);
  s.repetition_penalty = elements<double>(field("repetition_penalty"), n);
  s.presence_penalty = elements<double>(field("presence_penalty"), n);
  s.frequency_penalty = elements<double>(field("frequency_penalty"), n);
  s.top_k = elements<int32_t>(field("top_k"), n);
  s.num_candidates = elements<int32_t>(field("num_candidates"), n);
  s.seed = elements<uint64_t>(field("seed"), n);
  s.position = elements<int64_t>(field("position"), n);
  s.keep_tail = elements<bool>(field("keep_tail"), n);
  s.history_offsets = elements<int64_t>(field("history_offsets"), n + 1);
  s.history_ids = elements<int32_t>(field("history_ids"), history);
  s.history_counts = elements<int32_t>(field("history_counts"), history);
  s.bias_offsets = elements<int64_t>(field("bias_offsets"), n + 1);
  s.bias_ids = elements<int32_t>(field("bias_ids"), bias);
  s.bias_values = elements<float>(field("bias_values"), bias);
  return s;
}

vas::Output output_of(py::handle out, int64_t n, int64_t width) {
  auto field = [&](const char* name) { return out.attr(name); };
  return {width,
          elements<int64_t>(field("token_ids"), n * width),
          elements<double>(field("log_probs"), n * width),
          elements<double>(field("noise"), n * width),
          elements<int64_t>(field("count"), n),
          elements<int64_t>(field("tail"), n),
          elements<double>(field("tail_log_mass"), n),
          elements<bool>(field("finite"), n)};
}

void select_batch(uintptr_t data, int dtype, int64_t rows, int64_t vocabulary, int64_t stride, py::handle sequence_rows,
                  py::handle arrays, py::handle out, int threads) {
  if (dtype < 0 || dtype > 2 || stride < vocabulary) throw py::value_error("wrong dtype or stride");
  const vas::Logits logits{reinterpret_cast<const void*>(data), static_cast<vas::DType>(dtype), rows, vocabulary, stride};
  const int64_t history = py::len(arrays.attr("history_ids")), bias = py::len(arrays.attr("bias_ids"));
  const vas::Settings settings = settings_of(sequence_rows, arrays, history, bias);
  if (!vas::legal(logits, settings, history, bias)) throw py::value_error("a setting is out of range");
  const int64_t width = py::cast<Array<int64_t>>(out.attr("token_ids")).shape(1);
  const vas::Output output = output_of(out, settings.count, width);
  for (int64_t s = 0; s < settings.count; ++s) {
    if (std::min<int64_t>(settings.num_candidates[s], vocabulary) + 1 > width) throw py::value_error("too few columns");
  }
  py::gil_scoped_release release;
  vas::select(logits, settings, output, threads);
}

Array<double> gumbel_noise(uint64_t seed, int64_t position, const Array<int64_t>& tokens) {
  Array<double> out(tokens.size());
  const vas::NoiseStream stream{seed, position};
  for (py::ssize_t i = 0; i < tokens.size(); ++i) out.mutable_data()[i] = stream.gumbel(tokens.data()[i]);
  return out;
}

Array<double> gumbel_of_words(const Array<uint32_t>& high, const Array<uint32_t>& low) {
  if (high.size() != low.size()) throw py::value_error("high and low differ in size");
  Array<double> out(high.size());
  for (py::ssize_t i = 0; i < high.size(); ++i) out.mutable_data()[i] = vas::gumbel_of_words(high.data()[i], low.data()[i]);
  return out;
}

Array<double> value_tilt(const Array<float>& utilities, const Array<float>& baselines, const Array<double>& limits,
                         const Array<int64_t>& row_sequence) {
  Array<double> tilt(row_sequence.size());
  vas::value_tilt(utilities.data(), baselines.data(), limits.data(), row_sequence.data(), row_sequence.size(),
                  utilities.shape(1), tilt.mutable_data());
  return tilt;
}

vas::Columns columns_of(py::handle log_probs, py::handle noise, py::handle count, py::handle tail) {
  const auto shape = py::cast<Array<double>>(log_probs);
  if (shape.ndim() != 2) throw py::value_error("columns must be [S, W]");
  vas::Columns c{};
  c.sequences = shape.shape(0), c.width = shape.shape(1);
  c.log_probs = elements<double>(log_probs, c.sequences * c.width);
  c.noise = elements<double>(noise, c.sequences * c.width);
  c.count = elements<int64_t>(count, c.sequences);
  c.tail = elements<int64_t>(tail, c.sequences);
  for (int64_t s = 0; s < c.sequences; ++s) {
    if (c.count[s] < 0 || c.count[s] > c.width) throw py::value_error("more columns than there are");
  }
  return c;
}

Array<bool> prune(py::handle log_probs, py::handle noise, py::handle count, py::handle tail, py::handle low,
                  py::handle high, py::handle all_needed) {
  const vas::Columns c = columns_of(log_probs, noise, count, tail);
  Array<bool> needed({c.sequences, c.width});
  vas::prune(c, elements<double>(low, c.sequences), elements<double>(high, c.sequences),
             elements<bool>(all_needed, c.sequences), needed.mutable_data());
  return needed;
}

py::tuple choose(py::handle token_ids, py::handle log_probs, py::handle noise, py::handle count, py::handle tail,
                 py::handle tail_log_mass, py::handle finite, py::handle tilt) {
  vas::Columns c = columns_of(log_probs, noise, count, tail);
  c.token_ids = elements<int64_t>(token_ids, c.sequences * c.width);
  c.tail_log_mass = elements<double>(tail_log_mass, c.sequences);
  c.finite = elements<bool>(finite, c.sequences);
  const double* t = elements<double>(tilt, c.sequences * c.width);
  Array<int64_t> column(c.sequences), token(c.sequences);
  Array<double> log_prob(c.sequences), tilted(c.sequences), kl(c.sequences);
  for (int64_t s = 0; s < c.sequences; ++s) {
    const vas::Winner w = vas::choose(c, s, t + s * c.width);
    column.mutable_data()[s] = w.column, token.mutable_data()[s] = w.token_id;
    log_prob.mutable_data()[s] = w.log_prob, tilted.mutable_data()[s] = w.tilted_log_prob;
    kl.mutable_data()[s] = w.kl;
  }
  return py::make_tuple(column, token, log_prob, tilted, kl);
}

}  // namespace

PYBIND11_MODULE(_sampling, m) {
  m.doc() = "CPU sampling path; see vas_engine.sampling";
  m.def("select", &select_batch);
  m.def("value_tilt", &value_tilt);
  m.def("prune", &prune);
  m.def("choose", &choose);
  m.def("gumbel_noise", &gumbel_noise);
  m.def("gumbel_of_words", &gumbel_of_words);
  m.def("philox4x32", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    const vas::PhiloxWords w = vas::philox4x32(c0, c1, c2, c3, k0, k1);
    return py::make_tuple(w.word[0], w.word[1], w.word[2], w.word[3]);
  });
  m.def("instruction_set", [] { return vas::kernels().name; });
  m.def("set_instruction_set", &vas::set_kernels);
}
