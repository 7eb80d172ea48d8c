// rotary and rotary_ against complex multiplication in double precision: odd sizes, strided rows, there and back.
#include "rotary.h"

#include <ATen/ATen.h>

#include <cstdio>

namespace {

at::Tensor exact(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t rows = x.size(0), half = cos.size(1);
  const at::Tensor pairs = x.to(at::kDouble).reshape({rows, -1, 2, half});
  const at::Tensor turned = at::complex(pairs.select(2, 0).contiguous(), pairs.select(2, 1).contiguous()) *
                            at::complex(cos.to(at::kDouble), sin.to(at::kDouble)).unsqueeze(1);
  return at::cat({at::real(turned), at::imag(turned)}, 2).reshape({rows, -1});
}

bool close(const at::Tensor& ours, const at::Tensor& exact, double tolerance, const char* what) {
  const double error = (ours.to(at::kDouble) - exact).abs().div(exact.abs() + 1).max().item<double>();
  if (error <= tolerance) return true;
  std::printf("%s: error %g, allowed %g\n", what, error, tolerance);
  return false;
}

bool same(const at::Tensor& a, const at::Tensor& b, const char* what) {
  if (at::equal(a, b)) return true;
  std::printf("%s\n", what);
  return false;
}

}  // namespace

int main() {
  bool good = true;
  for (const auto& [dtype, tolerance] : {std::pair{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 8e-3}}) {
    for (const int64_t half : {1, 5, 16, 40}) {
      const int64_t q_size = 3 * 2 * half, k_size = 2 * half;
      const at::Tensor product = at::randn({50, q_size + 2 * k_size}).to(dtype), before = product.clone();
      const at::Tensor q = product.narrow(1, 0, q_size), k = product.narrow(1, q_size, k_size);
      const at::Tensor angles = at::randn({50, half}) * 10, cos = angles.cos(), sin = angles.sin();

      const auto [q_new, k_new] = srlm::rotary(q, k, cos, sin, false);
      good &= same(product, before, "rotary changed its arguments");
      good &= close(q_new, exact(q, cos, sin), tolerance, "q") & close(k_new, exact(k, cos, sin), tolerance, "k");
      const auto [q_back, k_back] = srlm::rotary(q, k, cos, sin, true);
      good &= close(q_back, exact(q, cos, -sin), tolerance, "q, inverse");
      good &= close(k_back, exact(k, cos, -sin), tolerance, "k, inverse");

      srlm::rotary_(q, k, cos, sin, false);
      good &= same(q, q_new, "q in place differs") & same(k, k_new, "k in place differs");
      const int64_t beside = q_size + k_size;
      good &= same(product.narrow(1, beside, k_size), before.narrow(1, beside, k_size), "rotary_ wrote beside q and k");
    }
  }
  return good ? 0 : 1;
}
