#include "rotary.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "vec.h"

namespace srlm {
namespace {

constexpr int64_t kElementsPerTask = 16384;

// One row of heads; `to` may be `from`. `sign` is -1 for the inverse rotation.
template <typename T>
void rotate_heads(const T* from, T* to, int64_t size, const Wide<T>* cos, const Wide<T>* sin, int64_t half,
                  const Vec<T>& sign) {
  for (int64_t head = 0; head < size; head += 2 * half) {
    for_each_vector<T>(half, [&](int64_t i, int64_t n) {
      const auto c = load(cos + i, n), s = load(sin + i, n) * sign;
      const auto first = load(from + head + i, n), second = load(from + head + half + i, n);
      store<T>(to + head + i, first * c - second * s, n);
      store<T>(to + head + half + i, second * c + first * s, n);
    });
  }
}

void rotate(const at::Tensor& q, const at::Tensor& k, const at::Tensor& q_out, const at::Tensor& k_out,
            const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  const int64_t rows = q.size(0), q_size = q.size(1), k_size = k.size(1), half = cos.size(1);
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(q_size + k_size, 1));
  const at::Tensor wide_cos = cos.to(at::toOpMathType(q.scalar_type())), wide_sin = sin.to(wide_cos.scalar_type());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "rotary", [&] {
    using wide_t = Wide<scalar_t>;
    const wide_t *cos_data = wide_cos.const_data_ptr<wide_t>(), *sin_data = wide_sin.const_data_ptr<wide_t>();
    const scalar_t *q_data = q.const_data_ptr<scalar_t>(), *k_data = k.const_data_ptr<scalar_t>();
    scalar_t *q_to = q_out.mutable_data_ptr<scalar_t>(), *k_to = k_out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, rows_per_task, [&](int64_t begin, int64_t end) {
      const Vec<scalar_t> sign(inverse ? -1 : 1);
      for (int64_t row = begin; row < end; ++row) {
        const wide_t *c = cos_data + row * half, *s = sin_data + row * half;
        rotate_heads(q_data + row * q.stride(0), q_to + row * q_out.stride(0), q_size, c, s, half, sign);
        rotate_heads(k_data + row * k.stride(0), k_to + row * k_out.stride(0), k_size, c, s, half, sign);
      }
    });
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                                          const at::Tensor& sin, bool inverse) {
  at::Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  rotate(q, k, q_out, k_out, cos, sin, inverse);
  return {q_out, k_out};
}

void rotary_(at::Tensor q, at::Tensor k, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  rotate(q, k, q, k, cos, sin, inverse);
}

}  // namespace srlm

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("rotary", &srlm::rotary);
  m.impl("rotary_", &srlm::rotary_);
}
