// GELU with the tanh formula, fp32 on the CPU, in one pass forward and one backward. libtorch's takes a
// tanh of its own for each element; here it is the sigmoid it amounts to, with one exponential:
// (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)).

#include <algorithm>
#include <cstring>

#include <torch/csrc/autograd/custom_function.h>

#include <ATen/Parallel.h>

#include "duet_torch.h"
#include "error.hpp"
#include "simd.hpp"

namespace duet {

constexpr float SLOPE = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float CUBE = 0.044715f;
// Elements that are worth a thread.
constexpr int64_t GRAIN = 1 << 14;

// exp(-2 u)
DUET_INLINE Floats falling(Floats x) { return exponential(-SLOPE * (x + CUBE * x * x * x)); }

DUET_INLINE Floats gelu_of(Floats x) { return x * (1.0f / (1.0f + falling(x))); }

DUET_INLINE Floats slope_of(Floats x) {
  const Floats e = falling(x);
  const Floats s = 1.0f / (1.0f + e);
  // 1 - s without its cancellation: e s.
  return s + x * s * (e * s) * (SLOPE * (1.0f + 3.0f * CUBE * x * x));
}

DUET_KERNEL void gelu(const float* x, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(y + i, gelu_of(load(x + i)));
  if (i < count) {
    float rest[LANES] = {};
    std::memcpy(rest, x + i, (count - i) * sizeof(float));
    store(rest, gelu_of(load(rest)));
    std::memcpy(y + i, rest, (count - i) * sizeof(float));
  }
}

DUET_KERNEL void gelu_back(const float* x, const float* grad, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(out + i, load(grad + i) * slope_of(load(x + i)));
  if (i < count) {
    float rest[LANES] = {};
    std::memcpy(rest, x + i, (count - i) * sizeof(float));
    store(rest, slope_of(load(rest)));
    for (int64_t k = i; k < count; ++k) out[k] = grad[k] * rest[k - i];
  }
}

// Pieces begin at whole vectors, so an element is computed the same however many threads there are.
template <typename F>
void in_pieces(int64_t count, const F& f) {
  const int64_t vectors = (count + LANES - 1) / LANES;
  at::parallel_for(0, vectors, GRAIN / LANES, [&](int64_t begin, int64_t end) {
    f(begin * LANES, std::min(end * LANES, count) - begin * LANES);
  });
}

at::Tensor gelu_forward(const at::Tensor& x) {
  auto y = at::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  in_pieces(x.numel(), [&](int64_t at, int64_t count) { gelu(from + at, to + at, count); });
  return y;
}

struct Gelu : torch::autograd::Function<Gelu> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
    ctx->save_for_backward({x});
    return gelu_forward(x);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto x = ctx->get_saved_variables()[0];
    const auto grad = grads[0].contiguous();
    auto out = at::empty_like(x);
    const float* from = x.const_data_ptr<float>();
    const float* by = grad.const_data_ptr<float>();
    float* to = out.mutable_data_ptr<float>();
    in_pieces(x.numel(), [&](int64_t at, int64_t count) {
      gelu_back(from + at, by + at, to + at, count);
    });
    return {out};
  }
};

}  // namespace duet

extern "C" DuetTensor duet_gelu(DuetTensor x_) {
  return duet::guarded(DuetTensor(nullptr), [&]() -> DuetTensor {
    const auto& x = *static_cast<const at::Tensor*>(x_);
    const bool plain = x.device().is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous();
    if (!plain) return new at::Tensor(at::gelu(x, "tanh"));
    if (at::GradMode::is_enabled() && x.requires_grad()) {
      return new at::Tensor(duet::Gelu::apply(x));
    }
    return new at::Tensor(duet::gelu_forward(x.detach()));
  });
}
