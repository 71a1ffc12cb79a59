#include "sampling_sequence.h"

namespace vas {
namespace {

constexpr int kBinsPerNat = 64, kBins = 4096;

int bin_of(double below) { return below * kBinsPerNat < kBins - 1 ? static_cast<int>(below * kBinsPerNat) : kBins - 1; }

int chunks_of(int64_t vocabulary) { return static_cast<int>((vocabulary + kChunk - 1) / kChunk); }

}  // namespace

Sequence::Sequence(const Logits& logits, const Settings& settings, int64_t index, const Output& out, Team team)
    : logits_(logits),
      settings_(settings),
      index_(index),
      out_(out),
      team_(team),
      own_(team_.sequence()),
      kernels_(kernels()),
      row_(logits.row(settings.rows[index])),
      vocabulary_(logits.vocabulary),
      slices_(static_cast<int>((logits.vocabulary + kSlice - 1) / kSlice)),
      greedy_(settings.temperature[index] == 0),
      scale_(greedy_ ? 1.0 : 1.0 / settings.temperature[index]),
      candidates_(settings.num_candidates[index]),
      noise_{settings.seed[index], settings.position[index]} {}

void Sequence::run() {
  patch();
  own_.slice_sum.resize(slices_);
  own_.slice_shift.resize(slices_);
  own_.excluded.clear();
  team_.each([](Scratch& scratch) { scratch.top.clear(), scratch.champion = Champion{}; });
  if (wanted() == 0) return plain();
  guided();
}

// Scores that differ from the logits -----------------------------------------------------------------------------

double Sequence::raw(int64_t id) {
  alignas(64) double score[16];
  kernels_.load(row_, logits_.dtype, id, 1, 1.0, score);
  return score[0];
}

// Bias and penalties touch few tokens: their scores are computed here and written over each chunk when it is loaded.
void Sequence::patch() {
  const Settings& s = settings_;
  own_.patches.clear();
  if (own_.slot.size() < static_cast<size_t>(vocabulary_)) own_.slot.resize(vocabulary_, -1);
  for (int64_t i = s.bias_offsets[index_]; i < s.bias_offsets[index_ + 1]; ++i) {
    own_.slot[s.bias_ids[i]] = static_cast<int32_t>(own_.patches.size());
    own_.patches.push_back({raw(s.bias_ids[i]) + static_cast<double>(s.bias_values[i]), s.bias_ids[i]});
  }
  const double repetition = s.repetition_penalty[index_], presence = s.presence_penalty[index_];
  const double frequency = s.frequency_penalty[index_];
  if (repetition != 1 || presence != 0 || frequency != 0) {
    for (int64_t i = s.history_offsets[index_]; i < s.history_offsets[index_ + 1]; ++i) {
      const int32_t id = s.history_ids[i], count = s.history_counts[i], slot = own_.slot[id];
      double score = slot < 0 ? raw(id) : own_.patches[slot].score;
      score = score < 0 ? score * repetition : score / repetition;
      score = score - frequency * count - (count > 0 ? presence : 0.0);
      if (slot < 0) {
        own_.patches.push_back({score, id});
      } else {
        own_.patches[slot].score = score;
      }
    }
  }
  own_.chunk_begin.clear();
  if (own_.patches.empty()) return;
  own_.chunk_begin.assign(chunks_of(vocabulary_) + 1, 0);
  for (const Token& p : own_.patches) own_.slot[p.id] = -1, ++own_.chunk_begin[p.id / kChunk + 1];
  for (size_t c = 1; c < own_.chunk_begin.size(); ++c) own_.chunk_begin[c] += own_.chunk_begin[c - 1];
  own_.sorted.resize(own_.patches.size());
  for (const Token& p : own_.patches) own_.sorted[own_.chunk_begin[p.id / kChunk]++] = {p.score * scale_, p.id};
  for (size_t c = own_.chunk_begin.size() - 1; c > 0; --c) own_.chunk_begin[c] = own_.chunk_begin[c - 1];
  own_.chunk_begin[0] = 0;
}

int Sequence::load(int64_t begin, Scratch& scratch) {
  const int n = static_cast<int>(std::min<int64_t>(kChunk, vocabulary_ - begin));
  kernels_.load(row_, logits_.dtype, begin, n, scale_, scratch.scores);
  if (!own_.chunk_begin.empty()) {
    const int64_t c = begin / kChunk;
    for (int i = own_.chunk_begin[c]; i < own_.chunk_begin[c + 1]; ++i) {
      scratch.scores[own_.sorted[i].id - begin] = own_.sorted[i].score;
    }
  }
  return n;
}

// Tokens outside the support, and candidates, take no part in a sweep of the tail.
void Sequence::cut_chunk(int64_t begin, int n, Scratch& scratch) const {
  if (cut_.active()) {
    for (int i = 0; i < n; ++i) {
      const double s = scratch.scores[i];
      scratch.scores[i] = (s > cut_.score) | ((s == cut_.score) & (begin + i <= cut_.id)) ? s : -kInfinity;
    }
  }
  auto id = std::lower_bound(own_.excluded.begin(), own_.excluded.end(), begin);
  for (; id != own_.excluded.end() && *id < begin + n; ++id) scratch.scores[*id - begin] = -kInfinity;
}

// The top tokens -------------------------------------------------------------------------------------------------

// How many top tokens are needed: the candidates and the first of the tail, all of top_k and some that might tie with
// its last, and a likely support for top_p and min_p. 0: the logits need to be read but once.
int64_t Sequence::wanted() const {
  int64_t n = candidates_ > 0 || greedy_ ? candidates_ + 1 : 0;
  const int64_t top_k = settings_.top_k[index_];
  if (top_k > 0 && top_k < vocabulary_) n = std::max(n, top_k + 16);
  if (settings_.top_p[index_] < 1 || settings_.min_p[index_] > 0) n = std::max(n, kLikelySupport);
  return std::min(n, vocabulary_);
}

void Sequence::keep_best(std::vector<Token>& top, int64_t wanted) {
  if (top.size() <= static_cast<size_t>(wanted)) return;
  std::nth_element(top.begin(), top.begin() + (wanted - 1), top.end(), before);
  top.resize(wanted);
}

// The lists stay short: past twice the wanted number only the best are kept.
void Sequence::trim(int64_t wanted, Scratch& scratch) {
  if (scratch.top.size() < static_cast<size_t>(wanted + std::max<int64_t>(wanted, 32))) return;
  keep_best(scratch.top, wanted);
  threshold_.raise(scratch.top[wanted - 1].score);
}

void Sequence::gather(int64_t begin, int n, const Extent& extent, int64_t wanted, Scratch& scratch) {
  constexpr double kLowest = std::numeric_limits<double>::lowest();
  const double threshold = std::max(threshold_.get(), kLowest);
  if (extent.max < threshold) return;
  const int found = kernels_.at_least(scratch.scores, n, threshold, scratch.indices);
  for (int i = 0; i < found; ++i) {
    scratch.top.push_back({scratch.scores[scratch.indices[i]], begin + scratch.indices[i]});
  }
  trim(wanted, scratch);
}

// A logit that at least the wanted number of tokens reach. The row is dealt out to kChunk groups: if so many groups have
// their largest logit above a threshold, so many tokens do. A patched token can spoil one group. False: no such bound.
bool Sequence::bound(int64_t wanted, float* threshold) {
  const int64_t needed = wanted + static_cast<int64_t>(own_.patches.size());
  if (needed > kBoundTo || vocabulary_ <= 2 * kChunk) return false;
  team_.each([](Scratch& scratch) { std::fill_n(scratch.raw_maxima, kChunk, -std::numeric_limits<float>::infinity()); });
  team_.run(slices_, [&](int slice, Scratch& scratch) {
    const int64_t end = std::min<int64_t>(vocabulary_, (slice + int64_t{1}) * kSlice);
    for (int64_t begin = int64_t{slice} * kSlice; begin < end; begin += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, end - begin));
      if (kernels_.absorb(row_, logits_.dtype, begin, n, scratch.raw_maxima)) bad_.store(true);
    }
  });
  if (bad_) return false;
  double* maxima = team_.local().maxima;
  std::fill_n(maxima, kChunk, -kInfinity);
  team_.each([&](Scratch& scratch) {
    for (int i = 0; i < kChunk; ++i) maxima[i] = std::max<double>(maxima[i], scratch.raw_maxima[i]);
  });
  double high = -kInfinity, low = kInfinity;
  for (int i = 0; i < kChunk; ++i) {
    high = std::max(high, maxima[i]);
    if (maxima[i] > -kInfinity) low = std::min(low, maxima[i]);
  }
  if (kernels_.count_at_least(maxima, low) < needed) return false;
  for (int step = 0; step < 20; ++step) {
    const double middle = static_cast<float>(low + (high - low) / 2);
    const int count = kernels_.count_at_least(maxima, middle);
    (count >= needed ? low : high) = middle;
    if (count >= needed && count <= needed + needed / 16) break;
  }
  *threshold = static_cast<float>(low);
  return true;
}

void Sequence::gather_raw(float threshold, int64_t wanted) {
  const double lowest = static_cast<double>(threshold) * scale_;
  threshold_.raise(lowest);
  team_.run(slices_, [&](int slice, Scratch& scratch) {
    const int64_t end = std::min<int64_t>(vocabulary_, (slice + int64_t{1}) * kSlice);
    for (int64_t begin = int64_t{slice} * kSlice; begin < end; begin += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, end - begin));
      const bool patched = !own_.chunk_begin.empty();
      const Token* first = patched ? own_.sorted.data() + own_.chunk_begin[begin / kChunk] : nullptr;
      const Token* last = patched ? own_.sorted.data() + own_.chunk_begin[begin / kChunk + 1] : nullptr;
      const int found = kernels_.raw_at_least(row_, logits_.dtype, begin, n, threshold, scratch.indices);
      for (int i = 0; i < found; ++i) {
        const int64_t id = begin + scratch.indices[i];
        if (std::any_of(first, last, [&](const Token& p) { return p.id == id; })) continue;
        const double score = raw(id) * scale_;
        if (score >= threshold_.get()) scratch.top.push_back({score, id});
      }
      std::copy_if(first, last, std::back_inserter(scratch.top), [&](const Token& p) { return p.score >= lowest; });
      trim(wanted, scratch);
    }
  });
}

// Orders the top tokens and weighs them relative to the first.
void Sequence::sort_top() {
  std::vector<Token>& top = own_.top;
  const int n = static_cast<int>(top.size()), padded = (n + 15) / 16 * 16;
  own_.top_scores.assign(padded, -kInfinity);
  own_.top_weights.resize(padded);
  if (n > 32 && n <= 2 * kBoundTo) {
    // Ranks by counting: no branch to mispredict. Equal scores keep their order, which is that of ids on one thread.
    own_.above.resize(n);
    for (int i = 0; i < n; ++i) own_.top_scores[i] = top[i].score;
    kernels_.rank(own_.top_scores.data(), n, own_.above.data());
    own_.border.assign(n, Token{0, -1});
    for (int i = 0; i < n; ++i) {
      int place = own_.above[i];
      while (own_.border[place].id >= 0) ++place;
      own_.border[place] = top[i];
    }
    top.swap(own_.border);
  }
  if (!std::is_sorted(top.begin(), top.end(), before)) std::sort(top.begin(), top.end(), before);
  for (int i = 0; i < n; ++i) own_.top_scores[i] = top[i].score;
  if (n) kernels_.weigh(own_.top_scores.data(), n, top[0].score, own_.top_weights.data());
}

void Sequence::scan(int64_t wanted) {
  float threshold;
  if (bound(wanted, &threshold)) {
    gather_raw(threshold, wanted);
  } else if (!bad_) {
    team_.run(slices_, [&](int slice, Scratch& scratch) {
      const int64_t end = std::min<int64_t>(vocabulary_, (slice + int64_t{1}) * kSlice);
      for (int64_t begin = int64_t{slice} * kSlice; begin < end; begin += kChunk) {
        const int n = load(begin, scratch);
        const Extent extent = kernels_.extent(scratch.scores, n);
        if (extent.bad) bad_.store(true, std::memory_order_relaxed);
        gather(begin, n, extent, wanted, scratch);
      }
    });
  }
  if (bad_) return;
  std::vector<Token>& top = own_.top;
  top.clear();
  team_.each([&](Scratch& scratch) { top.insert(top.end(), scratch.top.begin(), scratch.top.end()); });
  keep_best(top, wanted);
  sort_top();
  complete_ = small_ = top.size() < static_cast<size_t>(wanted) || wanted == vocabulary_;
  support_ = top.size();
}

// The support ----------------------------------------------------------------------------------------------------

double Sequence::weight_of_top(size_t begin, size_t end) const {
  double sum = 0;
  for (size_t i = begin; i < end; ++i) sum += own_.top_weights[i];
  return sum;
}

// Relative to the first of the tail, which may be so far below the candidates that its own weight underflows.
double Sequence::weight_of_tail(size_t begin) const {
  double sum = 0;
  for (size_t i = begin; i < support_; ++i) sum += std::exp(own_.top[i].score - own_.top[begin].score);
  return sum;
}

void Sequence::limit_top_k() {
  const size_t top_k = settings_.top_k[index_];
  if (top_k == 0 || top_k >= own_.top.size()) return;
  const double last = own_.top[top_k - 1].score;
  size_t n = top_k;
  while (n < support_ && own_.top[n].score == last) ++n;
  if (n < support_ || complete_) {
    support_ = n, small_ = true;
  } else {
    cut_.score = last;  // more tokens tie than were gathered
  }
}

void Sequence::limit_top_p() {
  const double top_p = settings_.top_p[index_];
  if (top_p >= 1) return;
  double shift = own_.top[0].score;
  const double target = (top_p - kTopPSlack) * (small_ ? weight_of_top(0, support_) : sweep(false, &shift));
  double sum = own_.top_weights[0];
  for (size_t i = 1; i < support_; ++i) {
    if (sum >= target) {
      support_ = i, small_ = true;
      return;
    }
    sum += own_.top_weights[i];
  }
  if (sum >= target) small_ = true;
  if (!small_) cut_ = nucleus(target);
}

void Sequence::limit_min_p() {
  const double min_p = settings_.min_p[index_];
  if (min_p <= 0) return;
  const double lowest = own_.top[0].score + std::log(min_p);
  if (small_ || own_.top[support_ - 1].score < lowest) {
    small_ = true;
    while (support_ > 1 && own_.top[support_ - 1].score < lowest) --support_;
  } else if (lowest > cut_.score) {
    cut_ = Cut{};
    cut_.score = lowest;
  }
}

// Last token of the smallest set of top tokens whose weight reaches target: a histogram finds the bin it lies in, then the bin
// is halved until few tokens are left to be sorted.
Cut Sequence::nucleus(double target) {
  Scratch& scratch = team_.local();
  const double max = own_.top[0].score;
  own_.histogram.assign(kBins, 0.0);
  for (int64_t begin = 0; begin < vocabulary_; begin += kChunk) {
    const int n = load(begin, scratch);
    cut_chunk(begin, n, scratch);
    kernels_.weigh(scratch.scores, n, max, scratch.weights);
    for (int i = 0; i < n; ++i) own_.histogram[bin_of(max - scratch.scores[i])] += scratch.weights[i];
  }
  double sum = 0;
  int bin = 0;
  while (bin < kBins - 1 && sum + own_.histogram[bin] < target) sum += own_.histogram[bin++];

  std::vector<Token>& border = own_.border;
  border.clear();
  for (int64_t begin = 0; begin < vocabulary_; begin += kChunk) {
    const int n = load(begin, scratch);
    cut_chunk(begin, n, scratch);
    for (int i = 0; i < n; ++i) {
      const double score = scratch.scores[i];
      if (score > -kInfinity && bin_of(max - score) == bin) border.push_back({score, begin + i});
    }
  }
  if (border.empty()) return cut_;
  auto weigh = [&](const Token& token) { return std::exp(token.score - max); };
  auto low = border.begin(), high = border.end();
  while (high - low > 64) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high, before);
    double half = 0;
    for (auto token = low; token != middle; ++token) half += weigh(*token);
    if (sum + half < target) {
      sum += half, low = middle;
    } else {
      high = middle;
    }
  }
  std::sort(low, high, before);
  auto last = low;
  for (sum += weigh(*last); last + 1 != high && sum < target; sum += weigh(*last)) ++last;
  Cut cut;
  cut.score = last->score, cut.id = last->id;
  return cut;
}

// The tail -------------------------------------------------------------------------------------------------------

// Looks for tokens of a chunk that beat the best so far. Only for tokens that might are logarithms computed.
void Sequence::race_chunk(int64_t begin, int n, double shift, Scratch& scratch) {
  for (int start = 0; start < n;) {
    const double rate = std::min(std::exp(shift - best_.get()), 1e200);
    const Survivors survivors =
        kernels_.race(scratch.weights, n, start, begin, noise_.seed, noise_.position, rate);
    for (uint32_t mask = survivors.mask; mask; mask &= mask - 1) {
      const int i = survivors.block + __builtin_ctz(mask);
      if (i >= n || scratch.scores[i] == -kInfinity) continue;
      const double perturbed = scratch.scores[i] + noise_.gumbel(begin + i);
      scratch.champion.offer({perturbed, scratch.scores[i], begin + i});
      best_.raise(perturbed);
    }
    start = survivors.block + 16;
  }
}

// fixed_shift = -inf: the largest score is not known yet, sums are relative to the largest met in the slice.
void Sequence::sweep_slice(int slice, bool racing, double fixed_shift, Scratch& scratch) {
  const int64_t end = std::min<int64_t>(vocabulary_, (slice + int64_t{1}) * kSlice);
  double sum = 0, shift = fixed_shift;
  for (int64_t begin = int64_t{slice} * kSlice; begin < end; begin += kChunk) {
    const int n = load(begin, scratch);
    cut_chunk(begin, n, scratch);
    if (fixed_shift == -kInfinity) {
      const Extent extent = kernels_.extent(scratch.scores, n);
      if (extent.bad) return bad_.store(true, std::memory_order_relaxed);
      if (extent.max > shift) sum *= std::exp(shift - extent.max), shift = extent.max;
      if (shift == -kInfinity) continue;
    }
    sum += kernels_.weigh(scratch.scores, n, shift, scratch.weights);
    if (racing) race_chunk(begin, n, shift, scratch);
  }
  own_.slice_sum[slice] = sum, own_.slice_shift[slice] = shift;
}

// Sum of exp(score - *shift) over the support without the candidates; a *shift of -inf is replaced by the largest score.
double Sequence::sweep(bool racing, double* shift) {
  team_.run(slices_, [&](int slice, Scratch& scratch) { sweep_slice(slice, racing, *shift, scratch); });
  if (bad_) return 0;
  for (double s : own_.slice_shift) *shift = std::max(*shift, s);
  double sum = 0;
  if (*shift == -kInfinity) return sum;
  for (int i = 0; i < slices_; ++i) sum += own_.slice_sum[i] * std::exp(own_.slice_shift[i] - *shift);
  return sum;
}

Champion Sequence::race_list(size_t begin) {
  constexpr double kMaxNoise = 45.1;  // -log(-log(1 - 2^-65))
  const double max = own_.top[0].score;
  const bool weighed = own_.top_weights[begin] > 1e-200;
  Champion best;
  double rate = kInfinity;
  for (size_t i = begin; i < support_; ++i) {
    const Token& token = own_.top[i];
    if (token.score + kMaxNoise < best.perturbed) break;
    const NoiseStream::Words words = noise_.words(token.id);
    // The test of the vectorised race.
    if (weighed && words.high * 0x1p-32 > own_.top_weights[i] * rate) continue;
    best.offer({token.score + gumbel_of_words(words.high, words.low), token.score, token.id});
    rate = std::exp(max - best.perturbed) * (1 + 1e-7);
  }
  return best;
}

// Results --------------------------------------------------------------------------------------------------------

void Sequence::column(int64_t place, const Token& token, double log_prob) {
  const int64_t at = index_ * out_.width + place;
  out_.token_ids[at] = token.id;
  out_.log_probs[at] = log_prob;
  out_.noise[at] = greedy_ ? 0.0 : noise_.gumbel(token.id);
}

void Sequence::finish(int64_t count, int64_t tail, double tail_log_mass, bool finite) {
  for (int64_t at = index_ * out_.width + count; at < (index_ + 1) * out_.width; ++at) {
    out_.token_ids[at] = -1, out_.log_probs[at] = -kInfinity, out_.noise[at] = 0;
  }
  out_.count[index_] = count, out_.tail[index_] = tail;
  out_.tail_log_mass[index_] = tail_log_mass, out_.finite[index_] = finite;
}

void Sequence::plain() {
  double shift = -kInfinity;
  const double sum = sweep(true, &shift);
  Champion best;
  team_.each([&](Scratch& scratch) { best.offer(scratch.champion); });
  if (bad_ || best.id < 0) return finish(0, -1, -kInfinity, false);
  column(0, {best.score, best.id}, best.score - shift - std::log(sum));
  finish(1, 0, 0.0, true);
}

void Sequence::guided() {
  scan(wanted());
  if (bad_ || own_.top.empty()) return finish(0, -1, -kInfinity, false);
  limit_top_k();
  limit_top_p();
  limit_min_p();
  const size_t count = std::min<size_t>(candidates_, support_);
  const bool tail = count < support_ || !small_;
  const bool drawn = tail && (settings_.keep_tail[index_] || candidates_ == 0), racing = drawn && !greedy_;
  for (size_t i = 0; i < count; ++i) own_.excluded.push_back(own_.top[i].id);
  std::sort(own_.excluded.begin(), own_.excluded.end());

  const double max = own_.top[0].score;
  double shift = tail ? own_.top[count].score : 0.0, tail_sum = 0;
  if (tail) tail_sum = small_ ? weight_of_tail(count) : sweep(racing, &shift);
  const double log_sum = std::log(weight_of_top(0, count) + (tail ? tail_sum * std::exp(shift - max) : 0.0));
  for (size_t i = 0; i < count; ++i) column(i, own_.top[i], own_.top[i].score - max - log_sum);

  if (drawn) {
    Champion best{0, own_.top[count].score, own_.top[count].id};
    if (racing && small_) best = race_list(count);
    if (racing && !small_) {
      best = Champion{};
      team_.each([&](Scratch& scratch) { best.offer(scratch.champion); });
    }
    column(count, {best.score, best.id}, best.score - max - log_sum);
  }
  const double tail_log_mass = tail ? shift - max + std::log(tail_sum) - log_sum : -kInfinity;
  finish(count + drawn, drawn ? static_cast<int64_t>(count) : -1, count == 0 ? 0.0 : tail_log_mass, true);
}

}  // namespace vas
