// The loop over the elements is left to the compiler to vectorise. CMakeLists.txt forbids fused multiply-add here, so
// that all implementations agree bit for bit.
#include "adamw.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>
#include <type_traits>

#include "vec.h"

namespace srlm {
namespace {

constexpr int64_t kBlock = 32768;  // elements of a task; divides 2^32, so that a block has one high half of its indices

constexpr uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6B;
  x = (x ^ (x >> 13)) * 0xC2B2AE35;
  return x ^ (x >> 16);
}

uint32_t noise_key(int64_t seed, int64_t step) {
  return mix(mix(mix(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32)) ^ static_cast<uint32_t>(step));
}

template <typename T>
constexpr bool is_bf16 = std::is_same_v<T, at::BFloat16>;

// In bf16 rounded up where the bits cut off and the low 16 bits of the noise have a carry.
template <bool stochastic, typename T>
T rounded(Wide<T> x, uint32_t noise) {
  if constexpr (stochastic && is_bf16<T>) {
    const uint32_t sum = std::bit_cast<uint32_t>(x) + (noise & 0xFFFF);
    return T(static_cast<uint16_t>(x == x ? sum >> 16 : 0x7FC0), T::from_bits());
  } else {
    return static_cast<T>(x);
  }
}

template <typename W>
struct Scalars {
  W kept, step_size, eps, weight1, beta2, weight2, unbias;
};

template <bool stochastic, typename T, typename M>
void update(T* __restrict param, const T* __restrict grad, M* __restrict exp_avg, M* __restrict exp_avg_sq,
            int64_t size, uint32_t first, uint32_t key, Scalars<Wide<T>> s) {
  for (int64_t i = 0; i < size; ++i) {
    const Wide<T> g = grad[i];
    const Wide<T> m = exp_avg[i] + s.weight1 * (g - exp_avg[i]);
    const Wide<T> v = s.beta2 * exp_avg_sq[i] + s.weight2 * g * g;
    const Wide<T> p = s.kept * param[i] - s.step_size * m / (std::sqrt(v) * s.unbias + s.eps);
    const uint32_t noise = mix((first + static_cast<uint32_t>(i)) ^ key);
    exp_avg[i] = rounded<stochastic, M>(m, noise);
    exp_avg_sq[i] = rounded<stochastic, M>(v, noise >> 16);
    param[i] = rounded<stochastic, T>(p, mix(~noise));
  }
}

struct Options {
  double lr, beta1, beta2, eps, weight_decay;
};

template <typename T, typename M>
void step(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
          const Options& o, int64_t t, std::optional<int64_t> seed) {
  using W = Wide<T>;
  const Scalars<W> scalars = {
      .kept = static_cast<W>(1 - o.lr * o.weight_decay),
      .step_size = static_cast<W>(o.lr / (1 - std::pow(o.beta1, t))),
      .eps = static_cast<W>(o.eps),
      .weight1 = static_cast<W>(1 - o.beta1),
      .beta2 = static_cast<W>(o.beta2),
      .weight2 = static_cast<W>(1 - o.beta2),
      .unbias = static_cast<W>(1 / std::sqrt(1 - std::pow(o.beta2, t))),
  };
  const auto update_block = (is_bf16<T> || is_bf16<M>) && seed ? update<true, T, M> : update<false, T, M>;
  const uint32_t key = seed ? noise_key(*seed, t) : 0;
  T* p = param.mutable_data_ptr<T>();
  const T* g = grad.const_data_ptr<T>();
  M *m = exp_avg.mutable_data_ptr<M>(), *v = exp_avg_sq.mutable_data_ptr<M>();
  at::parallel_for(0, param.numel(), kBlock, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t size = std::min(end, (begin / kBlock + 1) * kBlock) - begin;
      update_block(p + begin, g + begin, m + begin, v + begin, size, static_cast<uint32_t>(begin),
                   mix(static_cast<uint32_t>(begin >> 32) ^ key), scalars);
      begin += size;
    }
  });
}

}  // namespace

void adamw_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                 double lr, double beta1, double beta2, double eps, double weight_decay, at::IntArrayRef steps,
                 at::OptionalIntArrayRef seeds) {
  for (size_t i = 0; i < params.size(); ++i) {
    for (const at::Tensor& tensor : {params[i], grads[i], exp_avgs[i], exp_avg_sqs[i]}) {
      TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.numel() == params[i].numel(),
                        "adamw_step_: the tensors of parameter ", i, " must be contiguous and of one shape");
    }
    const auto run = [&](auto step_one) {
      step_one(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], Options{lr, beta1, beta2, eps, weight_decay}, steps[i],
               seeds ? std::optional((*seeds)[i]) : std::nullopt);
    };
    const bool narrow = exp_avgs[i].scalar_type() == at::kBFloat16;
    switch (params[i].scalar_type()) {
      case at::kDouble:
        run(step<double, double>);
        break;
      case at::kBFloat16:
        narrow ? run(step<at::BFloat16, at::BFloat16>) : run(step<at::BFloat16, float>);
        break;
      default:
        narrow ? run(step<float, at::BFloat16>) : run(step<float, float>);
    }
  }
}

}  // namespace srlm

TORCH_LIBRARY_IMPL(srlm, CPU, m) { m.impl("adamw_step_", &srlm::adamw_step_); }
