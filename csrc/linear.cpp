#include "linear.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "head_products.h"

namespace srlm {

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>&) {
  const auto wide = x.options().dtype(at::toOpMathType(x.scalar_type()));
  at::Tensor out = at::empty({x.size(0), weight.size(0)}, wide);
  if (out.numel()) multiply_transposed(x, weight, out);
  return out.to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                                   const std::optional<at::Tensor>& main_grad, bool need_dx,
                                                   bool need_dw) {
  at::Tensor d_x = at::empty({need_dx ? x.size(0) : 0, x.size(1)}, x.options());
  if (need_dx && x.numel()) multiply(grad, weight, at::Tensor(), d_x);
  const auto wide = weight.options().dtype(at::toOpMathType(weight.scalar_type()));
  at::Tensor d_weight = at::empty({need_dw && !main_grad ? weight.size(0) : 0, weight.size(1)}, wide);
  if (need_dw && main_grad && x.numel()) {
    at::Tensor sum = main_grad->to(wide.dtype());
    add_transposed_product(grad, x, sum);
    if (!sum.is_same(*main_grad)) main_grad->copy_(sum);
  } else if (need_dw && !main_grad) {
    x.numel() ? transposed_product(grad, x, d_weight) : void(d_weight.zero_());
  }
  return {d_x, d_weight.to(weight.scalar_type())};
}

}  // namespace srlm

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("linear", &srlm::linear);
  m.impl("linear_backward", &srlm::linear_backward);
}
