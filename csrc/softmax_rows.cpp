#include "softmax_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

#include "vec.h"

namespace srlm {
namespace {

// The sums of a row; those of exponentials leave out the target's term, so that p_y - 1 = -others / sum keeps its
// relative accuracy as p_y goes to 1.
template <typename W>
struct Statistics {
  W max;       // of z
  W others;    // sum_{j != y} e^(z_j - max)
  W z_y;
  W weighted;  // sum_{j != y} e^(z_j - max) (z_j - max); only where the entropy is asked for
  W mean;      // of z; only for label smoothing
};

// What U of a row is made of: U_j = (p_j (a - h (log p_j + entropy)) - b) dz_j / d raw_j for j != y.
template <typename W>
struct Terms {
  W max, log_sum;  // log p_j = z_j - max - log_sum
  W a, b, h, entropy;
};

// z in place of raw. z also tells dz / d raw = (1 - (z temperature / softcap)^2) / temperature.
template <typename W>
void cap(W* z, int64_t cols, const Softmax& softmax) {
  const Vec<W> scale(softmax.softcap ? softmax.softcap / softmax.temperature : 1 / softmax.temperature);
  const Vec<W> inner(softmax.softcap ? 1 / softmax.softcap : 1);
  for_each_vector<W>(cols, [&](int64_t i, int64_t n) {
    const Vec<W> raw = load(z + i, n);
    store<W>(z + i, softmax.softcap ? (raw * inner).tanh() * scale : raw * scale, n);
  });
}

// The first n lanes of x, the others zero.
template <typename W>
Vec<W> first(const Vec<W>& x, int64_t n) {
  return Vec<W>::set(Vec<W>(0), x, n);
}

// Writes e^(z - max) in place of z if `exponentials`; the target's place is garbage afterwards.
template <typename W>
Statistics<W> statistics(W* z, int64_t y, int64_t cols, bool smoothed, bool weighted, bool exponentials) {
  Statistics<W> s{};
  s.max = at::vec::reduce_all<W>([](const auto& a, const auto& b) { return at::vec::maximum(a, b); }, z, cols);
  if (smoothed) s.mean = sum<W>(cols, [&](int64_t i, int64_t n) { return load(z + i, n); }) / cols;
  s.z_y = std::numeric_limits<W>::quiet_NaN();
  if (y >= 0 && y < cols) {
    s.z_y = z[y];
    z[y] = std::numeric_limits<W>::lowest();  // its exponential is 0, and so is 0 times it
  }
  const Vec<W> max(s.max);
  if (weighted) {
    s.weighted = sum<W>(cols, [&](int64_t i, int64_t n) {
      const Vec<W> x = load(z + i, n) - max;
      return first<W>(exp<W>(x) * x, n);
    });
  }
  s.others = sum<W>(cols, [&](int64_t i, int64_t n) {
    const Vec<W> e = first<W>(exp<W>(load(z + i, n) - max), n);
    if (exponentials) store<W>(z + i, e, n);
    return e;
  });
  return s;
}

// U of a row from e^(z - max), which add up to `total`; without soft-capping and an entropy's gradient.
template <typename T>
void write_unit(const Wide<T>* exponentials, T* unit, int64_t cols, Wide<T> total, const Terms<Wide<T>>& terms,
                Wide<T> slope) {
  const Vec<T> scale(terms.a / total * slope), shift(terms.b * slope);
  for_each_vector<T>(cols, [&](int64_t i, int64_t n) {
    store<T>(unit + i, load(exponentials + i, n) * scale - shift, n);
  });
}

// U of a row from z.
template <typename T>
void write_unit(const Wide<T>* z, T* unit, int64_t cols, const Terms<Wide<T>>& terms, const Softmax& softmax) {
  const Vec<T> max(terms.max), log_sum(terms.log_sum), entropy(terms.entropy);
  const Vec<T> a(terms.a), b(terms.b), h(terms.h), one(1);
  const Vec<T> to_tanh(softmax.softcap ? softmax.temperature / softmax.softcap : 0), scale(1 / softmax.temperature);
  for_each_vector<T>(cols, [&](int64_t i, int64_t n) {
    const Vec<T> z_i = load(z + i, n), log_p = z_i - max - log_sum, t = z_i * to_tanh;
    store<T>(unit + i, (exp<T>(log_p) * (a - h * (log_p + entropy)) - b) * (one - t * t) * scale, n);
  });
}

template <typename T>
void softmax_row(Wide<T>* z, int64_t y, int64_t cols, const Softmax& softmax, const SoftmaxRows& rows, int64_t n) {
  using W = Wide<T>;
  const auto at = [n](const at::Tensor& values) { return values.mutable_data_ptr<W>() + n; };
  const W temperature = softmax.temperature, eps = softmax.label_smoothing, z_loss = softmax.z_loss;
  const bool plain = !softmax.softcap && !rows.grad_entropy.defined();
  if (softmax.softcap || temperature != 1) cap(z, cols, softmax);
  const Statistics<W> s = statistics<W>(z, y, cols, eps > 0, rows.entropy.defined() || rows.grad_entropy.defined(),
                                        rows.unit.defined() && plain);
  const W e_y = std::exp(s.z_y - s.max), total = s.others + e_y, p_y = e_y / total;
  const W log_sum = std::log1p(s.others + std::expm1(s.z_y - s.max));
  const W log_p_y = s.z_y - s.max - log_sum, lse = s.max + log_sum;
  const W entropy = log_sum - (s.weighted + e_y * (s.z_y - s.max)) / total;
  if (rows.loss.defined()) *at(rows.loss) = z_loss * lse * lse - (1 - eps) * log_p_y - eps * (s.mean - lse);
  if (rows.lse.defined()) *at(rows.lse) = lse;
  if (rows.entropy.defined()) *at(rows.entropy) = entropy;
  if (!rows.unit.defined()) return;

  const W c = rows.coefficient.defined() ? *at(rows.coefficient) : 1;
  const W h = rows.grad_entropy.defined() ? *at(rows.grad_entropy) : 0;
  const Terms<W> terms{s.max, log_sum, c * (1 + 2 * z_loss * lse), c * eps / cols, h, entropy};
  T* const unit = rows.unit.mutable_data_ptr<T>() + n * rows.unit.stride(0);
  if (plain) {
    write_unit<T>(z, unit, cols, total, terms, 1 / temperature);
  } else {
    write_unit<T>(z, unit, cols, terms, softmax);
  }
  if (y >= 0 && y < cols) {
    const W t = softmax.softcap ? s.z_y * temperature / static_cast<W>(softmax.softcap) : 0;
    const W u = c * (2 * z_loss * lse * p_y + eps - s.others / total) - terms.b - h * p_y * (log_p_y + entropy);
    unit[y] = u * (1 - t * t) / temperature;
  }
}

}  // namespace

void softmax_rows(const at::Tensor& logits, const at::Tensor& target, const Softmax& softmax, const SoftmaxRows& rows) {
  const int64_t cols = logits.size(1), stride = logits.stride(0);
  const int64_t* const y = target.const_data_ptr<int64_t>();
  const at::ScalarType dtype = rows.unit.defined() ? rows.unit.scalar_type() : logits.scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "softmax_rows", [&] {
    auto* const z = logits.mutable_data_ptr<Wide<scalar_t>>();
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) softmax_row<scalar_t>(z + n * stride, y[n], cols, softmax, rows, n);
    });
  });
}

}  // namespace srlm
