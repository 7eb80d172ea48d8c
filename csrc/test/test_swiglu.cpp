// swiglu and its gradient against the definition in double precision: ragged widths, strided rows, extreme gates.
#include "swiglu.h"

#include <ATen/ATen.h>

#include <cstdio>

namespace {

bool close(const at::Tensor& ours, const at::Tensor& exact, double tolerance, const char* what) {
  const double error = (ours.to(at::kDouble) - exact).abs().div(exact.abs() + 1).max().item<double>();
  if (error <= tolerance) return true;
  std::printf("%s: error %g, allowed %g\n", what, error, tolerance);
  return false;
}

}  // namespace

int main() {
  bool good = true;
  for (const auto& [dtype, tolerance] : {std::pair{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 8e-3}}) {
    for (const int64_t cols : {1, 7, 16, 33, 344}) {
      const at::Tensor both = (at::randn({5, 2 * cols}) * 30).to(dtype), grad = at::randn({5, cols}).to(dtype);
      const at::Tensor gate = both.narrow(1, 0, cols), up = both.narrow(1, cols, cols);
      const at::Tensor g = gate.to(at::kDouble), u = up.to(at::kDouble), dy = grad.to(at::kDouble), s = at::sigmoid(g);
      const auto [d_gate, d_up] = srlm::swiglu_backward(grad, gate, up);
      good &= close(srlm::swiglu(gate, up), g * s * u, tolerance, "swiglu");
      good &= close(d_gate, dy * u * s * (1 + g * (1 - s)), tolerance, "d_gate");
      good &= close(d_up, dy * g * s, tolerance, "d_up");
    }
  }
  return good ? 0 : 1;
}
