// The srlm operators as torch.ops.srlm.*; the algorithms are in files of their own.
#include <torch/library.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <stdexcept>

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

}  // namespace

TORCH_LIBRARY(srlm, m) { m.def("first_fit_decreasing(Tensor lengths, int budget) -> Tensor"); }

TORCH_LIBRARY_IMPL(srlm, CPU, m) { m.impl("first_fit_decreasing", &first_fit_decreasing); }
