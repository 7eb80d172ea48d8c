#include "head_products.h"

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "blocked_products.h"

namespace srlm {
namespace {

// 16-bit factors are widened, this many rows or columns of the vocabulary at a time.
constexpr int64_t kWidenedVocabulary = 4096;
constexpr int64_t kVocabTile = 256, kRowTile = 64;

// body(start, size) for slices of the vocabulary; one slice if nothing has to be widened.
template <typename Body>
void for_each_slice(int64_t vocabulary, bool widen, const Body& body) {
  const int64_t step = widen ? kWidenedVocabulary : std::max<int64_t>(vocabulary, 1);
  for (int64_t start = 0; start < vocabulary; start += step) body(start, std::min(step, vocabulary - start));
}

// body(start, size) for tiles of `total`, each on one thread: BLAS on several may split sums by their number. A single
// task would be left to all threads, so there are two wherever possible.
template <typename Body>
void for_each_tile(int64_t total, int64_t most, const Body& body) {
  const int64_t tile = std::clamp<int64_t>((total + 1) / 2, 1, most);
  at::parallel_for(0, (total + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd guard;  // a thread of the pool knows nothing of its caller's
    for (int64_t i = begin; i < end; ++i) body(i * tile, std::min(tile, total - i * tile));
  });
}

}  // namespace

void multiply_transposed(const at::Tensor& x, const at::Tensor& w, at::Tensor& out) {
  if (blocked::available(x.scalar_type())) return blocked::multiply_transposed(x, w, out);
  const at::ScalarType wide = out.scalar_type();
  const at::Tensor wide_x = x.to(wide);
  for_each_slice(w.size(0), w.scalar_type() != wide, [&](int64_t start, int64_t size) {
    const at::Tensor wide_w = w.narrow(0, start, size).to(wide);
    for_each_tile(size, kVocabTile, [&](int64_t v, int64_t cols) {
      at::Tensor part = out.narrow(1, start + v, cols);
      at::mm_out(part, wide_x, wide_w.narrow(0, v, cols).t());
    });
  });
}

void multiply(const at::Tensor& u, const at::Tensor& w, const at::Tensor& scale, at::Tensor& out) {
  if (blocked::available(u.scalar_type())) return blocked::multiply(u, w, scale, out);
  const at::ScalarType wide = at::toOpMathType(u.scalar_type());
  at::Tensor sums = at::zeros(out.sizes(), out.options().dtype(wide));
  for_each_slice(w.size(0), w.scalar_type() != wide, [&](int64_t start, int64_t size) {
    const at::Tensor wide_u = u.narrow(1, start, size).to(wide), wide_w = w.narrow(0, start, size).to(wide);
    for_each_tile(u.size(0), kRowTile, [&](int64_t r, int64_t rows) {
      at::Tensor part = sums.narrow(0, r, rows);
      at::addmm_out(part, part, wide_u.narrow(0, r, rows), wide_w);
    });
  });
  if (scale.defined()) sums.mul_(scale.unsqueeze(1));
  out.copy_(sums);
}

namespace {

void transposed_product(const at::Tensor& u, const at::Tensor& x, at::Tensor& out, bool add) {
  if (blocked::available(u.scalar_type())) return blocked::transposed_product(u, x, out, add);
  const at::ScalarType wide = out.scalar_type();
  const at::Tensor wide_x = x.to(wide);
  for_each_slice(u.size(1), u.scalar_type() != wide, [&](int64_t start, int64_t size) {
    const at::Tensor wide_u = u.narrow(1, start, size).to(wide);
    for_each_tile(size, kVocabTile, [&](int64_t v, int64_t cols) {
      at::Tensor part = out.narrow(0, start + v, cols);
      at::addmm_out(part, part, wide_u.narrow(1, v, cols).t(), wide_x, /*beta=*/add ? 1 : 0);
    });
  });
}

}  // namespace

void transposed_product(const at::Tensor& u, const at::Tensor& x, at::Tensor& out) {
  transposed_product(u, x, out, false);
}

void add_transposed_product(const at::Tensor& u, const at::Tensor& x, at::Tensor& out) {
  transposed_product(u, x, out, true);
}

}  // namespace srlm
