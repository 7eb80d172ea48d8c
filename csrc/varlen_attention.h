// Causal attention over packed segments and its gradient, on the CPU. Formulas and layout: kernels/attention.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace srlm {

// q [T, H, d]; k, v [T, H_kv, d] of one floating dtype, contiguous. Segment s of S: its queries are tokens cu_q[s] to
// cu_q[s + 1] - 1, its keys tokens key_index[cu_k[s]] to key_index[cu_k[s + 1] - 1], the last of which are the queries.
// No key comes after the segment's last query. cu_q, cu_k int32 [S + 1], key_index int64.
// Returns out [T, H, d] and the log of each softmax's denominator, [H, T] in float or wider.
std::tuple<at::Tensor, at::Tensor> varlen_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& cu_q, const at::Tensor& cu_k,
                                                    const at::Tensor& key_index);

// (d_q, d_k, d_v) from grad [T, H, d], contiguous, and what `varlen_attention` returned.
std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_q, const at::Tensor& cu_k, const at::Tensor& key_index);

}  // namespace srlm
