// The matrix products of a linear layer, on the CPU. Formulas: kernels/linear.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace srlm {

// x weight^T for x [T, in], weight [out, in] of one floating dtype, rows dense; [T, out].
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight);

// (d_x, d_weight) from grad [T, out]; what is not needed is empty.
std::tuple<at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                                   bool need_dx, bool need_dw);

}  // namespace srlm
