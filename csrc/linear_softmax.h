// The output head's operators: losses of softmax(x weight^T) and their gradients, on the CPU. Formulas and schedules:
// kernels/linear_softmax.py. Logits exist for one chunk of rows at a time. All repeat bitwise, whatever the number of
// threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace srlm {

// x [N, D] and weight [V, D] of one floating dtype, contiguous; target int64 [N]. (loss, lse, entropy, U), the first
// three in fp32, or fp64 for fp64, the last in weight's dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_softmax(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, double temperature, double softcap,
    double label_smoothing, double z_loss, bool entropy, bool keep, int64_t chunk_rows);

// dX; adds the weight's gradient into dw, [V, D] contiguous in fp32 (fp64), unless that has no rows.
at::Tensor linear_softmax_backward(const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_entropy,
                                   const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
                                   const at::Tensor& lse, const at::Tensor& entropy, const at::Tensor& unit,
                                   at::Tensor& dw, double temperature, double softcap, double label_smoothing,
                                   double z_loss, bool need_dx, int64_t chunk_rows);

// (loss, dX, dW) for a coefficient [N] of the losses that is known beforehand.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_softmax_gradients(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, const at::Tensor& coefficient,
    double temperature, double softcap, double label_smoothing, double z_loss, bool need_dx, bool need_dw,
    int64_t chunk_rows);

}  // namespace srlm
