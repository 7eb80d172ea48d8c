#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vec.h"

namespace srlm {
namespace {

using Lanes = Vec<float>;
constexpr int64_t kChunk = 64;  // tokens whose probabilities are added up before the draw looks for its place

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) as a generator with a counter.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

double uniform(int64_t key, int64_t step, int64_t attempt) {
  const uint64_t counter = static_cast<uint64_t>(step) + (static_cast<uint64_t>(attempt) << 32) + 1;
  return static_cast<double>(mix(static_cast<uint64_t>(key) + counter * 0x9E3779B97F4A7C15u) >> 11) * 0x1p-53;
}

// weights[i] = e^(factor * (logits[i] - highest))
void exponentials(const float* logits, int64_t n, float factor, float highest, float* weights) {
  const Lanes scale(factor), top(highest);
  for_each_vector<float>(n, [&](int64_t i, int64_t count) {
    store<float>(weights + i, exp<float>((load(logits + i, count) - top) * scale), count);
  });
}

// The highest of them; no number where one of them is none.
float maximum(const float* logits, int64_t n) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Lanes highest(kLowest);
  for_each_vector<float>(n, [&](int64_t i, int64_t count) {
    highest = at::vec::maximum(highest, Lanes::set(Lanes(kLowest), load(logits + i, count), count));
  });
  float lanes[Lanes::size()], top = kLowest;
  highest.store(lanes);
  for (const float lane : lanes) top = lane != lane || lane > top ? lane : top;
  return std::any_of(lanes, lanes + Lanes::size(), [](float lane) { return lane != lane; }) ? NAN : top;
}

// The sum of weights that are above `floor`, in an order that depends on n alone.
double sum_above(const float* weights, int64_t n, float floor) {
  constexpr int64_t kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) sums[j] += weights[i + j] > floor ? weights[i + j] : 0.0f;
  }
  for (; i < n; ++i) sums[0] += weights[i] > floor ? weights[i] : 0.0f;
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// The first token at which the running sum of the weights above `floor` exceeds `target`, else the last such token.
int64_t find(const float* weights, int64_t n, float floor, double target) {
  double before = 0;
  int64_t last = 0;
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t size = std::min(kChunk, n - start);
    const double sum = sum_above(weights + start, size, floor);
    if (before + sum > target) {
      for (int64_t i = start; i < start + size; ++i) {
        if (!(weights[i] > floor)) continue;
        last = i;
        before += weights[i];
        if (before > target) return i;
      }
      return last;
    }
    if (sum > 0) {
      for (int64_t i = start + size - 1; i >= start; --i) {
        if (weights[i] > floor) {
          last = i;
          break;
        }
      }
    }
    before += sum;
  }
  return last;
}

}  // namespace

Sampled sample(const float* logits, int64_t vocab, float temperature, float top_p, int64_t key, int64_t step,
               float* scratch) {
  const float highest = maximum(logits, vocab);
  if (!std::isfinite(highest)) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return {0, nan, nan};
  }
  exponentials(logits, vocab, 1.0f, highest, scratch);
  const float normaliser = highest + static_cast<float>(std::log(sum_above(scratch, vocab, 0.0f)));
  const auto result = [&](int64_t token) { return Sampled{token, logits[token] - normaliser, normaliser}; };
  if (temperature == 0) {
    int64_t token = 0;
    while (logits[token] != highest) ++token;
    return result(token);
  }
  if (temperature != 1) exponentials(logits, vocab, 1.0f / temperature, highest, scratch);
  // By rejection: draw from the tokens left, accept one if those more probable hold less than top_p of all, else draw
  // among these.
  const double all = sum_above(scratch, vocab, 0.0f);
  double left = all;
  float floor = 0.0f;
  for (int64_t attempt = 0;; ++attempt) {
    const int64_t token = find(scratch, vocab, floor, uniform(key, step, attempt) * left);
    if (top_p >= 1) return result(token);
    const double likelier = sum_above(scratch, vocab, scratch[token]);
    if (likelier < top_p * all) return result(token);
    floor = scratch[token];
    left = likelier;
  }
}

}  // namespace srlm
