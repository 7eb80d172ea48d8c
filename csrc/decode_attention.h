// Attention of one new token over the cached keys and values of one key head, for decoding on the CPU.
#pragma once

#include <cstdint>

namespace srlm {

constexpr int64_t kHeadDimMultiple = 16;

// softmax(scale * q K^T) V for the `n_queries` queries that share a key head. A sum's order depends on `length` and
// `head_dim` alone.
//   q, out   [n_queries, head_dim], dense
//   k, v     [length, head_dim], rows `stride` apart; length >= 1, head_dim a multiple of kHeadDimMultiple
//   scores   scratch for `length` floats
void decode_attention(const float* q, const float* k, const float* v, int64_t n_queries, int64_t length,
                      int64_t head_dim, int64_t stride, float scale, float* scores, float* out);

}  // namespace srlm
