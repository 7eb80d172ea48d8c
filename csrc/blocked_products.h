// The products of head_products.h by oneDNN's block kernels for AVX-512, on factors packed block by block in cache.
#pragma once

#include <ATen/core/Tensor.h>

namespace srlm::blocked {

// Whether this library and this machine have the kernels for factors of this dtype.
bool available(at::ScalarType dtype);

void multiply_transposed(const at::Tensor& x, const at::Tensor& w, at::Tensor& out);
void multiply(const at::Tensor& u, const at::Tensor& w, const at::Tensor& scale, at::Tensor& out);
void transposed_product(const at::Tensor& u, const at::Tensor& x, at::Tensor& out, bool add);

}  // namespace srlm::blocked
