// preference_loss against formulas in double precision, its derivatives against differences of its own values, and the
// lengths it refuses.
#include "preference.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>

namespace {

bool good = true;

void check(double ours, double exact, double tolerance, const char* kind, const char* what) {
  if (std::abs(ours - exact) <= tolerance * (1 + std::abs(exact))) return;
  std::printf("%s, %s: %.12g instead of %.12g\n", kind, what, ours, exact);
  good = false;
}

double value_of(const at::Tensor& sums, const char* kind, double eps) {
  const at::Tensor one_token_each = at::ones({2}, at::kLong);
  const auto result = srlm::preference_loss(sums, one_token_each, std::nullopt, kind, 0.5, eps, 0, false);
  return std::get<0>(result).item<double>();
}

// Rewards 1 and -2: a margin of 3.
double exact(std::string_view kind) {
  const auto sigma = [](double x) { return 1 / (1 + std::exp(-x)); };
  if (kind == "sigmoid") return -0.9 * std::log(sigma(3)) - 0.1 * std::log(sigma(-3));
  if (kind == "robust") return (-0.9 * std::log(sigma(3)) + 0.1 * std::log(sigma(-3))) / 0.8;
  if (kind == "hinge") return 0;
  if (kind == "ipo") return (6 - 1) * (6 - 1);
  if (kind == "exo_pair") return sigma(3) * std::log(sigma(3) / 0.9) + sigma(-3) * std::log(sigma(-3) / 0.1);
  if (kind == "discopop") return (1 - sigma(60)) * -std::log(sigma(3)) + sigma(60) * std::exp(-3);
  if (kind == "nca_pair") return -std::log(sigma(1)) - 0.5 * std::log(sigma(-1)) - 0.5 * std::log(sigma(2));
  if (kind == "sppo_hard") return (2 - 1) * (2 - 1) + (-4 + 1) * (-4 + 1);
  if (kind == "apo_zero") return sigma(-1) + sigma(-2);
  return sigma(1) + sigma(-3);  // apo_down
}

}  // namespace

int main() {
  const at::Tensor sums = at::tensor({2.0, -4.0}, at::kDouble), lengths = at::ones({2}, at::kLong);
  for (const char* kind : {"sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "nca_pair", "sppo_hard",
                           "apo_zero", "apo_down"}) {
    const auto result = srlm::preference_loss(sums, lengths, std::nullopt, kind, 0.5, 0.1, 0, false);
    const at::Tensor values = std::get<0>(result), coefficients = std::get<2>(result);
    check(values.item<double>(), exact(kind), 1e-12, kind, "value");
    for (int64_t i = 0; i < 2; ++i) {
      at::Tensor below = sums.clone(), above = sums.clone();
      below[i] -= 1e-5;
      above[i] += 1e-5;
      const double slope = (value_of(above, kind, 0.1) - value_of(below, kind, 0.1)) / 2e-5;
      check(coefficients[i].item<double>(), slope, 1e-8, kind, "derivative");
    }
  }

  const at::Tensor ragged = at::tensor({1, 3, 0, 2}, at::kLong), tokens = at::arange(1, 7, at::kFloat);
  const auto [values, totals, coefficients] =
      srlm::preference_loss(tokens, ragged, at::full({4}, 2.0f), "ipo", 1, 0, 1, true);
  check(totals.equal(at::tensor({1.0f, 9.0f, 0.0f, 11.0f})), 1, 0, "ipo", "sums");
  check(values[0].item<double>(), std::pow(-1 - 7.0 / 3 - 1.5, 2), 1e-6, "ipo", "value by the lengths");
  check(coefficients[1].item<double>(), -2 * (-1 - 7.0 / 3 - 1.5) / 3, 1e-6, "ipo", "derivative by the lengths");
  const at::Tensor d_values = at::tensor({2.0f, 3.0f}), d_sums = at::tensor({0.0f, 1.0f, 0.0f, 0.0f});
  const at::Tensor by_sums = at::tensor({1.0f, 2.0f, 5.0f, 7.0f});
  const at::Tensor gradient = srlm::preference_loss_backward(d_values, d_sums, by_sums, ragged, 6);
  check(gradient.equal(at::tensor({2.0f, 5.0f, 5.0f, 5.0f, 21.0f, 21.0f})), 1, 0, "any", "gradient of the tokens");

  for (const int64_t n_tokens : {5, 7}) {
    try {
      srlm::preference_loss(at::zeros({n_tokens}), ragged, std::nullopt, "ipo", 1, 0, 0, false);
      std::printf("%ld tokens were accepted\n", static_cast<long>(n_tokens));
      good = false;
    } catch (const c10::ValueError&) {
    }
  }
  return good ? 0 : 1;
}
