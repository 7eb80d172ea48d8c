// adamw_step_ against the formula in double precision, and its stochastic rounding: to the two neighbours, right on
// average, the same for any number of threads, another for another seed.
#include "adamw.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <cstdio>
#include <optional>
#include <tuple>
#include <vector>

namespace {

bool good = true;

void check(bool holds, const char* what) {
  if (!holds) std::printf("wrong: %s\n", what);
  good &= holds;
}

void step(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& m, const at::Tensor& v, int64_t t,
          std::optional<int64_t> seed) {
  const std::vector<int64_t> seeds = {seed.value_or(0)};
  srlm::adamw_step_({param}, {grad}, {m}, {v}, 0.01, 0.9, 0.99, 1e-8, 0.1, {t},
                    seed ? at::OptionalIntArrayRef(seeds) : std::nullopt);
}

}  // namespace

int main() {
  at::manual_seed(0);
  for (const int64_t size : {0, 1, 5, 33, 40000}) {
    const at::Tensor p = at::randn({size}, at::kDouble), g = at::randn({size}, at::kDouble);
    const at::Tensor m = at::randn({size}, at::kDouble), v = at::rand({size}, at::kDouble);
    const at::Tensor new_m = 0.9 * m + 0.1 * g, new_v = 0.99 * v + 0.01 * g * g;
    const at::Tensor update = new_m / (1 - std::pow(0.9, 3)) / ((new_v / (1 - std::pow(0.99, 3))).sqrt() + 1e-8);
    const at::Tensor new_p = p - 0.01 * 0.1 * p - 0.01 * update;
    for (const auto& [dtype, moments, tolerance] : {std::tuple{at::kDouble, at::kDouble, 1e-14},
                                                    {at::kFloat, at::kFloat, 1e-6},
                                                    {at::kFloat, at::kBFloat16, 8e-3},
                                                    {at::kBFloat16, at::kFloat, 8e-3},
                                                    {at::kBFloat16, at::kBFloat16, 1.6e-2}}) {
      for (const std::optional<int64_t> seed : {std::optional<int64_t>(), std::optional<int64_t>(-5)}) {
        const at::Tensor our_p = p.to(dtype, false, true), our_m = m.to(moments, false, true),
                         our_v = v.to(moments, false, true);
        step(our_p, g.to(dtype), our_m, our_v, 3, seed);
        check(at::allclose(our_p.to(at::kDouble), new_p, tolerance, tolerance), "param");
        check(at::allclose(our_m.to(at::kDouble), new_m, tolerance, tolerance), "exp_avg");
        check(at::allclose(our_v.to(at::kDouble), new_v, tolerance, tolerance), "exp_avg_sq");
      }
    }
  }

  // exp_avg is 0.1 everywhere, which lies between two bf16.
  const int64_t n = 100000;
  const auto moments_after = [&](int64_t seed, int threads) {
    at::set_num_threads(threads);
    const at::Tensor m = at::zeros({n}, at::kBFloat16), v = at::zeros({n}, at::kBFloat16);
    step(at::zeros({n}), at::ones({n}), m, v, 1, seed);
    return m;
  };
  const at::Tensor m = moments_after(1, 1);
  check(m.equal(moments_after(1, 2)), "the same with two threads");
  check(!m.equal(moments_after(2, 1)), "another seed rounds otherwise");
  check(m.min().item<float>() < 0.1f && 0.1f < m.max().item<float>(), "rounded both ways");
  check(m.max().item<float>() - m.min().item<float>() <= std::exp2(-11.0f), "rounded to the neighbours");
  check(std::abs(m.to(at::kDouble).mean().item<double>() - 0.1) < 4 * std::exp2(-12.0) / std::sqrt(n), "mean");

  try {
    step(at::zeros({4}), at::zeros({3}), at::zeros({4}), at::zeros({4}), 1, std::nullopt);
    check(false, "a shorter gradient is refused");
  } catch (const c10::ValueError&) {
  }
  return good ? 0 : 1;
}
