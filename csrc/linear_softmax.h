// The output head's operators: losses of softmax(x weight^T) and their gradients, on the CPU. Formulas and schedules:
// kernels/linear_softmax.py. Logits exist for one chunk of rows at a time. All repeat bitwise, whatever the number of
// threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace srlm {

// x [N, D] and weight [V, D] of one floating dtype, contiguous; target int64 [N]. (loss, lse, entropy, U): loss and
// entropy in fp32, or fp64 for fp64, lse in fp64, U in weight's dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_softmax(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, double temperature, double softcap,
    double label_smoothing, double z_loss, bool entropy, bool keep, int64_t chunk_rows);

// (dX in x's dtype, dW in weight's), each without rows where it is not needed; dW is added to main_grad instead, [V, D]
// contiguous in fp32 (fp64), where that is given. lse (fp64) and loss are those of linear_softmax.
std::tuple<at::Tensor, at::Tensor> linear_softmax_backward(
    const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_entropy, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& target, const at::Tensor& lse, const at::Tensor& loss,
    const at::Tensor& unit, const std::optional<at::Tensor>& main_grad, double temperature, double softcap,
    double label_smoothing, double z_loss, bool need_dx, bool need_dw, int64_t chunk_rows);

// Whether, on this machine, a backward for x of this dtype makes the logits again tile by tile in the cache.
bool linear_softmax_is_tiled(at::ScalarType dtype);

// (loss, dX, dW) for a coefficient [N] of the losses that is known beforehand.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_softmax_gradients(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, const at::Tensor& coefficient,
    double temperature, double softcap, double label_smoothing, double z_loss, bool need_dx, bool need_dw,
    int64_t chunk_rows);

}  // namespace srlm
