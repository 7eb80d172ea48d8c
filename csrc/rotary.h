// Rotate-half rotary embedding of queries and keys, on the CPU. Formulas: kernels/rotary.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace srlm {

// q [T, H hd], k [T, H_kv hd] of one floating dtype, rows dense; cos, sin [T, hd / 2] fp32, contiguous. Rotated by the
// angles, or back when `inverse`; the results are contiguous.
std::tuple<at::Tensor, at::Tensor> rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                                          const at::Tensor& sin, bool inverse);

// The same in place.
void rotary_(at::Tensor q, at::Tensor k, const at::Tensor& cos, const at::Tensor& sin, bool inverse);

}  // namespace srlm
