#include "panels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <utility>

namespace srlm {
namespace {

using Lanes = Vec<float>;
constexpr int kVectors = 2;
constexpr int kTileRows = Lanes::size() == 16 ? 12 : 6;  // as many sums as the registers can hold
constexpr int64_t kCachedFloats = 1 << 17;  // of x: the rows that meet a panel stay in the second cache
constexpr int64_t kProductsPerTask = 1 << 20;

template <int kRows>
void tile(const float* x, int64_t ldx, const float* panel, int64_t in, float* y, int64_t ldy) {
  Lanes sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Lanes(0);
  }
  for (int64_t p = 0; p < in; ++p) {
    const Lanes first = Lanes::loadu(panel + p * kPanel), second = Lanes::loadu(panel + p * kPanel + Lanes::size());
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Lanes left(x[i * ldx + p]);
      sums[i][0] = at::vec::fmadd(left, first, sums[i][0]);
      sums[i][1] = at::vec::fmadd(left, second, sums[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sums[i][j].store(y + i * ldy + j * Lanes::size());
  }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t);

template <int... kRows>
constexpr std::array<Tile, sizeof...(kRows)> tiles_of(std::integer_sequence<int, kRows...>) {
  return {tile<kRows + 1>...};
}

constexpr auto kTiles = tiles_of(std::make_integer_sequence<int, kTileRows>());

}  // namespace

at::Tensor pack_panels(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.scalar_type() == at::kFloat, "pack_panels: weight must be fp32 [out, in]");
  const int64_t out = weight.size(0), in = weight.size(1), panels = panel_columns(out) / kPanel;
  const at::Tensor dense = weight.contiguous();
  at::Tensor packed = at::zeros({panels, in, kPanel}, weight.options());
  const float* const from = dense.const_data_ptr<float>();
  float* const to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t columns = std::min(kPanel, out - panel * kPanel);
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t p = 0; p < in; ++p) to[(panel * in + p) * kPanel + c] = from[(panel * kPanel + c) * in + p];
      }
    }
  });
  return packed;
}

void multiply_panels(const float* x, int64_t ldx, int64_t rows, const float* panels, int64_t in, int64_t out, float* y,
                     int64_t ldy) {
  const int64_t n_panels = panel_columns(out) / kPanel;
  const int64_t chunk = std::max<int64_t>(1, kCachedFloats / std::max<int64_t>(in, 1) / kTileRows) * kTileRows;
  for (int64_t start = 0; start < rows; start += chunk) {
    const int64_t end = std::min(rows, start + chunk);
    const int64_t panels_per_task = std::max<int64_t>(1, kProductsPerTask / ((end - start) * in * kPanel + 1));
    at::parallel_for(0, n_panels, panels_per_task, [&](int64_t first, int64_t past) {
      for (int64_t panel = first; panel < past; ++panel) {
        for (int64_t row = start; row < end; row += kTileRows) {
          const int64_t n = std::min<int64_t>(kTileRows, end - row);
          kTiles[n - 1](x + row * ldx, ldx, panels + panel * in * kPanel, in, y + row * ldy + panel * kPanel, ldy);
        }
      }
    });
  }
}

}  // namespace srlm
