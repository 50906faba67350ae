// Products with a weight that lies in panels of WIDTH columns, each [in, WIDTH]. Every element is summed
// in one order, whatever the other rows are.
#pragma once

#include "simd.hpp"

namespace duet {

// Columns of a panel: three vectors, so that four rows fill the registers with sums.
constexpr int64_t WIDTH = 3 * LANES;
constexpr int64_t ROWS = 4;

template <int rows>
DUET_INLINE void tile(const float* x, int64_t in, const float* panel, const float* bias, float* y,
                      int64_t stride) {
  Floats sums[rows][3];
  for (int part = 0; part < 3; ++part) {
    const Floats start = bias == nullptr ? Floats{} : load(bias + part * LANES);
    for (int row = 0; row < rows; ++row) sums[row][part] = start;
  }
  for (int64_t k = 0; k < in; ++k) {
    const float* w = panel + k * WIDTH;
    const Floats w0 = load(w), w1 = load(w + LANES), w2 = load(w + 2 * LANES);
    for (int row = 0; row < rows; ++row) {
      const Floats factor = spread(x[row * in + k]);
      sums[row][0] += factor * w0;
      sums[row][1] += factor * w1;
      sums[row][2] += factor * w2;
    }
  }
  for (int row = 0; row < rows; ++row)
    for (int part = 0; part < 3; ++part) store(y + row * stride + part * LANES, sums[row][part]);
}

// [n, in] times one panel: [n, WIDTH], rows `stride` apart.
DUET_KERNEL static void multiply(const float* x, int64_t n, int64_t in, const float* panel,
                                 const float* bias, float* y, int64_t stride) {
  int64_t row = 0;
  for (; row + ROWS <= n; row += ROWS)
    tile<ROWS>(x + row * in, in, panel, bias, y + row * stride, stride);
  const float* rest = x + row * in;
  if (n - row == 3) tile<3>(rest, in, panel, bias, y + row * stride, stride);
  if (n - row == 2) tile<2>(rest, in, panel, bias, y + row * stride, stride);
  if (n - row == 1) tile<1>(rest, in, panel, bias, y + row * stride, stride);
}

}  // namespace duet
