// Operations that libtorch puts together from several passes over memory on the CPU, in one pass
// each, with their gradients: fp32 only. They keep their inputs for the backward pass, nothing else.

#include <algorithm>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "duet_torch.h"
#include "error.hpp"
#include "simd.hpp"

namespace duet {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows of one task, whatever the number of threads: sums over rows are made task by task.
constexpr int64_t TASK = 64;

// (x, y) (cos, sin) as complex numbers, pair by pair, in place; `sign` -1 turns back.
DUET_INLINE void turn(float* x, const float* unit, int64_t width, float sign) {
  for (int64_t i = 0; i < width; i += 2) {
    const float re = x[i], im = x[i + 1], cos = unit[i], sin = sign * unit[i + 1];
    x[i] = re * cos - im * sin;
    x[i + 1] = re * sin + im * cos;
  }
}

DUET_INLINE float inverse_rms(const float* x, int64_t width, float eps) {
  const int64_t whole = width / LANES * LANES;
  Floats squares{};
  for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (int64_t i = whole; i < width; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
}

// Normed rows, rotated where there is a `unit` number for each pair.
DUET_KERNEL void norm_row(const float* x, int64_t width, const float* weight, float eps,
                          const float* unit, float* y) {
  const float scale = inverse_rms(x, width, eps);
  for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * weight[i];
  if (unit != nullptr) turn(y, unit, width, 1.0f);
}

// The gradients of `norm_row`; `gw` is added to. `g` is overwritten.
DUET_KERNEL void norm_row_back(const float* x, int64_t width, const float* weight, float eps,
                               const float* unit, float* g, float* gx, float* gw) {
  const float scale = inverse_rms(x, width, eps);
  if (unit != nullptr) turn(g, unit, width, -1.0f);
  if (gw != nullptr)
    for (int64_t i = 0; i < width; ++i) gw[i] += g[i] * x[i] * scale;
  if (gx == nullptr) return;
  const int64_t whole = width / LANES * LANES;
  Floats products{};
  for (int64_t i = 0; i < whole; i += LANES)
    products += load(g + i) * load(weight + i) * load(x + i);
  float dot = sum(products);
  for (int64_t i = whole; i < width; ++i) dot += g[i] * weight[i] * x[i];
  const float back = scale * scale * scale * dot / static_cast<float>(width);
  for (int64_t i = 0; i < width; ++i) gx[i] = g[i] * weight[i] * scale - x[i] * back;
}

// x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form of GELU, which is
// x (1 + tanh(u)) / 2.
constexpr float ROOT = 0.7978845608028654f;
constexpr float CUBE = 0.044715f;

DUET_KERNEL void gelu(const float* x, int64_t count, float* y) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats v = load(x + i);
    store(y + i, v / (exponential(v * (v * v * CUBE + 1.0f) * (-2.0f * ROOT)) + 1.0f));
  }
  if (i == count) return;
  float rest[LANES] = {};
  std::copy(x + i, x + count, rest);
  const Floats v = load(rest);
  store(rest, v / (exponential(v * (v * v * CUBE + 1.0f) * (-2.0f * ROOT)) + 1.0f));
  std::copy_n(rest, count - i, y + i);
}

DUET_INLINE Floats gelu_slope(Floats v) {
  const Floats share = 1.0f / (exponential(v * (v * v * CUBE + 1.0f) * (-2.0f * ROOT)) + 1.0f);
  const Floats inner = (v * v * (3.0f * CUBE) + 1.0f) * (2.0f * ROOT);
  return share + v * share * (1.0f - share) * inner;
}

DUET_KERNEL void gelu_back(const float* x, const float* g, int64_t count, float* gx) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(gx + i, load(g + i) * gelu_slope(load(x + i)));
  if (i == count) return;
  float rest[LANES] = {};
  std::copy(x + i, x + count, rest);
  store(rest, gelu_slope(load(rest)));
  for (int64_t lane = 0; i + lane < count; ++lane) gx[i + lane] = g[i + lane] * rest[lane];
}

namespace {

void check(const at::Tensor& x, const char* what) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat, what,
              " is not fp32 on the CPU");
}

// Runs `body(task, begin, end)` over tasks of TASK rows.
template <typename F>
void tasks(int64_t rows, const F& body) {
  at::parallel_for(0, (rows + TASK - 1) / TASK, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      body(task, task * TASK, std::min(rows, (task + 1) * TASK));
  });
}

// Where the rows of a part [B, N, H, width] lie in a whole [B, all, H, width], from `start` on.
struct Place {
  int64_t length, heads, width, all, start;

  int64_t joint(int64_t row) const {
    const int64_t head = row % heads, token = row / heads % length, batch = row / heads / length;
    return ((batch * all + start + token) * heads + head) * width;
  }
  int64_t unit(int64_t row) const { return (start + row / heads % length) * width; }
};

// One or two parts [B, N, H, width] to [B, N + N', H, width].
at::Tensor norm_parts(const variable_list& parts, const variable_list& weights,
                      const at::Tensor& units, double eps) {
  int64_t all = 0;
  for (const auto& part : parts) all += part.size(1);
  const auto sizes = parts[0].sizes();
  auto out = at::empty({sizes[0], all, sizes[2], sizes[3]}, parts[0].options());
  int64_t start = 0;
  for (size_t index = 0; index < parts.size(); ++index) {
    const auto& part = parts[index];
    const Place place{part.size(1), sizes[2], sizes[3], all, start};
    const float* x = part.const_data_ptr<float>();
    const float* weight = weights[index].const_data_ptr<float>();
    const float* unit = units.defined() ? units.const_data_ptr<float>() : nullptr;
    float* y = out.data_ptr<float>();
    tasks(part.numel() / place.width, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        norm_row(x + row * place.width, place.width, weight, static_cast<float>(eps),
                 unit == nullptr ? nullptr : unit + place.unit(row), y + place.joint(row));
    });
    start += place.length;
  }
  return out;
}

struct NormParts : torch::autograd::Function<NormParts> {
  // `all`: the parts, then their weights, then the units, which may be undefined.
  static at::Tensor forward(AutogradContext* ctx, at::TensorList all, double eps) {
    const size_t count = all.size() / 2;
    variable_list parts, weights;
    for (size_t i = 0; i < count; ++i) {
      parts.push_back(all[i].contiguous());
      weights.push_back(all[count + i].contiguous());
    }
    const at::Tensor units = all[2 * count];
    auto out = norm_parts(parts, weights, units, eps);
    variable_list saved(parts);
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.push_back(units);
    ctx->save_for_backward(saved);
    ctx->saved_data["eps"] = eps;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto eps = static_cast<float>(ctx->saved_data["eps"].toDouble());
    const size_t count = saved.size() / 2;
    const auto grad = grads[0].contiguous();
    const auto& units = saved[2 * count];
    variable_list out(2 * count + 2);
    int64_t start = 0;
    for (size_t index = 0; index < count; ++index) {
      const auto &part = saved[index], &weight = saved[count + index];
      const Place place{part.size(1), part.size(2), part.size(3), grad.size(1), start};
      const int64_t rows = part.numel() / place.width, width = place.width;
      const bool input = ctx->needs_input_grad(index), scale = ctx->needs_input_grad(count + index);
      if (input) out[index] = at::empty_like(part);
      at::Tensor sums;
      if (scale) sums = at::zeros({(rows + TASK - 1) / TASK, width}, part.options());
      float* gx = input ? out[index].data_ptr<float>() : nullptr;
      float* gw = scale ? sums.data_ptr<float>() : nullptr;
      const float* x = part.const_data_ptr<float>();
      const float* w = weight.const_data_ptr<float>();
      const float* g = grad.const_data_ptr<float>();
      const float* unit = units.defined() ? units.const_data_ptr<float>() : nullptr;
      tasks(rows, [&](int64_t task, int64_t begin, int64_t end) {
        std::vector<float> here(width);
        for (int64_t row = begin; row < end; ++row) {
          std::copy_n(g + place.joint(row), width, here.data());
          norm_row_back(x + row * width, width, w, eps,
                        unit == nullptr ? nullptr : unit + place.unit(row), here.data(),
                        gx == nullptr ? nullptr : gx + row * width,
                        gw == nullptr ? nullptr : gw + task * width);
        }
      });
      if (scale) out[count + index] = sums.sum(0);
      start += place.length;
    }
    return out;
  }
};

at::Tensor gelu_of(const at::Tensor& x) {
  auto out = at::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, x.numel(), 8192, [&](int64_t begin, int64_t end) {
    gelu(from + begin, end - begin, to + begin);
  });
  return out;
}

struct Gelu : torch::autograd::Function<Gelu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_) {
    const auto x = x_.contiguous();
    ctx->save_for_backward({x});
    return gelu_of(x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto x = ctx->get_saved_variables()[0];
    const auto grad = grads[0].contiguous();
    auto out = at::empty_like(x);
    const float *from = x.const_data_ptr<float>(), *g = grad.const_data_ptr<float>();
    float* to = out.data_ptr<float>();
    at::parallel_for(0, x.numel(), 8192, [&](int64_t begin, int64_t end) {
      gelu_back(from + begin, g + begin, end - begin, to + begin);
    });
    return {out};
  }
};

bool records(const variable_list& inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor& x) {
           return x.defined() && x.requires_grad();
         });
}

at::Tensor norm(variable_list parts, variable_list weights, const at::Tensor& units, double eps) {
  for (size_t i = 0; i < parts.size(); ++i) {
    check(parts[i], "the input of a norm");
    check(weights[i], "the weight of a norm");
    TORCH_CHECK(parts[i].dim() == 4 && weights[i].numel() == parts[i].size(3) &&
                    parts[i].size(0) == parts[0].size(0) && parts[i].size(2) == parts[0].size(2) &&
                    parts[i].size(3) == parts[0].size(3),
                "a norm over ", parts[i].sizes(), " with a weight of ", weights[i].numel());
  }
  variable_list all(parts);
  all.insert(all.end(), weights.begin(), weights.end());
  if (records(all)) {
    all.push_back(units);
    return NormParts::apply(at::TensorList(all), eps);
  }
  for (auto* list : {&parts, &weights})
    for (auto& x : *list) x = x.contiguous();
  return norm_parts(parts, weights, units, eps);
}

const at::Tensor& of(DuetTensor tensor) { return *static_cast<const at::Tensor*>(tensor); }

}  // namespace
}  // namespace duet

extern "C" {

DuetTensor duet_rms_norm(DuetTensor x_, DuetTensor weight, double eps) {
  return duet::guarded(static_cast<DuetTensor>(nullptr), [&]() -> DuetTensor {
    const auto& x = duet::of(x_);
    TORCH_CHECK(x.dim() > 0, "a norm of a number");
    const auto rows = x.reshape({1, -1, 1, x.size(-1)});
    auto out = duet::norm({rows}, {duet::of(weight)}, at::Tensor(), eps);
    return new at::Tensor(out.view(x.sizes()));
  });
}

DuetTensor duet_norm_rotate(const DuetTensor* parts_, const DuetTensor* weights_, size_t count,
                            DuetTensor units_, double eps) {
  return duet::guarded(static_cast<DuetTensor>(nullptr), [&]() -> DuetTensor {
    duet::variable_list parts, weights;
    int64_t all = 0;
    for (size_t i = 0; i < count; ++i) {
      parts.push_back(duet::of(parts_[i]));
      weights.push_back(duet::of(weights_[i]));
      TORCH_CHECK(parts[i].dim() == 4, "a part of shape ", parts[i].sizes());
      all += parts[i].size(1);
    }
    TORCH_CHECK(count > 0, "no part to rotate");
    const auto units = at::view_as_real(duet::of(units_)).contiguous();
    duet::check(units, "a rotation");
    TORCH_CHECK(units.numel() == all * parts[0].size(3), "a rotation of ", units.numel() / 2,
                " pairs for ", all, " tokens of ", parts[0].size(3), " channels");
    return new at::Tensor(duet::norm(std::move(parts), std::move(weights), units, eps));
  });
}

DuetTensor duet_gelu(DuetTensor x_) {
  return duet::guarded(static_cast<DuetTensor>(nullptr), [&]() -> DuetTensor {
    const auto& x = duet::of(x_);
    duet::check(x, "the input of an activation");
    if (duet::records({x})) return new at::Tensor(duet::Gelu::apply(x));
    return new at::Tensor(duet::gelu_of(x.contiguous()));
  });
}
}
