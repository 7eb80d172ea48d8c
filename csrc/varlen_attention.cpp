#include "varlen_attention.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "vec.h"

// Scores are laid out as [keys, queries], for a block of queries as wide as one or two vectors: a softmax then runs
// down the columns, all of them at once, and neither keys nor values have to be transposed.

namespace srlm {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// An operand of `multiply`; where it is written its columns are dense.
template <typename W>
struct Matrix {
  W* data;
  int64_t row_stride, column_stride = 1;

  W* row(int64_t i) const { return data + i * row_stride; }
  Matrix t() const { return {data, column_stride, row_stride}; }
};

constexpr int kTileRows = sizeof(float) * Vec<float>::size() == 64 ? 8 : 4;  // as many as the registers can hold

// A tile of c = a b, or of c += a b, of kTileRows rows and kVectors vectors.
template <bool kAdd, int kVectors, typename W>
void multiply_tile(Matrix<W> a, Matrix<W> b, Matrix<W> c, int64_t depth) {
  constexpr int64_t lanes = Vec<W>::size();
  Vec<W> sum[kTileRows][kVectors], right[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = kAdd ? load(c.row(i) + j * lanes) : Vec<W>(0);
  }
  for (int64_t p = 0; p < depth; ++p) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = load(b.row(p) + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Vec<W> left(a.row(i)[p * a.column_stride]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] = at::vec::fmadd(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j].store(c.row(i) + j * lanes);
  }
}

// c = a b, or c += a b, where c has whole tiles of rows and whole vectors of columns.
template <bool kAdd = false, typename W>
void multiply(Matrix<W> a, Matrix<W> b, Matrix<W> c, int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t lanes = Vec<W>::size();
  for (int64_t j = 0; j < columns; j += 2 * lanes) {
    const auto tile = j + lanes < columns ? multiply_tile<kAdd, 2, W> : multiply_tile<kAdd, 1, W>;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      tile({a.row(i), a.row_stride, a.column_stride}, {b.data + j, b.row_stride}, {c.row(i) + j, c.row_stride}, depth);
    }
  }
}

// to = from^T, where columns from `rows` to `width` become zero.
template <typename W>
void transpose(Matrix<W> from, int64_t rows, int64_t columns, int64_t width, Matrix<W> to) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to.row(j)[i] = from.row(i)[j];
    std::fill(to.row(j) + rows, to.row(j) + width, W(0));
  }
}

// Row i of `to` becomes scale * (row index(i) of `from`); its columns up to a whole vector become zero.
template <typename T, typename Index>
void gather(const T* from, int64_t stride, int64_t rows, int64_t columns, const Index& index, Wide<T> scale,
            Matrix<Wide<T>> to) {
  const Vec<T> factor(scale);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = from + index(i) * stride;
    for_each_vector<T>(columns, [&](int64_t j, int64_t n) { (load(row + j, n) * factor).store(to.row(i) + j); });
  }
}

// Matrices cut from one allocation.
template <typename W>
class Scratch {
 public:
  Scratch(int64_t size, const at::TensorOptions& options)
      : memory_(at::empty({size}, options)), next_(memory_.mutable_data_ptr<W>()) {}

  Matrix<W> take(int64_t rows, int64_t columns) {
    W* data = next_;
    next_ += rows * columns;
    return {data, columns};
  }

 private:
  at::Tensor memory_;
  W* next_;
};

// A block of queries of one segment.
struct Block {
  int64_t first, size, width;         // width: `size` in whole vectors
  int64_t seen_by_first, seen, rows;  // keys that its first query sees, that its last one sees, and these in whole tiles

  // Scores of keys that a query does not see become -infinity.
  template <typename W>
  void hide(Matrix<W> scores) const {
    for (int64_t key = seen_by_first; key < rows; ++key) {
      std::fill_n(scores.row(key), std::min(key - seen_by_first + 1, size), -std::numeric_limits<W>::infinity());
    }
  }
};

struct Segment {
  int64_t token, q_len, k_len;
  const int64_t* keys;

  template <typename W, typename Body>
  void for_each_block(const Body& body) const {
    constexpr int64_t lanes = Vec<W>::size();
    for (int64_t first = 0; first < q_len; first += 2 * lanes) {
      const int64_t size = std::min(2 * lanes, q_len - first), seen = k_len - q_len + first + size;
      body(Block{first, size, round_up(size, lanes), seen - size + 1, seen, round_up(seen, kTileRows)});
    }
  }
};

// Segments [begin, end) that share no token with the others, and the length of their longest keys.
struct Island {
  int64_t begin, end, longest;
};

struct Layout {
  int64_t tokens, heads, kv_heads, head_dim;
  std::vector<Segment> segments;
  std::vector<Island> islands;

  Layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cu_q, const at::Tensor& cu_k,
         const at::Tensor& key_index)
      : tokens(q.size(0)), heads(q.size(1)), kv_heads(k.size(1)), head_dim(q.size(2)) {
    const int32_t *q_start = cu_q.const_data_ptr<int32_t>(), *k_start = cu_k.const_data_ptr<int32_t>();
    const int64_t* keys = key_index.const_data_ptr<int64_t>();
    for (int64_t s = 0; s + 1 < cu_q.numel(); ++s) {
      segments.push_back({q_start[s], q_start[s + 1] - q_start[s], k_start[s + 1] - k_start[s], keys + k_start[s]});
    }
    int64_t end = segments.size(), first_key = tokens, longest = 0;
    for (int64_t s = end - 1; s >= 0; --s) {
      const Segment& segment = segments[s];
      first_key = std::min(first_key, *std::min_element(segment.keys, segment.keys + segment.k_len));
      longest = std::max(longest, segment.k_len);
      if (first_key >= segment.token) {
        islands.push_back({s, end, longest});
        end = s;
        longest = 0;
      }
    }
  }

  // body(island, head of the keys) for all of them, in parallel; no two write to the same place.
  template <typename Body>
  void for_each_island(const Body& body) const {
    at::parallel_for(0, islands.size() * kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(islands[i / kv_heads], i % kv_heads);
    });
  }
};

// Scores become e^(score - highest), where `highest` is their column's, and `total` the sum of the column.
template <typename W>
void exponentials(Matrix<W> scores, int64_t rows, int64_t width, W* highest, W* total) {
  for (int64_t j = 0; j < width; j += Vec<W>::size()) {
    Vec<W> high = load(scores.row(0) + j), sum(0);
    for (int64_t i = 1; i < rows; ++i) high = at::vec::maximum(high, load(scores.row(i) + j));
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<W> e = exp<W>(load(scores.row(i) + j) - high);
      e.store(scores.row(i) + j);
      sum += e;
    }
    high.store(highest + j);
    sum.store(total + j);
  }
}

template <typename T>
void forward(const Layout& layout, const T* q, const T* k, const T* v, T* out, const at::Tensor& lse) {
  using W = Wide<T>;
  constexpr int64_t width = 2 * Vec<T>::size();
  const int64_t d = layout.head_dim, columns = round_up(d, Vec<T>::size()), group = layout.heads / layout.kv_heads;
  const int64_t q_stride = layout.heads * d, kv_stride = layout.kv_heads * d;
  const W scale = 1 / std::sqrt(W(d));
  W* lse_data = lse.mutable_data_ptr<W>();
  layout.for_each_island([&](const Island& island, int64_t kv_head) {
    const int64_t rows = round_up(island.longest, kTileRows);
    Scratch<W> scratch(2 * rows * columns + rows * width + 3 * width * columns + 2 * width, lse.options());
    const auto keys = scratch.take(rows, columns), values = scratch.take(rows, columns);
    const auto queries = scratch.take(width, columns), queries_t = scratch.take(columns, width);
    const auto scores = scratch.take(rows, width), result = scratch.take(width, columns);
    W *highest = scratch.take(1, width).data, *total = scratch.take(1, width).data;
    for (int64_t s = island.begin; s < island.end; ++s) {
      const Segment& segment = layout.segments[s];
      const auto key_token = [&](int64_t i) { return segment.keys[i]; };
      gather(k + kv_head * d, kv_stride, segment.k_len, d, key_token, W(1), keys);
      gather(v + kv_head * d, kv_stride, segment.k_len, d, key_token, W(1), values);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        segment.for_each_block<W>([&](const Block& block) {
          const int64_t token = segment.token + block.first;
          gather(q + head * d, q_stride, block.size, d, [&](int64_t i) { return token + i; }, scale, queries);
          transpose(queries, block.size, columns, block.width, queries_t);
          multiply(keys, queries_t, scores, block.rows, block.width, d);
          block.hide(scores);
          exponentials(scores, block.seen, block.width, highest, total);
          multiply(scores.t(), values, result, block.width, columns, block.seen);
          for (int64_t i = 0; i < block.size; ++i) {
            const Vec<T> factor(1 / total[i]);
            T* row = out + (token + i) * q_stride + head * d;
            for_each_vector<T>(
                d, [&](int64_t j, int64_t n) { store<T>(row + j, load(result.row(i) + j) * factor, n); });
            lse_data[head * layout.tokens + token + i] = highest[i] + std::log(total[i]);
          }
        });
      }
    }
  });
}

// Scores become P = e^(score - lse), and d_weights become P (d_weight - mean), the gradient of the scores.
template <typename W>
void softmax_backward(Matrix<W> scores, Matrix<W> d_weights, int64_t rows, int64_t width, const W* lse, const W* mean) {
  for (int64_t j = 0; j < width; j += Vec<W>::size()) {
    const Vec<W> log_total = load(lse + j), center = load(mean + j);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<W> p = exp<W>(load(scores.row(i) + j) - log_total);
      p.store(scores.row(i) + j);
      (p * (load(d_weights.row(i) + j) - center)).store(d_weights.row(i) + j);
    }
  }
}

template <typename T>
void backward(const Layout& layout, const T* grad, const T* q, const T* k, const T* v, const T* out,
              const at::Tensor& lse, T* d_q, Wide<T>* d_k, Wide<T>* d_v) {
  using W = Wide<T>;
  constexpr int64_t width = 2 * Vec<T>::size();
  const int64_t d = layout.head_dim, columns = round_up(d, Vec<T>::size()), group = layout.heads / layout.kv_heads;
  const int64_t q_stride = layout.heads * d, kv_stride = layout.kv_heads * d;
  const W scale = 1 / std::sqrt(W(d));
  const W* lse_data = lse.const_data_ptr<W>();
  layout.for_each_island([&](const Island& island, int64_t kv_head) {
    const int64_t rows = round_up(island.longest, kTileRows);
    Scratch<W> scratch(4 * rows * columns + 2 * rows * width + 5 * width * columns + 2 * width, lse.options());
    const auto keys = scratch.take(rows, columns), values = scratch.take(rows, columns);
    const auto d_keys = scratch.take(rows, columns), d_values = scratch.take(rows, columns);
    const auto scores = scratch.take(rows, width), d_scores = scratch.take(rows, width);
    const auto queries = scratch.take(width, columns), queries_t = scratch.take(columns, width);
    const auto grads = scratch.take(width, columns), grads_t = scratch.take(columns, width);
    const auto d_queries = scratch.take(width, columns);
    W *log_total = scratch.take(1, width).data, *mean = scratch.take(1, width).data;
    for (int64_t s = island.begin; s < island.end; ++s) {
      const Segment& segment = layout.segments[s];
      const auto key_token = [&](int64_t i) { return segment.keys[i]; };
      gather(k + kv_head * d, kv_stride, segment.k_len, d, key_token, W(1), keys);
      gather(v + kv_head * d, kv_stride, segment.k_len, d, key_token, W(1), values);
      std::fill_n(d_keys.data, rows * columns, W(0));
      std::fill_n(d_values.data, rows * columns, W(0));
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        segment.for_each_block<W>([&](const Block& block) {
          const int64_t token = segment.token + block.first;
          const auto query_token = [&](int64_t i) { return token + i; };
          gather(q + head * d, q_stride, block.size, d, query_token, scale, queries);
          gather(grad + head * d, q_stride, block.size, d, query_token, W(1), grads);
          transpose(queries, block.size, columns, block.width, queries_t);
          transpose(grads, block.size, columns, block.width, grads_t);
          std::fill_n(log_total, block.width, W(0));
          std::fill_n(mean, block.width, W(0));
          for (int64_t i = 0; i < block.size; ++i) {
            const T* result = out + (token + i) * q_stride + head * d;
            mean[i] = sum<T>(d, [&](int64_t j, int64_t n) { return load(result + j, n) * load(grads.row(i) + j); });
            log_total[i] = lse_data[head * layout.tokens + token + i];
          }
          multiply(keys, queries_t, scores, block.rows, block.width, d);
          multiply(values, grads_t, d_scores, block.rows, block.width, d);
          block.hide(scores);
          softmax_backward(scores, d_scores, block.rows, block.width, log_total, mean);
          multiply<true>(scores, grads, d_values, block.rows, columns, block.size);
          multiply<true>(d_scores, queries, d_keys, block.rows, columns, block.size);
          multiply(d_scores.t(), keys, d_queries, block.width, columns, block.seen);
          const Vec<T> factor(scale);
          for (int64_t i = 0; i < block.size; ++i) {
            T* row = d_q + (token + i) * q_stride + head * d;
            for_each_vector<T>(
                d, [&](int64_t j, int64_t n) { store<T>(row + j, load(d_queries.row(i) + j) * factor, n); });
          }
        });
      }
      for (int64_t i = 0; i < segment.k_len; ++i) {
        const int64_t at = key_token(i) * kv_stride + kv_head * d;
        for_each_vector<W>(d, [&](int64_t j, int64_t n) {
          store<W>(d_k + at + j, load(d_k + at + j, n) + load(d_keys.row(i) + j), n);
          store<W>(d_v + at + j, load(d_v + at + j, n) + load(d_values.row(i) + j), n);
        });
      }
    }
  });
}

at::TensorOptions wide_options(const at::Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> varlen_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& cu_q, const at::Tensor& cu_k,
                                                    const at::Tensor& key_index) {
  const Layout layout(q, k, cu_q, cu_k, key_index);
  at::Tensor out = at::empty_like(q), lse = at::empty({layout.heads, layout.tokens}, wide_options(q));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "varlen_attention", [&] {
    forward(layout, q.const_data_ptr<scalar_t>(), k.const_data_ptr<scalar_t>(), v.const_data_ptr<scalar_t>(),
            out.mutable_data_ptr<scalar_t>(), lse);
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_q, const at::Tensor& cu_k, const at::Tensor& key_index) {
  const Layout layout(q, k, cu_q, cu_k, key_index);
  at::Tensor d_q = at::empty_like(q), d_k = at::zeros(k.sizes(), lse.options()), d_v = at::zeros_like(d_k);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "varlen_attention_backward", [&] {
    using W = Wide<scalar_t>;
    backward(layout, grad.const_data_ptr<scalar_t>(), q.const_data_ptr<scalar_t>(), k.const_data_ptr<scalar_t>(),
             v.const_data_ptr<scalar_t>(), out.const_data_ptr<scalar_t>(), lse, d_q.mutable_data_ptr<scalar_t>(),
             d_k.mutable_data_ptr<W>(), d_v.mutable_data_ptr<W>());
  });
  return {d_q, d_k.to(k.scalar_type()), d_v.to(v.scalar_type())};
}

}  // namespace srlm

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("varlen_attention", &srlm::varlen_attention);
  m.impl("varlen_attention_backward", &srlm::varlen_attention_backward);
}
