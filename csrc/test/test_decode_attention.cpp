// decode_attention against the definition in double precision, for ragged lengths, strides and extreme scores.
#include "decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

// The largest error of any output, with scores multiplied by `spread`.
double worst_error(std::mt19937_64& random, int64_t n_queries, int64_t length, int64_t head_dim, int64_t gap, float spread) {
  std::normal_distribution<float> normal;
  const int64_t stride = head_dim + gap;
  std::vector<float> q(n_queries * head_dim), k(length * stride, NAN), v(length * stride, NAN);
  std::vector<float> scores(length), out(n_queries * head_dim);
  for (auto& x : q) x = normal(random) * spread;
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t d = 0; d < head_dim; ++d) k[t * stride + d] = normal(random), v[t * stride + d] = normal(random);
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  srlm::decode_attention(q.data(), k.data(), v.data(), n_queries, length, head_dim, stride, scale, scores.data(), out.data());

  double worst = 0;
  for (int64_t i = 0; i < n_queries; ++i) {
    std::vector<double> p(length, 0), expected(head_dim, 0);
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t d = 0; d < head_dim; ++d) p[t] += double(q[i * head_dim + d]) * k[t * stride + d] * scale;
    }
    const double highest = *std::max_element(p.begin(), p.end());
    double total = 0;
    for (auto& x : p) total += x = std::exp(x - highest);
    for (int64_t d = 0; d < head_dim; ++d) {
      for (int64_t t = 0; t < length; ++t) expected[d] += p[t] / total * v[t * stride + d];
      const double error = std::abs(expected[d] - out[i * head_dim + d]);
      worst = error <= worst ? worst : error;  // a NaN becomes the worst
    }
  }
  return worst;
}

}  // namespace

int main() {
  std::mt19937_64 random(2401);
  int failures = 0;
  for (int64_t length : {1, 2, 3, 4, 5, 31, 64, 257, 1000}) {
    for (int64_t head_dim : {16, 32, 48, 128}) {
      for (int64_t n_queries : {1, 3}) {
        // A spread of 30 makes scores of a few hundred, whose fp32 rounding alone moves a probability by 1e-4.
        for (auto [spread, tolerance] : {std::pair{0.0f, 1e-6}, {1.0f, 3e-6}, {30.0f, 1e-3}}) {
          const double error = worst_error(random, n_queries, length, head_dim, length % 2 * 16, spread);
          if (!(error <= tolerance)) {
            std::fprintf(stderr, "FAILED: length %ld, head_dim %ld, %ld queries, spread %g: error %g\n", long(length),
                         long(head_dim), long(n_queries), spread, error);
            ++failures;
          }
        }
      }
    }
  }
  if (failures == 0) std::puts("decode_attention: all cases agree with double precision");
  return failures != 0;
}
