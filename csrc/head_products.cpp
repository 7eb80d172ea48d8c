#include "head_products.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "blocked_products.h"

namespace srlm {
namespace {

// Without blocked products the factors are widened, this many rows or columns of the vocabulary at a time.
constexpr int64_t kWidenedVocabulary = 4096;

// body(start, size) for slices of the vocabulary; one slice if nothing has to be widened.
template <typename Body>
void for_each_slice(int64_t vocabulary, bool widen, const Body& body) {
  const int64_t step = widen ? kWidenedVocabulary : std::max<int64_t>(vocabulary, 1);
  for (int64_t start = 0; start < vocabulary; start += step) body(start, std::min(step, vocabulary - start));
}

}  // namespace

void multiply_transposed(const at::Tensor& x, const at::Tensor& w, at::Tensor& out) {
  if (blocked::available(x.scalar_type())) return blocked::multiply_transposed(x, w, out);
  const at::ScalarType wide = out.scalar_type();
  const at::Tensor wide_x = x.to(wide);
  for_each_slice(w.size(0), w.scalar_type() != wide, [&](int64_t start, int64_t size) {
    at::Tensor part = out.narrow(1, start, size);
    at::mm_out(part, wide_x, w.narrow(0, start, size).to(wide).t());
  });
}

void multiply(const at::Tensor& u, const at::Tensor& w, const at::Tensor& scale, at::Tensor& out) {
  if (blocked::available(u.scalar_type())) return blocked::multiply(u, w, scale, out);
  const at::ScalarType wide = at::toOpMathType(u.scalar_type());
  at::Tensor sums = u.scalar_type() == wide ? out.zero_() : at::zeros(out.sizes(), out.options().dtype(wide));
  for_each_slice(w.size(0), w.scalar_type() != wide, [&](int64_t start, int64_t size) {
    at::addmm_out(sums, sums, u.narrow(1, start, size).to(wide), w.narrow(0, start, size).to(wide));
  });
  if (scale.defined()) sums.mul_(scale.unsqueeze(1));
  if (!out.is_same(sums)) out.copy_(sums);
}

void add_transposed_product(const at::Tensor& u, const at::Tensor& x, at::Tensor& out) {
  if (blocked::available(u.scalar_type())) return blocked::add_transposed_product(u, x, out);
  const at::ScalarType wide = out.scalar_type();
  const at::Tensor wide_x = x.to(wide);
  for_each_slice(u.size(1), u.scalar_type() != wide, [&](int64_t start, int64_t size) {
    at::Tensor part = out.narrow(0, start, size);
    at::addmm_out(part, part, u.narrow(1, start, size).to(wide).t(), wide_x);
  });
}

}  // namespace srlm
