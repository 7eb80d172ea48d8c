// Sums of token log-probabilities and the pairwise preference losses of them, on the CPU.
// Formulas: kernels/preference.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace srlm {

// logps [N] float or double, lengths int64 [S] of sum N, reference [S] in the dtype of logps; all contiguous.
// Returns values [S / 2], sums [S] and the values' derivatives by the sums [S].
std::tuple<at::Tensor, at::Tensor, at::Tensor> preference_loss(const at::Tensor& logps, const at::Tensor& lengths,
                                                               const std::optional<at::Tensor>& reference,
                                                               std::string_view kind, double beta,
                                                               double label_smoothing, double margin,
                                                               bool length_normalised);

// d_logps [n_tokens]: grad_values[i / 2] coefficients[i] + grad_sums[i] for every token of response i.
at::Tensor preference_loss_backward(const at::Tensor& grad_values, const at::Tensor& grad_sums,
                                    const at::Tensor& coefficients, const at::Tensor& lengths, int64_t n_tokens);

}  // namespace srlm
