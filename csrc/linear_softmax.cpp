#include "linear_softmax.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <algorithm>

#include "blocked_products.h"
#include "head_products.h"
#include "softmax_rows.h"
#include "tiled_softmax.h"

namespace srlm {
namespace {

constexpr int64_t kAlignment = 64;  // columns; rows of logits and of U lie a multiple of this apart
constexpr int64_t kMostRows = 512;  // of logits at a time: with more the products are no faster

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

at::TensorOptions wide(const at::Tensor& x) { return x.options().dtype(at::toOpMathType(x.scalar_type())); }

at::Tensor padded_rows(int64_t rows, int64_t cols, const at::TensorOptions& options) {
  return at::empty({rows, round_up(cols, kAlignment)}, options).narrow(1, 0, cols);
}

// Whether kernels/linear_softmax.py's formula is -log p and there are kernels that need no logits in memory.
bool without_logits(const at::Tensor& x, const Softmax& softmax) {
  return !softmax.softcap && !softmax.label_smoothing && !softmax.z_loss && blocked::available(x.scalar_type());
}

at::Tensor rows_of(const at::Tensor& x, int64_t start, int64_t size) {
  return x.defined() ? x.narrow(0, start, size) : x;
}

// body(start, size) for chunks of at most chunk_rows rows: as few as possible, of about one size.
template <typename Body>
void for_each_chunk(int64_t rows, int64_t chunk_rows, const Body& body) {
  const int64_t most = std::clamp<int64_t>(chunk_rows, 1, kMostRows);
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  const int64_t size = std::min(most, round_up((rows + chunks - 1) / chunks, 16));
  for (int64_t start = 0; start < rows; start += size) body(start, std::min(size, rows - start));
}

// Memory for the logits of a chunk, and for its U in the same place: a row of U begins where its logits begin.
class Chunk {
 public:
  Chunk(const at::Tensor& x, const at::Tensor& weight, int64_t chunk_rows)
      : cols_(weight.size(0)), dtype_(weight.scalar_type()) {
    const int64_t rows = std::min({x.size(0), chunk_rows, kMostRows});
    memory_ = at::empty({rows, round_up(cols_, kAlignment)}, wide(x));
  }

  at::Tensor logits(int64_t rows) const { return memory_.narrow(0, 0, rows).narrow(1, 0, cols_); }
  at::Tensor unit(int64_t rows) const { return memory_.view(dtype_).narrow(0, 0, rows).narrow(1, 0, cols_); }

 private:
  int64_t cols_;
  at::ScalarType dtype_;
  at::Tensor memory_;
};

// body(start, size, U) for every chunk of rows; `rows` says what else is wanted, for all rows, and the coefficients.
template <typename Body>
void for_each_unit(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, const Softmax& softmax,
                   const SoftmaxRows& rows, int64_t chunk_rows, const Body& body) {
  const Chunk chunk(x, weight, chunk_rows);
  for_each_chunk(x.size(0), chunk_rows, [&](int64_t start, int64_t size) {
    at::Tensor logits = chunk.logits(size);
    const at::Tensor unit = chunk.unit(size);
    multiply_transposed(x.narrow(0, start, size), weight, logits);
    softmax_rows(logits, target.narrow(0, start, size), softmax,
                 {unit, rows_of(rows.loss, start, size), rows_of(rows.lse, start, size),
                  rows_of(rows.entropy, start, size), rows_of(rows.coefficient, start, size),
                  rows_of(rows.grad_entropy, start, size)});
    body(start, size, unit);
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_softmax(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, double temperature, double softcap,
    double label_smoothing, double z_loss, bool entropy, bool keep, int64_t chunk_rows) {
  const int64_t n_rows = x.size(0), cols = weight.size(0);
  const at::Tensor targets = target.contiguous();
  const Softmax softmax{temperature, softcap, label_smoothing, z_loss};
  at::Tensor loss = at::empty({n_rows}, wide(x));
  at::Tensor entropies = at::empty({entropy ? n_rows : 0}, wide(x));
  at::Tensor unit = keep ? padded_rows(n_rows, cols, weight.options()) : at::empty({0, cols}, weight.options());
  if (!keep && without_logits(x, softmax)) {
    at::Tensor lse = at::empty({n_rows}, x.options().dtype(at::kDouble));
    tiled::losses(x, weight, targets, temperature, loss, lse, entropy ? entropies : at::Tensor());
    return {loss, lse, entropies, unit};
  }
  at::Tensor lse = at::empty({n_rows}, wide(x));
  const bool in_place = keep && unit.scalar_type() == loss.scalar_type();
  const Chunk chunk(x, weight, in_place ? 0 : chunk_rows);
  for_each_chunk(n_rows, in_place ? kMostRows : chunk_rows, [&](int64_t start, int64_t size) {
    at::Tensor logits = in_place ? unit.narrow(0, start, size) : chunk.logits(size);
    SoftmaxRows rows{.loss = loss.narrow(0, start, size), .lse = lse.narrow(0, start, size)};
    if (keep) rows.unit = unit.narrow(0, start, size);
    if (entropy) rows.entropy = entropies.narrow(0, start, size);
    multiply_transposed(x.narrow(0, start, size), weight, logits);
    softmax_rows(logits, targets.narrow(0, start, size), softmax, rows);
  });
  return {loss, lse.to(at::kDouble), entropies, unit};
}

std::tuple<at::Tensor, at::Tensor> linear_softmax_backward(
    const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_entropy, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& target, const at::Tensor& lse, const at::Tensor& loss,
    const at::Tensor& unit, const std::optional<at::Tensor>& main_grad, double temperature, double softcap,
    double label_smoothing, double z_loss, bool need_dx, bool need_dw, int64_t chunk_rows) {
  const Softmax softmax{temperature, softcap, label_smoothing, z_loss};
  const at::Tensor targets = target.contiguous(), coefficient = grad_loss.contiguous();
  at::Tensor dx = at::empty({need_dx ? x.size(0) : 0, x.size(1)}, x.options());
  const at::Tensor none = at::empty({0, x.size(1)}, weight.options());
  if (unit.size(0) == 0 && !grad_entropy && without_logits(x, softmax)) {
    const at::Tensor dw = need_dw && !main_grad ? at::empty(weight.sizes(), weight.options()) : none;
    tiled::gradients(x, weight, targets, temperature, loss, lse, coefficient, chunk_rows * weight.size(0),
                     need_dx ? dx : at::Tensor(), !need_dw ? at::Tensor() : main_grad ? *main_grad : dw,
                     main_grad.has_value());
    return {dx, dw};
  }
  at::Tensor dw = !need_dw ? none : main_grad ? *main_grad : at::empty(weight.sizes(), wide(x));
  const auto add_to_dw = [&](int64_t start, const at::Tensor& u, const at::Tensor& rows) {
    if (need_dw) (start > 0 || main_grad ? add_transposed_product : transposed_product)(u, rows, dw);
  };
  if (need_dw && !main_grad && x.size(0) == 0) dw.zero_();
  if (unit.size(0) > 0 && !grad_entropy) {
    if (need_dx) multiply(unit, weight, grad_loss, dx);
    add_to_dw(0, unit, at::mul(x, grad_loss.unsqueeze(1)).to(x.scalar_type()));
  } else {
    const SoftmaxRows rows{.coefficient = coefficient,
                           .grad_entropy = grad_entropy ? grad_entropy->contiguous() : at::Tensor()};
    for_each_unit(x, weight, targets, softmax, rows, chunk_rows,
                  [&](int64_t start, int64_t size, const at::Tensor& chunk_unit) {
                    at::Tensor dx_rows = need_dx ? dx.narrow(0, start, size) : at::Tensor();
                    if (need_dx) multiply(chunk_unit, weight, {}, dx_rows);
                    add_to_dw(start, chunk_unit, x.narrow(0, start, size));
                  });
  }
  return {dx, main_grad ? none : dw.to(weight.scalar_type())};
}

bool linear_softmax_is_tiled(at::ScalarType dtype) { return blocked::available(dtype); }

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_softmax_gradients(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, const at::Tensor& coefficient,
    double temperature, double softcap, double label_smoothing, double z_loss, bool need_dx, bool need_dw,
    int64_t chunk_rows) {
  at::Tensor loss = at::empty({x.size(0)}, wide(x));
  at::Tensor dx = at::empty({need_dx ? x.size(0) : 0, x.size(1)}, x.options());
  at::Tensor dw = at::empty({need_dw ? weight.size(0) : 0, x.size(1)}, wide(x));
  if (x.size(0) == 0) dw.zero_();
  const SoftmaxRows rows{.loss = loss, .coefficient = coefficient.contiguous()};
  for_each_unit(x, weight, target.contiguous(), {temperature, softcap, label_smoothing, z_loss}, rows, chunk_rows,
                [&](int64_t start, int64_t size, const at::Tensor& unit) {
                  at::Tensor dx_rows = need_dx ? dx.narrow(0, start, size) : at::Tensor();
                  if (need_dx) multiply(unit, weight, {}, dx_rows);
                  const auto into_dw = start > 0 ? add_transposed_product : transposed_product;
                  if (need_dw) into_dw(unit, x.narrow(0, start, size), dw);
                });
  return {loss, dx, dw};
}

}  // namespace srlm

TORCH_LIBRARY_FRAGMENT(srlm, m) {
  m.def("linear_softmax_is_tiled(ScalarType dtype) -> bool", &srlm::linear_softmax_is_tiled);
}

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("linear_softmax", &srlm::linear_softmax);
  m.impl("linear_softmax_backward", &srlm::linear_softmax_backward);
  m.impl("linear_softmax_gradients", &srlm::linear_softmax_gradients);
}
