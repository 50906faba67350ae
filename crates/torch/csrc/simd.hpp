// Eight floats at a time, in the compiler's own vector types: no intrinsics, so that the same code
// compiles for every processor. On x86-64 each kernel is compiled several times and the widest form
// that the processor has is picked when the library is loaded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DUET_KERNEL __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define DUET_KERNEL
#endif
#define DUET_INLINE static inline __attribute__((always_inline))

// The vectors never cross a call: everything that takes one is inlined into a kernel, so the
// compiler's note on how they would be passed (-Wpsabi) is of no interest.

namespace duet {

constexpr int64_t LANES = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

DUET_INLINE Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

DUET_INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

// The addition is one instruction and a broadcast; GCC makes eight insertions of every other way to say it
// in a function that is compiled for several processors.
DUET_INLINE Floats spread(float x) { return Floats{} + x; }

DUET_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

DUET_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

// The sum of all lanes, always in the same order.
DUET_INLINE float sum(Floats x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

DUET_INLINE float largest(Floats x) {
  float out = x[0];
  for (int lane = 1; lane < LANES; ++lane) out = x[lane] > out ? x[lane] : out;
  return out;
}

// exp(x) to about one unit in the last place between -87 and 88, clamped outside: x = n ln 2 + r,
// exp(r) by the polynomial of Cephes' expf.
DUET_INLINE Floats exponential(Floats x) {
  x = maximum(minimum(x, spread(88.0f)), spread(-87.0f));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number.
  const Floats n = (x * 1.44269504f + magic) - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

}  // namespace duet
