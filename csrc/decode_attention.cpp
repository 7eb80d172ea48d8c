#include "decode_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#define SRLM_INLINE inline __attribute__((always_inline))

namespace srlm {
namespace {

constexpr int64_t kLanes = kHeadDimMultiple;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));  // the compiler splits it where registers are narrower

SRLM_INLINE void load(Vec& to, const float* from) { std::memcpy(&to, from, sizeof(Vec)); }

// The cache is far larger than the processor's, and its own prefetching stops at every page: ask some rows ahead.
constexpr int64_t kRowsAhead = 16;

SRLM_INLINE float dot(const float* a, const float* b, int64_t n, int64_t stride) {
  Vec sum = {}, x, y;
  for (int64_t i = 0; i < n; i += kLanes) {
    load(x, a + i);
    load(y, b + i);
    __builtin_prefetch(b + i + kRowsAhead * stride);
    sum += x * y;
  }
  float lanes[kLanes];
  std::memcpy(lanes, &sum, sizeof(Vec));
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

// e^x for x <= 0 within 2 ulp: 2^n * e^r with |r| <= ln(2) / 2 and the Taylor polynomial of degree 7 for e^r.
SRLM_INLINE float exp_nonpositive(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// out[0..kLanes) = sum of weights[t] * v[t]; four chains of additions, joined in a fixed order.
SRLM_INLINE void weighted_sum(const float* weights, const float* v, int64_t length, int64_t stride, float factor, float* out) {
  Vec sums[4] = {}, x;
  int64_t t = 0;
  for (; t + 4 <= length; t += 4) {
    for (int64_t j = 0; j < 4; ++j) {
      load(x, v + (t + j) * stride);
      __builtin_prefetch(v + (t + j + kRowsAhead) * stride);
      sums[j] += weights[t + j] * x;
    }
  }
  for (; t < length; ++t) {
    load(x, v + t * stride);
    sums[0] += weights[t] * x;
  }
  sums[0] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * factor;
  std::memcpy(out, &sums[0], sizeof(Vec));
}

}  // namespace

void decode_attention(const float* q, const float* k, const float* v, int64_t n_queries, int64_t length,
                                  int64_t head_dim, int64_t stride, float scale, float* scores, float* out) {
  for (int64_t query = 0; query < n_queries; ++query, q += head_dim, out += head_dim) {
    for (int64_t t = 0; t < length; ++t) scores[t] = dot(q, k + t * stride, head_dim, stride) * scale;
    float highest = scores[0];
    for (int64_t t = 1; t < length; ++t) highest = std::max(highest, scores[t]);
    for (int64_t t = 0; t < length; ++t) scores[t] = exp_nonpositive(scores[t] - highest);
    float total = 0;
    for (int64_t t = 0; t < length; ++t) total += scores[t];
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      weighted_sum(scores, v + d, length, stride, 1.0f / total, out + d);
    }
  }
}

}  // namespace srlm
