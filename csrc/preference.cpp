#include "preference.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace srlm {
namespace {

constexpr int64_t kPairsPerTask = 8;

template <typename T>
struct Reward {
  T value, d_chosen, d_rejected;  // derivatives by the rewards
};

template <typename T>
struct Margin {
  T value, slope;
};

template <typename T>
T sigmoid(T x) {
  return 1 / (1 + std::exp(-x));
}

template <typename T>
T log_sigmoid(T x) {
  return std::min(x, T(0)) - std::log1p(std::exp(-std::abs(x)));
}

template <typename T>
T square(T x) {
  return x * x;
}

// The losses of the margin d alone.

template <typename T>
Margin<T> sigmoid_loss(T d, T /*beta*/, T eps) {
  return {-(1 - eps) * log_sigmoid(d) - eps * log_sigmoid(-d), eps - sigmoid(-d)};
}

template <typename T>
Margin<T> robust(T d, T /*beta*/, T eps) {
  const T scale = 1 / (1 - 2 * eps);
  return {(eps * log_sigmoid(-d) - (1 - eps) * log_sigmoid(d)) * scale, -sigmoid(-d) - eps * scale};
}

template <typename T>
Margin<T> hinge(T d, T /*beta*/, T /*eps*/) {
  return d >= 1 ? Margin<T>{0, 0} : Margin<T>{1 - d, -1};
}

template <typename T>
Margin<T> ipo(T d, T beta, T /*eps*/) {
  const T error = (d - T(0.5)) / beta;
  return {square(error), 2 * error / beta};
}

template <typename T>
Margin<T> exo_pair(T d, T /*beta*/, T eps) {
  const T chosen = log_sigmoid(d) - std::log(1 - eps), rejected = log_sigmoid(-d) - std::log(eps);
  const T p = sigmoid(d), q = sigmoid(-d);
  return {p * chosen + q * rejected, p * q * (chosen - rejected)};
}

template <typename T>
Margin<T> discopop(T d, T /*beta*/, T /*eps*/) {
  constexpr T tau = 0.05;
  const T m = sigmoid(d / tau), rest = sigmoid(-d / tau);
  const T logistic = log_sigmoid(d), exponential = std::exp(log_sigmoid(d / tau) - d);
  return {exponential - rest * logistic,
          m * rest / tau * logistic - rest * sigmoid(-d) + exponential * (rest / tau - 1)};
}

// The losses of both rewards.

template <typename T>
Reward<T> nca_pair(T r_c, T r_r, T /*beta*/) {
  return {-log_sigmoid(r_c) - T(0.5) * log_sigmoid(-r_c) - T(0.5) * log_sigmoid(-r_r),
          T(0.5) * sigmoid(r_c) - sigmoid(-r_c), T(0.5) * sigmoid(r_r)};
}

template <typename T>
Reward<T> sppo_hard(T r_c, T r_r, T beta) {
  const T chosen = (r_c - T(0.5)) / beta, rejected = (r_r + T(0.5)) / beta;
  return {square(chosen) + square(rejected), 2 * chosen / beta, 2 * rejected / beta};
}

template <typename T>
Reward<T> apo_zero(T r_c, T r_r, T /*beta*/) {
  const T p = sigmoid(r_r), q = sigmoid(-r_c);
  return {q + p, -sigmoid(r_c) * q, p * sigmoid(-r_r)};
}

template <typename T>
Reward<T> apo_down(T r_c, T r_r, T /*beta*/) {
  const T p = sigmoid(r_c), q = sigmoid(r_r - r_c), slope = q * sigmoid(r_c - r_r);
  return {p + q, p * sigmoid(-r_c) - slope, slope};
}

template <typename T>
struct Kind {
  std::string_view name;
  Margin<T> (*of_margin)(T d, T beta, T eps);
  Reward<T> (*of_rewards)(T r_c, T r_r, T beta);  // where of_margin is null
};

template <typename T>
const Kind<T>& find_kind(std::string_view name) {
  static const Kind<T> kinds[] = {
      {"sigmoid", sigmoid_loss<T>, nullptr}, {"robust", robust<T>, nullptr},     {"hinge", hinge<T>, nullptr},
      {"ipo", ipo<T>, nullptr},              {"exo_pair", exo_pair<T>, nullptr}, {"discopop", discopop<T>, nullptr},
      {"nca_pair", nullptr, nca_pair<T>},    {"sppo_hard", nullptr, sppo_hard<T>},
      {"apo_zero", nullptr, apo_zero<T>},    {"apo_down", nullptr, apo_down<T>},
  };
  const auto* found = std::find_if(std::begin(kinds), std::end(kinds), [&](const auto& k) { return k.name == name; });
  TORCH_CHECK_VALUE(found != std::end(kinds), "preference_loss: unknown kind ", name);
  return *found;
}

// The first token of every response, and the number of tokens.
std::vector<int64_t> offsets(const at::Tensor& lengths, int64_t n_tokens) {
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  std::vector<int64_t> begin(lengths.numel() + 1, 0);
  for (int64_t i = 0; i < lengths.numel(); ++i) {
    TORCH_CHECK_VALUE(length[i] >= 0, "preference_loss: lengths[", i, "] is ", length[i]);
    begin[i + 1] = begin[i] + length[i];
  }
  TORCH_CHECK_VALUE(begin.back() == n_tokens, "preference_loss: lengths sum to ", begin.back(), " for ", n_tokens,
                    " tokens");
  return begin;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> preference_loss(const at::Tensor& logps, const at::Tensor& lengths,
                                                               const std::optional<at::Tensor>& reference,
                                                               std::string_view kind, double beta,
                                                               double label_smoothing, double margin,
                                                               bool length_normalised) {
  const int64_t n_pairs = lengths.numel() / 2;
  const std::vector<int64_t> begin = offsets(lengths, logps.numel());
  at::Tensor values = at::empty({n_pairs}, logps.options());
  at::Tensor sums = at::empty({2 * n_pairs}, logps.options()), coefficients = at::empty({2 * n_pairs}, logps.options());
  AT_DISPATCH_FLOATING_TYPES(logps.scalar_type(), "preference_loss", [&] {
    const auto& loss = find_kind<scalar_t>(kind);
    const scalar_t* logp = logps.const_data_ptr<scalar_t>();
    const scalar_t* reference_sum = reference ? reference->const_data_ptr<scalar_t>() : nullptr;
    scalar_t *value = values.mutable_data_ptr<scalar_t>(), *sum = sums.mutable_data_ptr<scalar_t>(),
             *coefficient = coefficients.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, n_pairs, kPairsPerTask, [&](int64_t first, int64_t last) {
      for (int64_t pair = first; pair < last; ++pair) {
        scalar_t scale[2], r[2];
        for (int64_t side = 0; side < 2; ++side) {
          const int64_t i = 2 * pair + side, length = begin[i + 1] - begin[i];
          double total = 0;
          for (int64_t t = begin[i]; t < begin[i + 1]; ++t) total += logp[t];
          sum[i] = static_cast<scalar_t>(total);
          scale[side] = static_cast<scalar_t>(beta) / (length_normalised ? std::max<int64_t>(length, 1) : 1);
          r[side] = scale[side] * (reference_sum ? sum[i] - reference_sum[i] : sum[i]);
        }
        Reward<scalar_t> result;
        if (loss.of_margin) {
          const auto [v, slope] = loss.of_margin(r[0] - r[1] - static_cast<scalar_t>(margin), beta, label_smoothing);
          result = {v, slope, -slope};
        } else {
          result = loss.of_rewards(r[0], r[1], beta);
        }
        value[pair] = result.value;
        coefficient[2 * pair] = result.d_chosen * scale[0];
        coefficient[2 * pair + 1] = result.d_rejected * scale[1];
      }
    });
  });
  return {values, sums, coefficients};
}

at::Tensor preference_loss_backward(const at::Tensor& grad_values, const at::Tensor& grad_sums,
                                    const at::Tensor& coefficients, const at::Tensor& lengths, int64_t n_tokens) {
  const std::vector<int64_t> begin = offsets(lengths, n_tokens);
  at::Tensor d_logps = at::empty({n_tokens}, coefficients.options());
  AT_DISPATCH_FLOATING_TYPES(coefficients.scalar_type(), "preference_loss_backward", [&] {
    const scalar_t *dv = grad_values.const_data_ptr<scalar_t>(), *ds = grad_sums.const_data_ptr<scalar_t>(),
                   *coefficient = coefficients.const_data_ptr<scalar_t>();
    scalar_t* d_logp = d_logps.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, lengths.numel(), 2 * kPairsPerTask, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        std::fill(d_logp + begin[i], d_logp + begin[i + 1], dv[i / 2] * coefficient[i] + ds[i]);
      }
    });
  });
  return d_logps;
}

}  // namespace srlm

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("preference_loss", &srlm::preference_loss);
  m.impl("preference_loss_backward", &srlm::preference_loss_backward);
}
