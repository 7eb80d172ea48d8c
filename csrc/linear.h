// The matrix products of a linear layer, on the CPU. Formulas: kernels/linear.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace srlm {

// x weight^T for x [T, in], weight [out, in] of one floating dtype, rows dense; [T, out]. `main_grad` is for autograd.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& main_grad);

// (d_x, d_weight) from grad [T, out]; what is not needed is empty. d_weight goes to `main_grad` instead, added, where
// that is given.
std::tuple<at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                                   const std::optional<at::Tensor>& main_grad, bool need_dx,
                                                   bool need_dw);

}  // namespace srlm
