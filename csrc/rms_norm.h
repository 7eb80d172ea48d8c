// RMSNorm with Llama's rounding order, alone or behind a residual add, on the CPU. Formulas: kernels/rms_norm.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace srlm {

// x [T, D] and weight [D] of one floating dtype, rows dense; (y [T, D] contiguous, rstd [T] in fp32, or fp64 for fp64).
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// (sum = x + delta, y = the norm of sum, rstd).
std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& delta,
                                                            const at::Tensor& weight, double eps);

// grad and, if given, grad_sum [T, D] contiguous; x is what was normalised. (grad_sum + the gradient of x, d_weight);
// repeats bitwise, whatever the number of threads.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight, const at::Tensor& rstd,
                                                     const std::optional<at::Tensor>& grad_sum);

}  // namespace srlm
