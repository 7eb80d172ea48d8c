#include "blocked_products.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>

#include "blocks.h"

namespace srlm::blocked {
namespace {

#ifdef CPU_CAPABILITY_AVX512
constexpr bool kAvx512 = true;
#else
constexpr bool kAvx512 = false;
#endif

constexpr int64_t kVocabTile = 128;   // rows of W's gradient made at a time
constexpr int64_t kVocabBlock = 256;  // of the vocabulary summed over at a time: a packed tile of them stays in cache
constexpr int64_t kVocabSlices = 8;   // of the vocabulary with a sum of their own, added up in this order
constexpr int64_t kRowBlock = 512;    // rows of x or U at a time: fewer would not pay for the packing
constexpr int64_t kNarrow = 4096;     // of the vocabulary, of which a packed tile stays in the cache whole

template <typename T>
void multiply_transposed_(const at::Tensor& x, const at::Tensor& w, at::Tensor& out) {
  const at::Tensor x_pairs = whole_pairs<T>(x), w_pairs = whole_pairs<T>(w);
  const int64_t rows = x.size(0), vocab = w.size(0), k = x_pairs.size(1);
  const int64_t ldx = x_pairs.stride(0), ldw = w_pairs.stride(0), ldz = out.stride(0);
  const T *x_data = x_pairs.const_data_ptr<T>(), *w_data = w_pairs.const_data_ptr<T>();
  float* const z = out.mutable_data_ptr<float>();
  for_each_task<T>(tiles(vocab, kTile), [&](int64_t tile) {
    const int64_t v = tile * kTile, cols = std::min(kTile, vocab - v);
    const Scratch<T> packed(k * kTile);
    pack_transposed(w_data + v * ldw, ldw, cols, k, packed.get());
    product(rows, cols, k, x_data, ldx, packed.get(), z + v, ldz, false);
  });
}

// `multiply_` without scale for a narrow u with an even number of columns: no partial sums, a task is a tile of w.
template <typename T>
void multiply_narrow(const at::Tensor& u, const at::Tensor& w, at::Tensor& out) {
  const int64_t rows = u.size(0), k = w.size(0), dim = w.size(1), ldu = u.stride(0), ld_out = out.stride(0);
  const T *u_data = u.const_data_ptr<T>(), *w_data = w.const_data_ptr<T>();
  T* const dx = out.mutable_data_ptr<T>();
  for_each_task<T>(tiles(dim, kTile), [&](int64_t tile) {
    const int64_t d = tile * kTile, cols = std::min(kTile, dim - d);
    const Scratch<T> packed(k * kTile);
    pack(w_data + d, dim, k, cols, packed.get());
    if constexpr (std::is_same_v<T, float>) {
      product(rows, cols, k, u_data, ldu, packed.get(), dx + d, ld_out, false);
    } else {
      const Scratch<float> sums(kRowBlock * kTile);
      for (int64_t start = 0; start < rows; start += kRowBlock) {
        const int64_t size = std::min(kRowBlock, rows - start);
        product(size, cols, k, u_data + start * ldu, ldu, packed.get(), sums.get(), kTile, false);
        for (int64_t r = 0; r < size; ++r) {
          for_each_vector<T>(cols, [&](int64_t i, int64_t n) {
            store<T>(dx + (start + r) * ld_out + d + i, load(sums.get() + r * kTile + i, n), n);
          });
        }
      }
    }
  });
}

template <typename T>
void multiply_(const at::Tensor& u, const at::Tensor& w, const at::Tensor& scale, at::Tensor& out) {
  const int64_t vocab = w.size(0), dim = w.size(1), ldu = u.stride(0);
  if (vocab <= kNarrow && vocab % kPair<T> == 0 && !scale.defined()) return multiply_narrow<T>(u, w, out);
  // The last column of an odd vocabulary has no partner in memory.
  const int64_t whole = vocab / kPair<T> * kPair<T>;
  const at::Tensor last = whole < vocab ? whole_pairs<T>(u.narrow(1, whole, vocab - whole)) : at::Tensor();
  const int64_t slice_size = tiles(tiles(vocab, kVocabSlices), kVocabBlock) * kVocabBlock;
  const int64_t slices = tiles(vocab, slice_size), most_rows = std::min(kRowBlock, u.size(0));
  const at::Tensor partial = at::empty({slices, most_rows, dim}, u.options().dtype(at::kFloat));
  float* const sums = partial.mutable_data_ptr<float>();
  const T *u_data = u.const_data_ptr<T>(), *w_data = w.const_data_ptr<T>();
  T* const dx = out.mutable_data_ptr<T>();
  const int64_t ld_out = out.stride(0);
  for (int64_t start = 0; start < u.size(0); start += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, u.size(0) - start);
    for_each_task<T>(slices, [&](int64_t slice) {
      const Scratch<T> packed(kVocabBlock * kTile);
      float* const c = sums + slice * most_rows * dim;
      const int64_t begin = slice * slice_size, end = std::min(vocab, begin + slice_size);
      for (int64_t v = begin; v < end; v += kVocabBlock) {
        const int64_t k = std::min(kVocabBlock, end - v), pairs = k / kPair<T> * kPair<T>;
        for (int64_t d = 0; d < dim; d += kTile) {
          const int64_t cols = std::min(kTile, dim - d);
          pack(w_data + v * dim + d, dim, k, cols, packed.get());
          if (pairs) product(rows, cols, pairs, u_data + start * ldu + v, ldu, packed.get(), c + d, dim, v > begin);
          if (pairs < k) {
            product(rows, cols, kPair<T>, last.const_data_ptr<T>() + start * kPair<T>, kPair<T>,
                    packed.get() + pairs * kTile, c + d, dim, v > begin || pairs > 0);
          }
        }
      }
    });
    const float* const scales = scale.defined() ? scale.const_data_ptr<float>() + start : nullptr;
    at::parallel_for(0, rows, 16, [&](int64_t first, int64_t past) {
      for (int64_t r = first; r < past; ++r) {
        const Vec<T> factor(scales ? scales[r] : 1);
        for_each_vector<T>(dim, [&](int64_t i, int64_t n) {
          Vec<T> sum = load(sums + r * dim + i, n);
          for (int64_t slice = 1; slice < slices; ++slice) sum += load(sums + (slice * most_rows + r) * dim + i, n);
          store<T>(dx + (start + r) * ld_out + i, sum * factor, n);
        });
      }
    });
  }
}

template <typename T>
void transposed_product_(const at::Tensor& u, const at::Tensor& x, at::Tensor& out, bool add) {
  // Rows of the transposed block do not lie powers of two apart, where they would share few places in the cache.
  constexpr int64_t ldt = kRowBlock + 32;
  const int64_t rows = u.size(0), vocab = u.size(1), dim = x.size(1), ldu = u.stride(0), ldx = x.stride(0);
  const int64_t k_all = round_to_pairs<T>(rows), d_tiles = tiles(dim, kTile);
  const at::Tensor x_packed = at::empty({d_tiles, k_all, kTile}, x.options());
  const T *u_data = u.const_data_ptr<T>(), *x_data = x.const_data_ptr<T>();
  T* const packed = x_packed.mutable_data_ptr<T>();
  float* const dw = out.mutable_data_ptr<float>();
  for_each_task<T>(d_tiles, [&](int64_t tile) {
    pack(x_data + tile * kTile, ldx, rows, std::min(kTile, dim - tile * kTile), packed + tile * k_all * kTile);
  });
  for_each_task<T>(tiles(vocab, kVocabTile), [&](int64_t tile) {
    const int64_t v = tile * kVocabTile, m = std::min(kVocabTile, vocab - v);
    const Scratch<T> transposed(kVocabTile * ldt);
    for (int64_t r = 0; r < rows; r += kRowBlock) {
      const int64_t size = std::min(kRowBlock, rows - r), k = round_to_pairs<T>(size);
      transpose(u_data + r * ldu + v, ldu, size, m, transposed.get(), ldt);
      if (size < k) {
        for (int64_t i = 0; i < m; ++i) transposed.get()[i * ldt + size] = 0;
      }
      for (int64_t d = 0; d < d_tiles; ++d) {
        product(m, std::min(kTile, dim - d * kTile), k, transposed.get(), ldt, packed + (d * k_all + r) * kTile,
                dw + v * dim + d * kTile, dim, add || r > 0);
      }
    }
  });
}

// Whether the kernel for T runs here; the 16-bit ones are refused where oneDNN lacks them.
template <typename T>
bool runs() {
  T a[4] = {1, 2, 3, 4}, b[2 * kTile];
  float c[4] = {};
  std::fill_n(b, 2 * kTile, T(1));
  try {
    product<T>(2, 1, 2, a, 2, b, c, 1, false);
    at::native::cpublas::brgemm_release(kPair<T> == 2);
  } catch (const c10::Error&) {
    return false;
  }
  return c[0] == 3 && c[1] == 7;
}

}  // namespace

bool available(at::ScalarType dtype) {
  static const bool with_float = kAvx512 && runs<float>(), with_bfloat16 = kAvx512 && runs<at::BFloat16>();
  return (dtype == at::kFloat && with_float) || (dtype == at::kBFloat16 && with_bfloat16);
}

void multiply_transposed(const at::Tensor& x, const at::Tensor& w, at::Tensor& out) {
  (x.scalar_type() == at::kFloat ? multiply_transposed_<float> : multiply_transposed_<at::BFloat16>)(x, w, out);
}

void multiply(const at::Tensor& u, const at::Tensor& w, const at::Tensor& scale, at::Tensor& out) {
  (u.scalar_type() == at::kFloat ? multiply_<float> : multiply_<at::BFloat16>)(u, w, scale, out);
}

void transposed_product(const at::Tensor& u, const at::Tensor& x, at::Tensor& out, bool add) {
  (u.scalar_type() == at::kFloat ? transposed_product_<float> : transposed_product_<at::BFloat16>)(u, x, out, add);
}

}  // namespace srlm::blocked
