// rms_norm, add_rms_norm and their gradient against the definition in double precision: ragged widths, strided rows;
// and the gradients bit for bit on one thread and on three.
#include "rms_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cstdio>

namespace {

constexpr double kEps = 1e-5;

bool close(const at::Tensor& ours, const at::Tensor& exact, double tolerance, const char* what) {
  const double error = ((ours.to(at::kDouble) - exact).norm() / (exact.norm() + 1e-3)).item<double>();
  if (error <= tolerance) return true;
  std::printf("%s: error %g, allowed %g\n", what, error, tolerance);
  return false;
}

bool same(const at::Tensor& a, const at::Tensor& b, const char* what) {
  if (at::equal(a, b)) return true;
  std::printf("%s differ\n", what);
  return false;
}

}  // namespace

int main() {
  bool good = true;
  for (const auto& [dtype, tolerance] : {std::pair{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 5e-3}}) {
    for (const int64_t cols : {2, 7, 16, 33, 288}) {
      const at::Tensor both = (at::randn({200, 2 * cols}) * 3).to(dtype), weight = (at::rand({cols}) + 0.5).to(dtype);
      const at::Tensor x = both.narrow(1, 0, cols), delta = both.narrow(1, cols, cols);
      const at::Tensor grad = at::randn({200, cols}).to(dtype), grad_sum = at::randn({200, cols}).to(dtype);
      const auto [total, y, rstd] = srlm::add_rms_norm(x, delta, weight, kEps);
      good &= same(total, x + delta, "the sum and x + delta");
      good &= same(std::get<0>(srlm::rms_norm(total, weight, kEps)), y, "rms_norm and add_rms_norm");

      const at::Tensor s = total.to(at::kDouble), w = weight.to(at::kDouble), dy = grad.to(at::kDouble);
      const at::Tensor r = (s.square().mean(1, true) + kEps).rsqrt(), n = s * r;
      good &= close(rstd, r.squeeze(1), tolerance, "rstd");
      good &= close(y, n * w, tolerance, "y");
      const at::Tensor ds = (w * dy - n * (w * dy * n).mean(1, true)) * r;
      for (const auto& upstream : {std::optional<at::Tensor>(), std::optional(grad_sum)}) {
        const auto [dx, d_weight] = srlm::rms_norm_backward(grad, total, weight, rstd, upstream);
        good &= close(dx, upstream ? ds + upstream->to(at::kDouble) : ds, tolerance, "dx");
        good &= close(d_weight, (dy * n).sum(0), tolerance, "d_weight");
      }
    }
  }

  const at::Tensor x = at::randn({3000, 33}), weight = at::rand({33}), grad = at::randn({3000, 33});
  const at::Tensor rstd = std::get<1>(srlm::rms_norm(x, weight, kEps));
  at::set_num_threads(1);
  const auto [dx, d_weight] = srlm::rms_norm_backward(grad, x, weight, rstd, {});
  at::set_num_threads(3);
  const auto [dx_of_three, d_weight_of_three] = srlm::rms_norm_backward(grad, x, weight, rstd, {});
  good &= same(dx, dx_of_three, "dx of one and three threads") & same(d_weight, d_weight_of_three, "d_weight likewise");
  return good ? 0 : 1;
}
