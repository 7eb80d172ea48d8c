// What products of matrices by oneDNN's block kernels share: packing, transposing, tasks. For blocked_products.cpp and
// tiled_softmax.cpp; everything is for factors of float or bfloat16.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>

#include <algorithm>
#include <memory>

#include "vec.h"

namespace srlm::blocked {

inline constexpr int64_t kTile = 64;  // columns of a packed factor: four registers of sixteen floats

// The 16-bit kernels take the second factor as pairs of rows, interleaved: [K / 2][columns][2].
template <typename T>
inline constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;

template <typename T>
inline constexpr int64_t kTransposed = sizeof(T) == 2 ? 32 : 16;  // side of the blocks that transpose_mxn takes

inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <typename T>
inline int64_t round_to_pairs(int64_t size) { return tiles(size, kPair<T>) * kPair<T>; }

// Work for a task, on a cache line.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Delete> data_;
};

// C = A B, or C += A B, for A [m, k] and a packed B [k, n] of kTile columns; k is even for 16-bit dtypes.
template <typename T>
inline void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, int64_t ldc,
                    bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, kTile, ldc, add, a, b, c, kPair<T> == 2);
}

// body(task) for every task; the kernels' state of a thread goes with it.
template <typename T, typename Body>
inline void for_each_task(int64_t tasks, const Body& body) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
    at::native::cpublas::brgemm_release(kPair<T> == 2);
  });
}

// out[c][r] = in[r][c]
template <typename T>
inline void transpose(const T* in, int64_t ld_in, int64_t rows, int64_t cols, T* out, int64_t ld_out) {
  constexpr int64_t side = kTransposed<T>;
  for (int64_t c = 0; c < cols; c += side) {
    for (int64_t r = 0; r < rows; r += side) {
      at::vec::transpose_mxn<T>(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out,
                                static_cast<int>(std::min(side, rows - r)), static_cast<int>(std::min(side, cols - c)));
    }
  }
}

// Packs [k, cols] as it lies; an odd last row gets a partner of zeros.
template <typename T>
inline void pack(const T* in, int64_t ld, int64_t k, int64_t cols, T* out) {
  if constexpr (kPair<T> == 1) {
    for (int64_t i = 0; i < k; ++i) std::copy_n(in + i * ld, cols, out + i * kTile);
  } else {
    // As integers, which the compiler makes vectors of.
    static constexpr uint16_t zeros[kTile] = {};
    for (int64_t i = 0; i < k; i += 2) {
      const auto* const row = reinterpret_cast<const uint16_t*>(in + i * ld);
      const uint16_t* const next = i + 1 < k ? row + ld : zeros;
      auto* const pairs = reinterpret_cast<uint32_t*>(out + i * kTile);
      for (int64_t c = 0; c < cols; ++c) pairs[c] = row[c] | static_cast<uint32_t>(next[c]) << 16;
    }
  }
}

// Packs the transpose of [cols, k], whose rows begin on pairs.
template <typename T>
inline void pack_transposed(const T* in, int64_t ld, int64_t cols, int64_t k, T* out) {
  // A pair is a float to these moves.
  transpose<float>(reinterpret_cast<const float*>(in), ld / kPair<T>, cols, k / kPair<T>, reinterpret_cast<float*>(out),
                   kTile);
}

// The matrix with an even number of columns in even distances, for a dtype that is multiplied in pairs.
template <typename T>
inline at::Tensor whole_pairs(const at::Tensor& x) {
  const int64_t missing = round_to_pairs<T>(x.size(1)) - x.size(1);
  return missing || x.stride(0) % kPair<T> ? at::constant_pad_nd(x, {0, missing}).contiguous() : x;
}

}  // namespace srlm::blocked
