#include "swiglu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "vec.h"

namespace srlm {
namespace {

constexpr int64_t kElementsPerTask = 16384;

int64_t rows_per_task(int64_t cols) { return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(cols, 1)); }

}  // namespace

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  const int64_t rows = gate.size(0), cols = gate.size(1), gate_stride = gate.stride(0), up_stride = up.stride(0);
  at::Tensor out = at::empty(gate.sizes(), gate.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gate.scalar_type(), "swiglu", [&] {
    const scalar_t *g_data = gate.const_data_ptr<scalar_t>(), *u_data = up.const_data_ptr<scalar_t>();
    scalar_t* y_data = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, rows_per_task(cols), [&](int64_t begin, int64_t end) {
      const Vec<scalar_t> one(1);
      for (int64_t row = begin; row < end; ++row) {
        for_each_vector<scalar_t>(cols, [&](int64_t i, int64_t n) {
          const auto g = load(g_data + row * gate_stride + i, n), u = load(u_data + row * up_stride + i, n);
          store<scalar_t>(y_data + row * cols + i, g / (one + exp<scalar_t>(g.neg())) * u, n);
        });
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up) {
  const int64_t rows = gate.size(0), cols = gate.size(1), gate_stride = gate.stride(0), up_stride = up.stride(0);
  at::Tensor d_gate = at::empty_like(grad), d_up = at::empty_like(grad);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gate.scalar_type(), "swiglu_backward", [&] {
    const scalar_t *dy_data = grad.const_data_ptr<scalar_t>(), *g_data = gate.const_data_ptr<scalar_t>(),
                   *u_data = up.const_data_ptr<scalar_t>();
    scalar_t *dg_data = d_gate.mutable_data_ptr<scalar_t>(), *du_data = d_up.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, rows_per_task(cols), [&](int64_t begin, int64_t end) {
      const Vec<scalar_t> one(1);
      for (int64_t row = begin; row < end; ++row) {
        for_each_vector<scalar_t>(cols, [&](int64_t i, int64_t n) {
          const auto dy = load(dy_data + row * cols + i, n);
          const auto g = load(g_data + row * gate_stride + i, n), u = load(u_data + row * up_stride + i, n);
          const auto s = one / (one + exp<scalar_t>(g.neg()));
          store<scalar_t>(dg_data + row * cols + i, dy * u * s * (one + g * (one - s)), n);
          store<scalar_t>(du_data + row * cols + i, dy * g * s, n);
        });
      }
    });
  });
  return {d_gate, d_up};
}

}  // namespace srlm

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("swiglu", &srlm::swiglu);
  m.impl("swiglu_backward", &srlm::swiglu_backward);
}
