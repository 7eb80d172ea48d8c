// x W^T for weights that are packed once and used many times, in fp32: what an engine multiplies with at every step.
//
// An element of the result is one chain of fused multiply-adds over the inner dimension in order, so it depends neither
// on the number of rows nor on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "vec.h"

namespace srlm {

constexpr int64_t kPanel = 2 * Vec<float>::size();  // columns of a panel: two registers

inline int64_t panel_columns(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// weight [out, in] fp32 -> panels [ceil(out / kPanel), in, kPanel]; columns that are missing in the last one are zero.
at::Tensor pack_panels(const at::Tensor& weight);

// y [rows, panel_columns(out)] = x [rows, in] W^T. Rows of x and y are dense and ldx and ldy apart.
void multiply_panels(const float* x, int64_t ldx, int64_t rows, const float* panels, int64_t in, int64_t out, float* y,
                     int64_t ldy);

}  // namespace srlm
