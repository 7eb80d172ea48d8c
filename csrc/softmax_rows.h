// Rows of logits to losses, and to the gradients of these losses, on the CPU. Formulas: kernels/softmax_rows.py.
#pragma once

#include <ATen/core/Tensor.h>

namespace srlm {

struct Softmax {
  double temperature = 1, softcap = 0, label_smoothing = 0, z_loss = 0;
};

// What a call is to compute, and from which coefficients; an undefined tensor is not wanted, or 1 and 0.
struct SoftmaxRows {
  at::Tensor unit = {};                            // takes U [n, V]; may lie in the memory of the logits, row by row
  at::Tensor loss = {}, lse = {}, entropy = {};    // take the rows' values, [n] in the dtype of the logits
  at::Tensor coefficient = {}, grad_entropy = {};  // c and h of U, [n] in the dtype of the logits
};

// logits [n, V] in fp32 or fp64, rows dense, garbage afterwards; target int64 [n]: one outside [0, V) gives NaN.
void softmax_rows(const at::Tensor& logits, const at::Tensor& target, const Softmax& softmax, const SoftmaxRows& rows);

}  // namespace srlm
