// The srlm operators as torch.ops.srlm.*; the algorithms are in files of their own.
#include <torch/library.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "decode_attention.h"
#include "first_fit_decreasing.h"

namespace {

at::Tensor first_fit_decreasing(const at::Tensor& lengths, int64_t budget) {
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.scalar_type() == at::kLong,
                    "first_fit_decreasing: lengths must be int64 [n], got ", lengths.scalar_type(), " with ",
                    lengths.dim(), " dimensions");
  const at::Tensor contiguous = lengths.contiguous();
  at::Tensor out = at::empty_like(contiguous);
  try {
    const auto bins = srlm::first_fit_decreasing(contiguous.const_data_ptr<int64_t>(), contiguous.numel(), budget);
    std::copy(bins.begin(), bins.end(), out.mutable_data_ptr<int64_t>());
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
  return out;
}

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& k_cache,
                            at::Tensor& v_cache, const at::Tensor& positions) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && k_cache.dim() == 4 && positions.dim() == 1,
                    "decode_attention: q, k, v [n, heads, head_dim], caches [n, heads, L, head_dim], positions [n]");
  const int64_t rows = q.size(0), head_dim = q.size(2), heads = k.size(1), queries = heads ? q.size(1) / heads : 0;
  const int64_t capacity = k_cache.size(2);
  TORCH_CHECK_VALUE(q.size(1) == queries * heads && k.sizes() == v.sizes() && k_cache.sizes() == v_cache.sizes() &&
                        k.sizes() == at::IntArrayRef({rows, heads, head_dim}) &&
                        k_cache.sizes() == at::IntArrayRef({rows, heads, capacity, head_dim}) &&
                        positions.numel() == rows,
                    "decode_attention: shapes do not fit together: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
                    ", k_cache ", k_cache.sizes(), ", v_cache ", v_cache.sizes(), ", positions ", positions.sizes());
  TORCH_CHECK_VALUE(head_dim % srlm::kHeadDimMultiple == 0, "decode_attention: head_dim ", head_dim,
                    " is no multiple of ", srlm::kHeadDimMultiple);
  for (const at::Tensor& x : {q, k, v, k_cache, v_cache}) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.stride(-1) == 1, "decode_attention: fp32, dense heads only");
  }
  TORCH_CHECK_VALUE(k_cache.strides() == v_cache.strides(), "decode_attention: the caches differ in strides");
  const at::Tensor q_dense = q.contiguous(), k_dense = k.contiguous(), v_dense = v.contiguous();
  const at::Tensor at_position = positions.contiguous();
  const int64_t* position = at_position.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    TORCH_CHECK_VALUE(position[row] >= 0 && position[row] < capacity, "decode_attention: position ", position[row],
                      " of row ", row, " is outside the cache of ", capacity);
  }

  at::Tensor out = at::empty_like(q_dense);
  const float *q_data = q_dense.const_data_ptr<float>(), *k_data = k_dense.const_data_ptr<float>(),
              *v_data = v_dense.const_data_ptr<float>();
  float *k_store = k_cache.mutable_data_ptr<float>(), *v_store = v_cache.mutable_data_ptr<float>(),
        *out_data = out.mutable_data_ptr<float>();
  const int64_t row_stride = k_cache.stride(0), head_stride = k_cache.stride(1), stride = k_cache.stride(2);
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  at::parallel_for(0, rows * heads, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(capacity);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / heads, length = position[row] + 1;
      const int64_t cache = row * row_stride + (i % heads) * head_stride, last = cache + position[row] * stride;
      std::copy_n(k_data + i * head_dim, head_dim, k_store + last);
      std::copy_n(v_data + i * head_dim, head_dim, v_store + last);
      const int64_t query = i * queries * head_dim;
      srlm::decode_attention(q_data + query, k_store + cache, v_store + cache, queries, length, head_dim, stride, scale,
                             scores.data(), out_data + query);
    }
  });
  return out;
}

}  // namespace

// The operators without a counterpart in kernels/ have their schemas here; those of the others are in kernels/.
TORCH_LIBRARY_FRAGMENT(srlm, m) {
  m.def("first_fit_decreasing(Tensor lengths, int budget) -> Tensor");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("first_fit_decreasing", &first_fit_decreasing);
  m.impl("decode_attention", &decode_attention);
}
