// The output head's operators against autograd-free formulas in double precision: every option, ragged sizes, chunks,
// rows that are certain or not a number.
#include "linear_softmax.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>
#include <initializer_list>

namespace {

struct Options {
  double temperature, softcap, label_smoothing, z_loss;
};

struct Exact {
  at::Tensor loss, entropy, unit;  // unit = d(c loss + h entropy) / d raw
};

Exact exact(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target, const at::Tensor& c,
            const at::Tensor& h, const Options& o) {
  const at::Tensor raw = at::mm(x, w.t()), t = o.softcap ? at::tanh(raw / o.softcap) : at::zeros_like(raw);
  const at::Tensor z = (o.softcap ? t * o.softcap : raw) / o.temperature;
  const at::Tensor log_p = at::log_softmax(z, 1), p = log_p.exp();
  const at::Tensor lse = at::logsumexp(z, {1}), entropy = -(p * log_p).sum(1), y = target.unsqueeze(1);
  const at::Tensor onehot = at::zeros_like(p).scatter_(1, y, 1.0);
  const at::Tensor loss = -(1 - o.label_smoothing) * log_p.gather(1, y).squeeze(1) - o.label_smoothing * log_p.mean(1) +
                          o.z_loss * lse * lse;
  const at::Tensor d_loss = (1 + 2 * o.z_loss * lse).unsqueeze(1) * p - (1 - o.label_smoothing) * onehot -
                            o.label_smoothing / static_cast<double>(w.size(0));
  const at::Tensor d_z = c.unsqueeze(1) * d_loss - h.unsqueeze(1) * p * (log_p + entropy.unsqueeze(1));
  return {loss, entropy, d_z * (1 - t * t) / o.temperature};
}

bool close(const at::Tensor& ours, const at::Tensor& exact, double tolerance, const char* what) {
  const double error = ((ours.to(at::kDouble) - exact).norm() / (exact.norm() + 1e-3)).item<double>();
  if (error <= tolerance) return true;
  std::printf("%s: error %g, allowed %g\n", what, error, tolerance);
  return false;
}

bool check(at::ScalarType dtype, int64_t n, int64_t v, int64_t d, const Options& o) {
  const bool is_double = dtype == at::kDouble;
  const double sums = is_double ? 1e-13 : 4e-6, tolerance = is_double ? 1e-13 : dtype == at::kFloat ? 4e-6 : 5e-3;
  const at::Tensor x = at::randn({n, d}).to(dtype), w = at::randn({v, d}).to(dtype);
  const at::Tensor target = at::randint(v, {n}, at::kLong);
  const at::TensorOptions wide = at::TensorOptions().dtype(is_double ? at::kDouble : at::kFloat);
  const at::Tensor c = at::randn({n}, wide), h = at::randn({n}, wide), zero = at::zeros({n}, at::kDouble);
  const at::Tensor xd = x.to(at::kDouble), wd = w.to(at::kDouble), cd = c.to(at::kDouble);
  const Exact plain = exact(xd, wd, target, cd, zero, o), both = exact(xd, wd, target, cd, h.to(at::kDouble), o);
  bool good = true;
  for (const int64_t chunk_rows : {int64_t{1000}, int64_t{7}}) {
    for (const bool keep : {false, true}) {
      const auto [loss, lse, entropy, unit] = srlm::linear_softmax(
          x, w, target, o.temperature, o.softcap, o.label_smoothing, o.z_loss, true, keep, chunk_rows);
      good &= close(loss, plain.loss, sums, "loss") && close(entropy, both.entropy, sums, "entropy");
      for (const bool with_entropy : {false, true}) {
        const at::Tensor& u = (with_entropy ? both : plain).unit;
        const at::Tensor main_grad = at::ones({v, d}, wide);
        const auto backward = [&](const std::optional<at::Tensor>& into) {
          return srlm::linear_softmax_backward(c, with_entropy ? std::optional(h) : std::nullopt, x, w, target, lse, loss,
                                               unit, into, o.temperature, o.softcap, o.label_smoothing, o.z_loss, true,
                                               true, chunk_rows);
        };
        const auto [dx, dw] = backward(std::nullopt);
        good &= close(dx, at::mm(u, wd), tolerance, "dx");
        good &= std::get<1>(backward(main_grad)).size(0) == 0;
        good &= close(main_grad, at::mm(u.t(), xd) + 1, tolerance, "main_grad");
        // In bf16 the rows of a small dW may all but cancel, but they are one rounding away from the fp32 sum.
        const bool narrow = dtype == at::kBFloat16;
        const at::Tensor sum = narrow ? main_grad.to(at::kDouble) - 1 : at::mm(u.t(), xd);
        good &= close(dw, sum, narrow ? 3e-3 : tolerance, "dw");
      }
    }
    const auto [loss, dx, dw] = srlm::linear_softmax_gradients(
        x, w, target, c, o.temperature, o.softcap, o.label_smoothing, o.z_loss, true, true, chunk_rows);
    good &= close(loss, plain.loss, sums, "loss of gradients") &&
            close(dx, at::mm(plain.unit, wd), tolerance, "dx of gradients") &&
            close(dw, at::mm(plain.unit.t(), xd), tolerance, "dw of gradients");
  }
  return good;
}

// U of a target that is all but certain, and of one beside logits of 1e4; a row of NaN stays alone.
bool check_extremes() {
  const at::Tensor x = at::tensor({30.0f, 1e4f, NAN, 1.0f}).unsqueeze(1);
  const at::Tensor w = at::tensor({1.0f, 0.0f, -1.0f}).unsqueeze(1);
  const at::Tensor target = at::tensor({0, 1, 0, 2}, at::kLong);
  const auto [loss, lse, entropy, unit] = srlm::linear_softmax(x, w, target, 1, 0, 0, 0, true, true, 4);
  const double others = std::exp(-30.0) + std::exp(-60.0), rest = std::log(1 + std::exp(-1.0) + std::exp(-2.0));
  const auto near = [](const at::Tensor& ours, double exact) {
    return std::abs(ours.item<double>() / exact - 1) < 1e-5;
  };
  bool good = near(loss[0], others) && near(unit[0][0], -others) && near(loss[1], 1e4) && near(unit[1][1], -1);
  good &= near(loss[3], 2 + rest) && std::isnan(loss[2].item<double>());
  const auto [dx, dw] = srlm::linear_softmax_backward(at::ones({4}), std::nullopt, x, w, target, lse, loss, unit,
                                                      std::nullopt, 1, 0, 0, 0, true, true, 4);
  good &= near(dx[0], std::exp(-60.0) * -2 - std::exp(-30.0)) && near(dx[1], 1) && std::isnan(dx[2].item<double>());
  if (!good) std::printf("extreme logits\n");
  return good;
}

bool check_no_rows() {
  const at::Tensor x = at::empty({0, 3}), w = at::randn({5, 3}), target = at::empty({0}, at::kLong);
  const auto [loss, dx, dw] = srlm::linear_softmax_gradients(x, w, target, at::empty({0}), 1, 0, 0, 0, true, true, 4);
  if (loss.numel() == 0 && dx.numel() == 0 && dw.abs().max().item<double>() == 0) return true;
  std::printf("no rows\n");
  return false;
}

}  // namespace

int main() {
  at::manual_seed(0);
  bool good = check_extremes() && check_no_rows();
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const auto& o : {Options{1, 0, 0, 0}, {0.7, 0, 0.1, 1e-3}, {1.3, 4, 0.1, 1e-2}}) {
      good &= check(dtype, 3, 2, 1, o) && check(dtype, 17, 101, 9, o) && check(dtype, 40, 5000, 33, o);
    }
  }
  return good ? 0 : 1;
}
