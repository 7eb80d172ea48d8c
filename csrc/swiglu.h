// silu(gate) * up and its gradient, on the CPU. Formulas: kernels/swiglu.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace srlm {

// gate, up [T, F] of one floating dtype, rows dense; the result is contiguous.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

// grad [T, F] contiguous; (d_gate, d_up), contiguous.
std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up);

}  // namespace srlm
