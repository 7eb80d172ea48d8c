#include "rms_norm.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "vec.h"

namespace srlm {
namespace {

constexpr int64_t kElementsPerTask = 16384, kMostBlocks = 64;

int64_t rows_per_task(int64_t cols) { return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(cols, 1)); }

at::Tensor empty_rstd(const at::Tensor& x) {
  return at::empty({x.size(0)}, x.options().dtype(at::toOpMathType(x.scalar_type())));
}

// y = rounded(x rstd) weight for one row; returns rstd = 1 / sqrt(mean_square + eps).
template <typename T>
Wide<T> normalise(const T* x, const T* weight, T* y, int64_t cols, Wide<T> mean_square, Wide<T> eps) {
  const Wide<T> rstd = 1 / std::sqrt(mean_square + eps);
  const Vec<T> scale(rstd);
  for_each_vector<T>(cols, [&](int64_t i, int64_t n) {
    store<T>(y + i, rounded<T>(load(x + i, n) * scale) * load(weight + i, n), n);
  });
  return rstd;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t rows = x.size(0), cols = x.size(1), x_stride = x.stride(0);
  at::Tensor y = at::empty(x.sizes(), x.options()), rstd = empty_rstd(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rms_norm", [&] {
    const scalar_t *x_data = x.const_data_ptr<scalar_t>(), *w_data = weight.const_data_ptr<scalar_t>();
    scalar_t* y_data = y.mutable_data_ptr<scalar_t>();
    auto* rstd_data = rstd.mutable_data_ptr<Wide<scalar_t>>();
    at::parallel_for(0, rows, rows_per_task(cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const scalar_t* const x_row = x_data + row * x_stride;
        const auto squares = sum<scalar_t>(cols, [&](int64_t i, int64_t n) {
          const auto v = load(x_row + i, n);
          return v * v;
        });
        rstd_data[row] = normalise<scalar_t>(x_row, w_data, y_data + row * cols, cols, squares / cols, eps);
      }
    });
  });
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& delta,
                                                            const at::Tensor& weight, double eps) {
  const int64_t rows = x.size(0), cols = x.size(1), x_stride = x.stride(0), delta_stride = delta.stride(0);
  at::Tensor total = at::empty(x.sizes(), x.options()), y = at::empty_like(total), rstd = empty_rstd(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "add_rms_norm", [&] {
    const scalar_t *x_data = x.const_data_ptr<scalar_t>(), *delta_data = delta.const_data_ptr<scalar_t>(),
                   *w_data = weight.const_data_ptr<scalar_t>();
    scalar_t *total_data = total.mutable_data_ptr<scalar_t>(), *y_data = y.mutable_data_ptr<scalar_t>();
    auto* rstd_data = rstd.mutable_data_ptr<Wide<scalar_t>>();
    at::parallel_for(0, rows, rows_per_task(cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        scalar_t* const total_row = total_data + row * cols;
        const auto squares = sum<scalar_t>(cols, [&](int64_t i, int64_t n) {
          const auto v = rounded<scalar_t>(load(x_data + row * x_stride + i, n) +
                                           load(delta_data + row * delta_stride + i, n));
          store<scalar_t>(total_row + i, v, n);
          return v * v;
        });
        rstd_data[row] = normalise<scalar_t>(total_row, w_data, y_data + row * cols, cols, squares / cols, eps);
      }
    });
  });
  return {total, y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight, const at::Tensor& rstd,
                                                     const std::optional<at::Tensor>& grad_sum) {
  const int64_t rows = x.size(0), cols = x.size(1), x_stride = x.stride(0);
  // Blocks follow from the shape alone, so the order in which d_weight is summed does too.
  const int64_t rows_per_block = std::max(rows_per_task(cols), (rows + kMostBlocks - 1) / kMostBlocks);
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  at::Tensor dx = at::empty_like(grad), d_weight = at::empty_like(weight);
  at::Tensor partial = at::empty({blocks, cols}, rstd.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rms_norm_backward", [&] {
    using wide_t = Wide<scalar_t>;
    const scalar_t *dy_data = grad.const_data_ptr<scalar_t>(), *x_data = x.const_data_ptr<scalar_t>(),
                   *w_data = weight.const_data_ptr<scalar_t>(),
                   *ds_data = grad_sum ? grad_sum->const_data_ptr<scalar_t>() : nullptr;
    const wide_t* rstd_data = rstd.const_data_ptr<wide_t>();
    scalar_t *dx_data = dx.mutable_data_ptr<scalar_t>(), *dw_data = d_weight.mutable_data_ptr<scalar_t>();
    wide_t* partial_data = partial.mutable_data_ptr<wide_t>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        wide_t* const dw = partial_data + block * cols;
        std::fill_n(dw, cols, wide_t(0));
        for (int64_t row = block * rows_per_block; row < std::min(rows, (block + 1) * rows_per_block); ++row) {
          const scalar_t *dy_row = dy_data + row * cols, *x_row = x_data + row * x_stride;
          const wide_t dot = sum<scalar_t>(cols, [&](int64_t i, int64_t n) {
            return load(dy_row + i, n) * load(w_data + i, n) * load(x_row + i, n);
          });
          const Vec<scalar_t> scale(rstd_data[row]), along(dot * rstd_data[row] / cols);
          for_each_vector<scalar_t>(cols, [&](int64_t i, int64_t n) {
            const auto dy = load(dy_row + i, n), normed = load(x_row + i, n) * scale;
            auto d = (dy * load(w_data + i, n) - normed * along) * scale;
            if (ds_data) d += load(ds_data + row * cols + i, n);
            store<scalar_t>(dx_data + row * cols + i, d, n);
            store<wide_t>(dw + i, load(dw + i, n) + dy * normed, n);
          });
        }
      }
    });
    for_each_vector<scalar_t>(cols, [&](int64_t i, int64_t n) {
      Vec<scalar_t> dw(0);
      for (int64_t block = 0; block < blocks; ++block) dw += load(partial_data + block * cols + i, n);
      store<scalar_t>(dw_data + i, dw, n);
    });
  });
  return {dx, d_weight};
}

}  // namespace srlm

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("rms_norm", &srlm::rms_norm);
  m.impl("add_rms_norm", &srlm::add_rms_norm);
  m.impl("rms_norm_backward", &srlm::rms_norm_backward);
}
