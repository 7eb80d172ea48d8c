#include "paged_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vec.h"

namespace srlm {
namespace {

using Lanes = Vec<float>;
constexpr int64_t kLanes = Lanes::size();
constexpr int kTileQueries = 6;  // that share every load of a key or a value
constexpr bool kManyRegisters = Lanes::size() == 16;

// scores[i][16 b .. 16 b + 15] = scale * q_i . the keys of block b, for kBlocks blocks; rows of scores are `ld` apart.
template <int kQueries, int kBlocks>
void scores_of(const Query* queries, const float* const* blocks, int64_t head_dim, float scale, float* scores,
               int64_t ld) {
  constexpr int kVectors = kBlockTokens / kLanes;
  Lanes sums[kQueries][kBlocks][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
    for (int b = 0; b < kBlocks; ++b) {
      for (int j = 0; j < kVectors; ++j) sums[i][b][j] = Lanes(0);
    }
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    Lanes keys[kBlocks][kVectors];
    for (int b = 0; b < kBlocks; ++b) {
      for (int j = 0; j < kVectors; ++j) keys[b][j] = Lanes::loadu(blocks[b] + d * kBlockTokens + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const Lanes left(queries[i].q[d]);
      for (int b = 0; b < kBlocks; ++b) {
        for (int j = 0; j < kVectors; ++j) sums[i][b][j] = at::vec::fmadd(left, keys[b][j], sums[i][b][j]);
      }
    }
  }
  const Lanes factor(scale);
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
    for (int b = 0; b < kBlocks; ++b) {
      for (int j = 0; j < kVectors; ++j) {
        (sums[i][b][j] * factor).store(scores + i * ld + b * kBlockTokens + j * kLanes);
      }
    }
  }
}

// Weights e^(score - highest) in place of the first `length` of `padded` scores, zeros after them; 1 / their sum.
float softmax(float* scores, int64_t length, int64_t padded) {
  std::fill(scores + length, scores + padded, -std::numeric_limits<float>::infinity());
  Lanes highest = Lanes::loadu(scores);
  for (int64_t t = kLanes; t < padded; t += kLanes) highest = at::vec::maximum(highest, Lanes::loadu(scores + t));
  float lanes[kLanes];
  highest.store(lanes);
  const Lanes top(*std::max_element(lanes, lanes + kLanes));
  Lanes total(0);
  for (int64_t t = 0; t < padded; t += kLanes) {
    const Lanes weight = exp<float>(Lanes::loadu(scores + t) - top);
    weight.store(scores + t);
    total += weight;
  }
  total.store(lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return 1.0f / lanes[0];
}

// out_i[d .. d + kVectors lanes) = factor_i * the sum of weights[i][t] * the values of position t, for t < length; the
// even and the odd positions are a chain of additions each.
template <int kQueries, int kVectors>
void weighted_sums(const Query* queries, const float* weights, int64_t ld, const float* factors,
                   const float* const* blocks, int64_t length, int64_t head_dim, int64_t d) {
  Lanes sums[kQueries][2][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
    for (int j = 0; j < kVectors; ++j) sums[i][0][j] = sums[i][1][j] = Lanes(0);
  }
  for (int64_t start = 0; start < length; start += kBlockTokens) {
    const float* const values = blocks[start / kBlockTokens] + kBlockTokens * head_dim + d;
    const int64_t n = std::min(kBlockTokens, length - start);
    const auto step = [&](int64_t t, int chain) {
      Lanes value[kVectors];
      for (int j = 0; j < kVectors; ++j) value[j] = Lanes::loadu(values + t * head_dim + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kQueries; ++i) {
        const Lanes weight(weights[i * ld + start + t]);
        for (int j = 0; j < kVectors; ++j) sums[i][chain][j] = at::vec::fmadd(weight, value[j], sums[i][chain][j]);
      }
    };
    int64_t t = 0;
    for (; t + 2 <= n; t += 2) {
      step(t, 0);
      step(t + 1, 1);
    }
    if (t < n) step(t, 0);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
    const Lanes factor(factors[i]);
    for (int j = 0; j < kVectors; ++j) {
      ((sums[i][0][j] + sums[i][1][j]) * factor).store(queries[i].out + d + j * kLanes);
    }
  }
}

}  // namespace

PagedAttention::PagedAttention(int64_t head_dim)
    : head_dim_(head_dim), scale_(1.0f / std::sqrt(static_cast<float>(head_dim))) {}

template <int kQueries>
void PagedAttention::run_tile(const Query* tile) {
  constexpr int kBlocks = kManyRegisters || kQueries == 1 ? 4 : 1;
  constexpr int kVectors = kQueries == 1 ? 4 : kManyRegisters ? 2 : 1;
  int64_t length = 0;
  for (int i = 0; i < kQueries; ++i) length = std::max(length, tile[i].length);
  const int64_t n_blocks = (length + kBlockTokens - 1) / kBlockTokens, padded = n_blocks * kBlockTokens;
  scores_.resize(std::max<size_t>(scores_.size(), kQueries * padded));
  float* const scores = scores_.data();
  int64_t b = 0;
  for (; b + kBlocks <= n_blocks; b += kBlocks) {
    scores_of<kQueries, kBlocks>(tile, &blocks[b], head_dim_, scale_, scores + b * kBlockTokens, padded);
  }
  for (; b < n_blocks; ++b) {
    scores_of<kQueries, 1>(tile, &blocks[b], head_dim_, scale_, scores + b * kBlockTokens, padded);
  }
  float factors[kQueries];
  for (int i = 0; i < kQueries; ++i) factors[i] = softmax(scores + i * padded, tile[i].length, padded);
  int64_t d = 0;
  for (; d + kVectors * kLanes <= head_dim_; d += kVectors * kLanes) {
    weighted_sums<kQueries, kVectors>(tile, scores, padded, factors, blocks.data(), length, head_dim_, d);
  }
  for (; d < head_dim_; d += kLanes) {
    weighted_sums<kQueries, 1>(tile, scores, padded, factors, blocks.data(), length, head_dim_, d);
  }
}

void PagedAttention::run() {
  size_t i = 0;
  for (; i + kTileQueries <= queries.size(); i += kTileQueries) run_tile<kTileQueries>(&queries[i]);
  for (; i < queries.size(); ++i) run_tile<1>(&queries[i]);
}

}  // namespace srlm
