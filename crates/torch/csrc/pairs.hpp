// Products with pairs of panels, by vectors of sixteen floats where the processor has them: half the
// instructions of one panel at a time by vectors of eight, and the same sums in the same order.
#pragma once

#include "panels.hpp"

namespace duet {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

constexpr int64_t WIDE = 2 * LANES;
constexpr int64_t PAIR_ROWS = 8;
typedef float Wides __attribute__((vector_size(64)));
#define DUET_WIDE __attribute__((target("arch=x86-64-v4")))

// Three vectors of each row: sixteen columns of the left panel, eight of each, sixteen of the right.
template <int rows>
__attribute__((always_inline)) DUET_WIDE static inline void pair_tile(const float* x, int64_t in,
                                                                      const float* panel,
                                                                      const float* bias, float* left,
                                                                      float* right, int64_t stride) {
  Wides sums[rows][3];
  for (int part = 0; part < 3; ++part) {
    Wides start{};
    if (bias != nullptr) std::memcpy(&start, bias + part * WIDE, sizeof(start));
    for (int row = 0; row < rows; ++row) sums[row][part] = start;
  }
  const float* other = panel + in * WIDTH;
  for (int64_t k = 0; k < in; ++k) {
    Wides w0, w1, w2;
    Floats low, high;
    std::memcpy(&w0, panel + k * WIDTH, sizeof(w0));
    std::memcpy(&low, panel + k * WIDTH + WIDE, sizeof(low));
    std::memcpy(&high, other + k * WIDTH, sizeof(high));
    std::memcpy(&w2, other + k * WIDTH + LANES, sizeof(w2));
    w1 = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int row = 0; row < rows; ++row) {
      const float factor = x[row * in + k];
      sums[row][0] += factor * w0;
      sums[row][1] += factor * w1;
      sums[row][2] += factor * w2;
    }
  }
  for (int row = 0; row < rows; ++row) {
    // By shuffles: what has its address taken would not stay in a register.
    const Wides middle = sums[row][1];
    const Floats low = __builtin_shufflevector(middle, middle, 0, 1, 2, 3, 4, 5, 6, 7);
    const Floats high = __builtin_shufflevector(middle, middle, 8, 9, 10, 11, 12, 13, 14, 15);
    std::memcpy(left + row * stride, &sums[row][0], sizeof(Wides));
    std::memcpy(left + row * stride + WIDE, &low, sizeof(Floats));
    std::memcpy(right + row * stride, &high, sizeof(Floats));
    std::memcpy(right + row * stride + LANES, &sums[row][2], sizeof(Wides));
  }
}

DUET_WIDE static void multiply_wide(const float* x, int64_t n, int64_t in, const float* panel,
                                    const float* bias, float* left, float* right, int64_t stride) {
  int64_t row = 0;
  const auto here = [&](float* side) { return side + row * stride; };
  for (; row + PAIR_ROWS <= n; row += PAIR_ROWS)
    pair_tile<PAIR_ROWS>(x + row * in, in, panel, bias, here(left), here(right), stride);
  for (; row + 4 <= n; row += 4)
    pair_tile<4>(x + row * in, in, panel, bias, here(left), here(right), stride);
  for (; row < n; ++row)
    pair_tile<1>(x + row * in, in, panel, bias, here(left), here(right), stride);
}

static bool has_wide() {
  static const bool has = __builtin_cpu_supports("x86-64-v4");
  return has;
}

#endif

// [n, in] times two panels that follow each other: [n, WIDTH] each, rows `stride` apart.
static inline void multiply_pair(const float* x, int64_t n, int64_t in, const float* panel,
                                 const float* bias, float* left, float* right, int64_t stride) {
#ifdef DUET_WIDE
  if (has_wide()) return multiply_wide(x, n, in, panel, bias, left, right, stride);
#endif
  multiply(x, n, in, panel, bias, left, stride);
  multiply(x, n, in, panel + in * WIDTH, bias == nullptr ? bias : bias + WIDTH, right, stride);
}

}  // namespace duet
