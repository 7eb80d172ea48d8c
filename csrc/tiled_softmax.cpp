#include "tiled_softmax.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "blocks.h"

namespace srlm::tiled {
namespace {

using namespace blocked;

constexpr int64_t kCols = 128;       // of the vocabulary in a tile of logits: two packed tiles of W
constexpr int64_t kRows = 256;       // in a tile of logits, which then is 128 KiB
constexpr int64_t kSlices = 16;      // of the vocabulary with statistics of their own
constexpr int64_t kMostRows = 2048;  // with statistics in memory at a time
constexpr int64_t kDwRows = 512;     // that a block of dW is summed over at a time
constexpr int64_t kMostElements = 4 << 20;  // of U, and of W packed for it, at a time: more leave the cache
constexpr int64_t kLanes = Vec<float>::size();
constexpr float kLowest = std::numeric_limits<float>::lowest();

// W packed for logits: tiles [k][kTile] of `cols` rows of W.
template <typename T>
void pack_for_logits(const T* w, int64_t ldw, int64_t cols, int64_t k, T* packed) {
  for (int64_t c = 0; c < cols; c += kTile) {
    pack_transposed(w + c * ldw, ldw, std::min(kTile, cols - c), k, packed + c * k);
  }
}

// z [rows, cols] with rows kCols apart.
template <typename T>
void make_logits(const T* x, int64_t ldx, int64_t rows, int64_t cols, int64_t k, const T* packed, float* z) {
  for (int64_t c = 0; c < cols; c += kTile) {
    product(rows, std::min(kTile, cols - c), k, x, ldx, packed + c * k, z + c, kCols, false);
  }
}

// Differences of logits are taken to be no smaller: their exponential is 0, and the product with it has to be 0 too.
const Vec<float> kLeast(-200);

// For every lane of a row, `most_rows` of which follow each other: the running maximum m, the sum of e^(z - m), and, if
// asked for, that of e^(z - m) (z - m).
struct Statistics {
  float *max, *sum, *product;

  Statistics(float* memory, int64_t most_rows)
      : max(memory), sum(memory + most_rows * kLanes), product(memory + 2 * most_rows * kLanes) {}
  Statistics(const Statistics& all, int64_t offset)
      : max(all.max + offset), sum(all.sum + offset), product(all.product + offset) {}
};

// Adds a row's tile of kCols columns.
template <bool Products>
inline void absorb(const float* z, const Vec<float>& scale, const Statistics& row) {
  constexpr int64_t vectors = kCols / kLanes;
  const Vec<float> before = load(row.max);
  Vec<float> m = before, scaled[vectors];
  Vec<float> sums[2] = {Vec<float>(0), Vec<float>(0)}, products[2] = {Vec<float>(0), Vec<float>(0)};
#pragma GCC unroll 8
  for (int64_t i = 0; i < vectors; ++i) {
    scaled[i] = load(z + i * kLanes) * scale;
    m = at::vec::maximum(m, scaled[i]);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < vectors; ++i) {
    const Vec<float> below = scaled[i] - m, e = exp<float>(below);
    sums[i % 2] += e;
    if constexpr (Products) products[i % 2] = at::vec::fmadd(e, at::vec::maximum(below, kLeast), products[i % 2]);
  }
  const Vec<float> rise = before - m, shrink = exp<float>(rise), sum = load(row.sum);
  m.store(row.max);
  at::vec::fmadd(sum, shrink, sums[0] + sums[1]).store(row.sum);
  if constexpr (Products) {
    const Vec<float> moved = at::vec::fmadd(sum, at::vec::maximum(rise, kLeast), load(row.product));
    at::vec::fmadd(moved, shrink, products[0] + products[1]).store(row.product);
  }
}

// loss, lse and, if asked for, entropy of a row from the statistics of all slices, `stride` floats apart.
void finish(const Statistics& row, int64_t slices, int64_t stride, float z_y, float* loss, double* lse,
            float* entropy) {
  Vec<float> lane_max = load(row.max);
  for (int64_t s = 1; s < slices; ++s) lane_max = at::vec::maximum(lane_max, load(row.max + s * stride));
  const auto larger = [](const auto& a, const auto& b) { return at::vec::maximum(a, b); };
  const float highest = at::vec::vec_reduce_all<float>(larger, lane_max), m = z_y > highest ? z_y : highest;
  const auto total = [&](const auto& term) {  // over all slices; term(place, rise)
    return sum<float>(slices * kLanes, [&](int64_t i, int64_t) {
      const int64_t place = i / kLanes * stride;
      return term(place, load(row.max + place) - Vec<float>(m));
    });
  };
  const float rest = total([&](int64_t i, const Vec<float>& rise) { return load(row.sum + i) * exp<float>(rise); });
  const float log_sum = std::log1p(rest + std::expm1(z_y - m));
  *loss = -(z_y - m - log_sum);
  *lse = static_cast<double>(m) + log_sum;
  if (!entropy) return;
  const float products = total([&](int64_t i, const Vec<float>& rise) {
    const Vec<float> moved = at::vec::fmadd(load(row.sum + i), at::vec::maximum(rise, kLeast), load(row.product + i));
    return moved * exp<float>(rise);
  });
  const float e_y = std::exp(z_y - m);
  *entropy = log_sum - (products + (e_y > 0 ? e_y * (z_y - m) : 0)) / (rest + e_y);
}

template <typename T, bool Entropy>
void losses_(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target, double temperature, at::Tensor& loss,
             at::Tensor& lse, at::Tensor& entropy) {
  const at::Tensor x_pairs = whole_pairs<T>(x), w_pairs = whole_pairs<T>(w);
  const int64_t n_rows = x.size(0), vocab = w.size(0), k = x_pairs.size(1);
  const int64_t ldx = x_pairs.stride(0), ldw = w_pairs.stride(0);
  const int64_t slice_size = tiles(tiles(vocab, kSlices), kCols) * kCols, slices = tiles(vocab, slice_size);
  constexpr int64_t kinds = Entropy ? 3 : 2;
  const int64_t most_rows = std::min(n_rows, kMostRows), stride = kinds * most_rows * kLanes;
  const at::Tensor state = at::empty({slices, kinds, most_rows, kLanes}, x.options().dtype(at::kFloat));
  const at::Tensor target_logits = at::empty({most_rows}, state.options());
  const T *x_data = x_pairs.const_data_ptr<T>(), *w_data = w_pairs.const_data_ptr<T>();
  const int64_t* const y = target.const_data_ptr<int64_t>();
  const Statistics all(state.mutable_data_ptr<float>(), most_rows);
  float* const z_y = target_logits.mutable_data_ptr<float>();
  const float scale = 1 / temperature;
  for (int64_t start = 0; start < n_rows; start += kMostRows) {
    const int64_t rows = std::min(kMostRows, n_rows - start);
    std::fill_n(z_y, rows, std::numeric_limits<float>::quiet_NaN());  // what a target out of range keeps
    for_each_task<T>(slices, [&](int64_t slice) {
      const Scratch<T> packed(kCols * k);
      const Scratch<float> z(kRows * kCols);
      const Statistics own(all, slice * stride);
      std::fill_n(own.max, rows * kLanes, kLowest);
      std::fill_n(own.sum, rows * kLanes, 0.0f);
      if (Entropy) std::fill_n(own.product, rows * kLanes, 0.0f);
      const int64_t end = std::min(vocab, (slice + 1) * slice_size);
      for (int64_t v = slice * slice_size; v < end; v += kCols) {
        const int64_t cols = std::min(kCols, end - v);
        pack_for_logits(w_data + v * ldw, ldw, cols, k, packed.get());
        for (int64_t r = 0; r < rows; r += kRows) {
          const int64_t size = std::min(kRows, rows - r);
          make_logits(x_data + (start + r) * ldx, ldx, size, cols, k, packed.get(), z.get());
          for (int64_t i = r; i < r + size; ++i) {
            float* const row = z.get() + (i - r) * kCols;
            const int64_t y_here = y[start + i] - v;
            std::fill(row + cols, row + kCols, kLowest);
            if (y_here >= 0 && y_here < cols) {
              z_y[i] = row[y_here] * scale;
              row[y_here] = kLowest;  // its exponential is 0
            }
            absorb<Entropy>(row, Vec<float>(scale), Statistics(own, i * kLanes));
          }
        }
      }
    });
    float* const loss_data = loss.mutable_data_ptr<float>() + start;
    double* const lse_data = lse.mutable_data_ptr<double>() + start;
    float* const entropy_data = Entropy ? entropy.mutable_data_ptr<float>() + start : nullptr;
    at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t past) {
      for (int64_t i = begin; i < past; ++i) {
        finish(Statistics(all, i * kLanes), slices, stride, z_y[i], loss_data + i, lse_data + i,
               Entropy ? entropy_data + i : nullptr);
      }
    });
  }
}

// What U of a row is made of: U_j = scale e^(z_j - lse) but for the target's; lse in two floats.
struct Row {
  float high, low, scale, u_y;
  int64_t y;
};

// U of a row's tile that begins at column v.
template <typename T>
void write_unit(const float* z, int64_t v, int64_t cols, float inverse_temperature, const Row& row, T* unit) {
  const Vec<float> to_z(inverse_temperature), high(row.high), low(row.low), scale(row.scale);
  const auto u = [&](int64_t i) { return exp<float>(load(z + i) * to_z - high - low) * scale; };
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kLanes <= cols; i += kLanes) u(i).store(unit + i);
  } else {
    for (; i + 2 * kLanes <= cols; i += 2 * kLanes) at::vec::convert_from_float<T>(u(i), u(i + kLanes)).store(unit + i);
  }
  for (; i < cols; i += kLanes) store<T>(unit + i, u(i), std::min(kLanes, cols - i));
  if (row.y >= v && row.y < v + cols) unit[row.y - v] = row.u_y;
}

// Blocks of the vocabulary that U is made of at a time. They are the threads' tasks, so an even number of them.
int64_t blocks(int64_t cols, int64_t vocab) {
  constexpr int64_t even = 8;
  const int64_t most = std::max<int64_t>(cols / kCols, 1);
  return std::min(tiles(vocab, kCols), most < even ? most : most / even * even);
}

template <typename T>
class Gradients {
 public:
  Gradients(const at::Tensor& x, const at::Tensor& w, int64_t elements, at::Tensor dx, at::Tensor dw, bool add)
      : x_(whole_pairs<T>(x)),
        w_(whole_pairs<T>(w)),
        dx_(std::move(dx)),
        dw_(std::move(dw)),
        add_(add),
        n_rows_(x.size(0)),
        vocab_(w.size(0)),
        dim_(x.size(1)),
        d_tiles_(tiles(dim_, kTile)),
        most_cols_(blocks(std::min(elements, kMostElements) / std::max(n_rows_, dim_), vocab_) * kCols),
        // Rows of U do not lie powers of two apart, where they would share few places in the cache.
        ldu_(most_cols_ + 32),
        x_stride_(round_to_pairs<T>(n_rows_) * kTile),
        rows_(n_rows_),
        unit_(at::empty({n_rows_, ldu_}, x.options())),
        packed_w_(at::empty({dx_.defined() ? d_tiles_ : 0, most_cols_, kTile}, x.options())),
        packed_x_(at::empty({dw_.defined() ? d_tiles_ : 0, x_stride_}, x.options())) {
    if (dx_.defined()) {
      sums_ = at::empty({tiles(n_rows_, kRows), d_tiles_, kRows, kTile}, x.options().dtype(at::kFloat));
    }
  }

  void run(const at::Tensor& target, double temperature, const at::Tensor& loss, const at::Tensor& lse,
           const at::Tensor& coefficient) {
    inverse_temperature_ = 1 / temperature;
    const auto* const y = target.const_data_ptr<int64_t>();
    const auto *const losses = loss.const_data_ptr<float>(), *const c = coefficient.const_data_ptr<float>();
    const auto* const lses = lse.const_data_ptr<double>();
    for (int64_t n = 0; n < n_rows_; ++n) {
      const float high = lses[n], scale = c[n] * inverse_temperature_;
      rows_[n] = {high, static_cast<float>(lses[n] - high), scale, scale * std::expm1(-losses[n]), y[n]};
    }
    if (dw_.defined()) {
      const T* const x = x_.template const_data_ptr<T>();
      T* const packed = packed_x_.template mutable_data_ptr<T>();
      for_each_task<T>(d_tiles_, [&](int64_t d) {
        pack(x + d * kTile, x_.stride(0), n_rows_, std::min(kTile, dim_ - d * kTile), packed + d * x_stride_);
      });
    }
    for (int64_t v = 0; v < vocab_; v += most_cols_) {
      const int64_t cols = std::min(most_cols_, vocab_ - v);
      for_each_task<T>(tiles(cols, kCols), [&](int64_t block) {
        make_unit_and_dw(v + block * kCols, block * kCols, std::min(kCols, cols - block * kCols));
      });
      if (dx_.defined()) add_to_dx(cols, v > 0);
    }
    if (!dx_.defined()) return;
    at::parallel_for(0, tiles(n_rows_, kRows), 1, [&](int64_t begin, int64_t past) {
      for (int64_t block = begin; block < past; ++block) {
        write_rows(sums_.const_data_ptr<float>() + block * d_tiles_ * kRows * kTile, kRows,
                   std::min(kRows, n_rows_ - block * kRows), dx_.template mutable_data_ptr<T>() + block * kRows * dim_,
                   false);
      }
    });
  }

 private:
  // Columns [v, v + cols) of U, at `place` in unit_, and the same rows of dW.
  void make_unit_and_dw(int64_t v, int64_t place, int64_t cols) {
    const int64_t k = x_.size(1), ldx = x_.stride(0), ldw = w_.stride(0), ldt = kDwRows + 32;
    const T *x = x_.template const_data_ptr<T>(), *w = w_.template const_data_ptr<T>() + v * ldw;
    T* const unit = unit_.template mutable_data_ptr<T>() + place;
    const Scratch<T> packed(kCols * k), transposed(dw_.defined() ? kCols * ldt : 0);
    const Scratch<float> z(kRows * kCols);
    const Scratch<float> sums(dw_.defined() ? d_tiles_ * kCols * kTile : 0);
    pack_for_logits(w, ldw, cols, k, packed.get());
    for (int64_t start = 0; start < n_rows_; start += kDwRows) {
      const int64_t past = std::min(n_rows_, start + kDwRows);
      for (int64_t r = start; r < past; r += kRows) {
        const int64_t size = std::min(kRows, past - r);
        make_logits(x + r * ldx, ldx, size, cols, k, packed.get(), z.get());
        for (int64_t i = r; i < r + size; ++i) {
          write_unit(z.get() + (i - r) * kCols, v, cols, inverse_temperature_, rows_[i], unit + i * ldu_);
          if (cols < round_to_pairs<T>(cols)) unit[i * ldu_ + cols] = 0;
        }
      }
      if (dw_.defined()) add_to_dw(unit, start, past - start, cols, transposed.get(), ldt, sums.get());
    }
    if (dx_.defined()) {
      T* const to = packed_w_.template mutable_data_ptr<T>() + place * kTile;
      for (int64_t d = 0; d < d_tiles_; ++d) {
        pack(w + d * kTile, ldw, cols, std::min(kTile, dim_ - d * kTile), to + d * most_cols_ * kTile);
      }
    }
    if (!dw_.defined()) return;
    if (dw_.scalar_type() == at::kFloat) {
      write_rows(sums.get(), kCols, cols, dw_.template mutable_data_ptr<float>() + v * dim_, add_);
    } else {
      write_rows(sums.get(), kCols, cols, dw_.template mutable_data_ptr<T>() + v * dim_, add_);
    }
  }

  // Rows from their sums, which lie in tiles [d_tiles_][most_rows][kTile]: of a matrix whose rows are a power of two
  // apart a tile would share few places in the cache.
  template <typename To>
  void write_rows(const float* sums, int64_t most_rows, int64_t rows, To* out, bool add) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < d_tiles_; ++d) {
        const float* const from = sums + (d * most_rows + r) * kTile;
        To* const to = out + r * dim_ + d * kTile;
        for_each_vector<To>(std::min(kTile, dim_ - d * kTile), [&](int64_t i, int64_t n) {
          store<To>(to + i, add ? load(from + i, n) + load(to + i, n) : load(from + i, n), n);
        });
      }
    }
  }

  // The rows of dW of the tile of U that begins at `unit`, summed over `rows` rows of it from `start` on.
  void add_to_dw(const T* unit, int64_t start, int64_t rows, int64_t cols, T* transposed, int64_t ldt, float* sums) {
    const int64_t k = round_to_pairs<T>(rows);
    const T* const packed = packed_x_.template const_data_ptr<T>() + start * kTile;
    transpose(unit + start * ldu_, ldu_, rows, cols, transposed, ldt);
    if (rows < k) {
      for (int64_t i = 0; i < cols; ++i) transposed[i * ldt + rows] = 0;
    }
    for (int64_t d = 0; d < d_tiles_; ++d) {
      product(cols, std::min(kTile, dim_ - d * kTile), k, transposed, ldt, packed + d * x_stride_,
              sums + d * kCols * kTile, kTile, start > 0);
    }
  }

  // dX += U W for the first `cols` columns of unit_.
  void add_to_dx(int64_t cols, bool add) {
    constexpr int64_t group = 2;  // tiles of D in a task: more would push the rows of U out of the core's own cache
    const int64_t groups = tiles(d_tiles_, group), k = round_to_pairs<T>(cols);
    const T *unit = unit_.template const_data_ptr<T>(), *packed = packed_w_.template const_data_ptr<T>();
    float* const sums = sums_.template mutable_data_ptr<float>();
    for_each_task<T>(tiles(n_rows_, kRows) * groups, [&](int64_t task) {
      const int64_t r = task / groups * kRows, rows = std::min(kRows, n_rows_ - r), first = task % groups * group;
      for (int64_t d = first; d < std::min(d_tiles_, first + group); ++d) {
        product(rows, std::min(kTile, dim_ - d * kTile), k, unit + r * ldu_, ldu_, packed + d * most_cols_ * kTile,
                sums + (r * d_tiles_ + d * kRows) * kTile, kTile, add);
      }
    });
  }

  const at::Tensor x_, w_;
  at::Tensor dx_, dw_, sums_;
  const bool add_;
  const int64_t n_rows_, vocab_, dim_, d_tiles_, most_cols_, ldu_, x_stride_;
  float inverse_temperature_ = 1;
  std::vector<Row> rows_;
  const at::Tensor unit_, packed_w_, packed_x_;
};

}  // namespace

void losses(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target, double temperature, at::Tensor& loss,
            at::Tensor& lse, at::Tensor entropy) {
  if (x.size(0) == 0) return;
  const bool is_float = x.scalar_type() == at::kFloat;
  const auto run = entropy.defined() ? (is_float ? losses_<float, true> : losses_<at::BFloat16, true>)
                                     : (is_float ? losses_<float, false> : losses_<at::BFloat16, false>);
  run(x, w, target, temperature, loss, lse, entropy);
}

void gradients(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target, double temperature,
               const at::Tensor& loss, const at::Tensor& lse, const at::Tensor& coefficient, int64_t elements,
               at::Tensor dx, at::Tensor dw, bool add) {
  if (x.size(0) == 0) {
    if (dw.defined() && !add) dw.zero_();
  } else if (x.scalar_type() == at::kFloat) {
    Gradients<float>(x, w, elements, dx, dw, add).run(target, temperature, loss, lse, coefficient);
  } else {
    Gradients<at::BFloat16>(x, w, elements, dx, dw, add).run(target, temperature, loss, lse, coefficient);
  }
}

}  // namespace srlm::tiled
