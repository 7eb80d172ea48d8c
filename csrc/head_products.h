// The three matrix products of an output head, sums in fp32 (fp64 for fp64) whatever the dtype of the factors.
//
// A result does not depend on the number of threads, and each row of `multiply_transposed` and `multiply` only on the
// same row of the first factor.
#pragma once

#include <ATen/core/Tensor.h>

namespace srlm {

// out = x w^T for x [R, D], w [V, D] and out [R, V] in the wide dtype; the rows of all are dense, w is contiguous.
void multiply_transposed(const at::Tensor& x, const at::Tensor& w, at::Tensor& out);

// out = diag(scale) u w for u [R, V], w [V, D] and out [R, D] of one dtype; scale [R] in the wide dtype, or undefined.
void multiply(const at::Tensor& u, const at::Tensor& w, const at::Tensor& scale, at::Tensor& out);

// out = u^T x for u [R, V] and x [R, D] of one dtype and out [V, D] in the wide dtype, contiguous.
void transposed_product(const at::Tensor& u, const at::Tensor& x, at::Tensor& out);

// out += u^T x
void add_transposed_product(const at::Tensor& u, const at::Tensor& x, at::Tensor& out);

}  // namespace srlm
