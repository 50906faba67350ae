// One token for each of a few sequences through a Qwen2.5 decoder, fp32 on the CPU.
//
// A step of a small batch is hundreds of tiny operations: their dispatch and their temporaries cost
// more than their arithmetic. Here a layer is five loops over preallocated memory. Every row of a
// product is summed in one order whatever the other rows are, so that a sequence does not depend on
// its batch to the last bit.

#include <algorithm>
#include <memory>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include "duet_torch.h"
#include "error.hpp"
#include "pairs.hpp"
#include "simd.hpp"

namespace duet {

// A weight [in, out] as panels of WIDTH columns, each [in, WIDTH], the last filled up with zeros.
struct Panels {
  int64_t in = 0, out = 0;
  std::vector<float> data;
  std::vector<float> bias;  // As long as the panels are wide together, or empty.

  int64_t count() const { return (out + WIDTH - 1) / WIDTH; }
  const float* at(int64_t panel) const { return data.data() + panel * in * WIDTH; }

  // `weight` is [out, in] as checkpoints have it.
  static Panels of(const at::Tensor& weight_, const at::Tensor* bias_) {
    TORCH_CHECK(weight_.dim() == 2 && weight_.device().is_cpu(), "a weight is not a CPU matrix");
    const auto weight = weight_.detach().to(at::kFloat).contiguous();
    Panels panels;
    panels.out = weight.size(0);
    panels.in = weight.size(1);
    panels.data.assign(panels.count() * WIDTH * panels.in, 0.0f);
    const float* from = weight.const_data_ptr<float>();
    at::parallel_for(0, panels.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        float* to = panels.data.data() + panel * panels.in * WIDTH;
        const float* rows = from + panel * WIDTH * panels.in;
        const int64_t columns = std::min(WIDTH, panels.out - panel * WIDTH);
        for (int64_t k = 0; k < panels.in; ++k)
          for (int64_t i = 0; i < columns; ++i) to[k * WIDTH + i] = rows[i * panels.in + k];
      }
    });
    if (bias_ != nullptr) {
      const auto bias = bias_->detach().to(at::kFloat).contiguous();
      TORCH_CHECK(bias.numel() == panels.out, "a bias does not fit its weight");
      panels.bias.assign(panels.count() * WIDTH, 0.0f);
      std::copy_n(bias.const_data_ptr<float>(), panels.out, panels.bias.data());
    }
    return panels;
  }
};

// x rsqrt(mean(x^2) + eps) weight, row by row.
DUET_KERNEL void normalise(const float* x, int64_t n, int64_t width, const float* weight, float eps,
                           float* y) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t row = 0; row < n; ++row, x += width, y += width) {
    Floats squares{};
    for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int64_t i = whole; i < width; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * weight[i];
  }
}

// gate / (1 + exp(-gate)) * up, over one panel's tile; `y` has `stride` floats a row.
DUET_KERNEL void swiglu(const float* gate, const float* up, int64_t n, int64_t columns, float* y,
                        int64_t stride) {
  for (int64_t row = 0; row < n; ++row) {
    float out[WIDTH];
    for (int64_t i = 0; i < WIDTH; i += LANES) {
      const Floats g = load(gate + row * WIDTH + i);
      store(out + i, g / (exponential(-g) + 1.0f) * load(up + row * WIDTH + i));
    }
    std::copy_n(out, columns, y + row * stride);
  }
}

// x cos + roll(x, width / 2) sin; the sine's first half is negated already.
DUET_KERNEL void rotate(const float* x, const float* cos, const float* sin, int64_t width, float* y) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] + x[i + half] * sin[i];
    y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
  }
}

// Sums of eight vectors' lanes, one a lane.
DUET_INLINE Floats sums(const Floats* of) {
  Floats pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const Floats a = of[2 * i], b = of[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// One query over `length` keys and values, [length, width] each, width a multiple of LANES.
// `weights` has room for `length` rounded up to LANES.
DUET_KERNEL void attend(const float* q, const float* k, const float* v, int64_t length,
                        int64_t width, float scale, float* weights, float* y) {
  Floats top = spread(-INFINITY);
  const Ints order = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t t = 0; t < length; t += LANES) {
    Floats products[LANES];
    for (int key = 0; key < LANES; ++key) {
      // Past the end the last key stands in; its weight is dropped below.
      const float* row = k + std::min(t + key, length - 1) * width;
      Floats product{};
      for (int64_t i = 0; i < width; i += LANES) product += load(q + i) * load(row + i);
      products[key] = product;
    }
    Floats scores = sums(products) * scale;
    scores = order < static_cast<int32_t>(std::min(length - t, LANES)) ? scores : spread(-INFINITY);
    store(weights + t, scores);
    top = maximum(top, scores);
  }
  const float highest = largest(top);
  Floats totals{};
  for (int64_t t = 0; t < length; t += LANES) {
    Floats weight = exponential(load(weights + t) - highest);
    weight = order < static_cast<int32_t>(std::min(length - t, LANES)) ? weight : Floats{};
    store(weights + t, weight);
    totals += weight;
  }
  const float share = 1.0f / sum(totals);
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    Floats out[4] = {};
    for (int64_t t = 0; t < length; ++t) {
      const Floats weight = spread(weights[t]);
      for (int part = 0; part < 4; ++part)
        out[part] += weight * load(v + t * width + i + part * LANES);
    }
    for (int part = 0; part < 4; ++part) store(y + i + part * LANES, out[part] * share);
  }
  for (; i < width; i += LANES) {
    Floats out{};
    for (int64_t t = 0; t < length; ++t) out += spread(weights[t]) * load(v + t * width + i);
    store(y + i, out * share);
  }
}

// The first index whose cumulative weight exceeds `number` times the total, of weights
// exp((x - max) / temperature); -1 when one of `x` is not finite. `weights` has room for `count`
// rounded up to LANES.
DUET_KERNEL int64_t choose(const float* x, int64_t count, double number, float temperature,
                           float* weights) {
  // In blocks, so that the sums before a block are found without looking at each weight again.
  constexpr int64_t BLOCK = 32 * LANES;
  float highest = x[0];
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    highest = x[i] > highest ? x[i] : highest;
    finite &= std::abs(x[i]) <= 3.4e38f;
  }
  if (!finite) return -1;
  const float factor = 1.0f / temperature;
  double total = 0.0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = std::min(start + BLOCK, count);
    for (int64_t i = start; i < end; i += LANES) {
      float scaled[LANES] = {};
      const int64_t here = std::min(LANES, end - i);
      for (int64_t lane = 0; lane < here; ++lane) scaled[lane] = (x[i + lane] - highest) * factor;
      store(weights + i, exponential(load(scaled)));
    }
    double block = 0.0;
    for (int64_t i = start; i < end; ++i) block += weights[i];
    total += block;
  }
  const double target = number * total;
  double before = 0.0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = std::min(start + BLOCK, count);
    double block = 0.0;
    for (int64_t i = start; i < end; ++i) block += weights[i];
    if (before + block > target) {
      double within = before;
      for (int64_t i = start; i < end; ++i) {
        within += weights[i];
        if (within > target) return i;
      }
      return end - 1;
    }
    before += block;
  }
  return count - 1;
}

// Runs `body(index)` for every index, on as many threads as libtorch uses.
template <typename F>
void each(int64_t count, int64_t grain, const F& body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) body(index);
  });
}

const at::Tensor& of(DuetTensor tensor) { return *static_cast<const at::Tensor*>(tensor); }

std::vector<float> vector_of(DuetTensor tensor, int64_t size) {
  const auto whole = of(tensor).detach().to(at::kFloat).contiguous();
  TORCH_CHECK(whole.device().is_cpu() && whole.numel() == size, "a vector of ", whole.numel(),
              " numbers stands where ", size, " belong");
  return {whole.const_data_ptr<float>(), whole.const_data_ptr<float>() + size};
}

struct DecodeLayer {
  std::vector<float> input_norm, post_norm;
  Panels qkv, out, gate, up, down;
};

}  // namespace duet

using duet::Panels;

struct DuetDecoder {
  int64_t width, inner, heads, kv_heads, head;
  float eps;
  at::Tensor table;
  std::vector<duet::DecodeLayer> layers;
  std::vector<float> norm;
  Panels logits;

  // [n, out] of the rows through all panels; `use` gets each panel's number and its tile.
  template <typename F>
  static void product(const Panels& panels, const float* x, int64_t n, const F& use) {
    pairs(panels, [&](int64_t first, int64_t some) {
      thread_local std::vector<float> of;
      tiles(panels, first, some, x, n, of);
      for (int64_t i = 0; i < some; ++i) use(first + i, of.data() + i * n * duet::WIDTH);
    });
  }

  // `body(first, some)` for each two panels, and for the last one if it is alone.
  template <typename F>
  static void pairs(const Panels& panels, const F& body) {
    const int64_t count = panels.count();
    duet::each((count + 1) / 2, 1,
               [&](int64_t pair) { body(2 * pair, std::min<int64_t>(2, count - 2 * pair)); });
  }

  // The rows through one panel or two: [n, WIDTH] each, one after the other.
  static void tiles(const Panels& panels, int64_t first, int64_t some, const float* x, int64_t n,
                    std::vector<float>& to) {
    const int64_t size = n * duet::WIDTH;
    to.resize(some * size);
    const float* bias = panels.bias.empty() ? nullptr : panels.bias.data() + first * duet::WIDTH;
    if (some == 2)
      duet::multiply_pair(x, n, panels.in, panels.at(first), bias, to.data(), to.data() + size,
                          duet::WIDTH);
    else
      duet::multiply(x, n, panels.in, panels.at(first), bias, to.data(), duet::WIDTH);
  }

  static int64_t columns(const Panels& panels, int64_t panel) {
    return std::min(duet::WIDTH, panels.out - panel * duet::WIDTH);
  }

  static void put(const Panels& panels, const float* x, int64_t n, float* y) {
    product(panels, x, n, [&](int64_t panel, const float* tile) {
      for (int64_t row = 0; row < n; ++row)
        std::copy_n(tile + row * duet::WIDTH, columns(panels, panel),
                    y + row * panels.out + panel * duet::WIDTH);
    });
  }

  static void add(const Panels& panels, const float* x, int64_t n, float* y) {
    product(panels, x, n, [&](int64_t panel, const float* tile) {
      const int64_t count = columns(panels, panel);
      for (int64_t row = 0; row < n; ++row)
        for (int64_t i = 0; i < count; ++i)
          y[row * panels.out + panel * duet::WIDTH + i] += tile[row * duet::WIDTH + i];
    });
  }

  void step(const int64_t* tokens, int64_t n, int64_t at, const DuetTensor* keys,
            const DuetTensor* values, const float* cos, const float* sin, float* out) {
    const int64_t all = (heads + 2 * kv_heads) * head;
    std::vector<float> x(n * width), normed(n * width), qkv(n * all), mixed(n * heads * head);
    std::vector<float> gated(n * inner);
    for (int64_t row = 0; row < n; ++row)
      std::copy_n(table.const_data_ptr<float>() + tokens[row] * width, width, &x[row * width]);
    for (size_t index = 0; index < layers.size(); ++index) {
      const auto& layer = layers[index];
      duet::normalise(x.data(), n, width, layer.input_norm.data(), eps, normed.data());
      put(layer.qkv, normed.data(), n, qkv.data());
      attention(qkv.data(), n, at, duet::of(keys[index]), duet::of(values[index]), cos, sin,
                mixed.data());
      add(layer.out, mixed.data(), n, x.data());
      duet::normalise(x.data(), n, width, layer.post_norm.data(), eps, normed.data());
      pairs(layer.gate, [&](int64_t first, int64_t some) {
        thread_local std::vector<float> gate, up;
        tiles(layer.gate, first, some, normed.data(), n, gate);
        tiles(layer.up, first, some, normed.data(), n, up);
        for (int64_t i = 0; i < some; ++i)
          duet::swiglu(gate.data() + i * n * duet::WIDTH, up.data() + i * n * duet::WIDTH, n,
                       columns(layer.gate, first + i),
                       gated.data() + (first + i) * duet::WIDTH, inner);
      });
      add(layer.down, gated.data(), n, x.data());
    }
    duet::normalise(x.data(), n, width, norm.data(), eps, normed.data());
    put(logits, normed.data(), n, out);
  }

  // Keys and values of this position go into the cache [n, kv_heads, capacity, head].
  void attention(float* qkv, int64_t n, int64_t at, const at::Tensor& keys, const at::Tensor& values,
                 const float* cos, const float* sin, float* out) const {
    const int64_t capacity = keys.size(2), all = (heads + 2 * kv_heads) * head;
    const int64_t group = heads / kv_heads, length = at + 1;
    float* k = keys.data_ptr<float>();
    float* v = values.data_ptr<float>();
    const float scale = 1.0f / std::sqrt(static_cast<float>(head));
    duet::each(n * kv_heads, std::max<int64_t>(1, 8192 / (length * group * head)), [&](int64_t task) {
      thread_local std::vector<float> weights, turned;
      weights.resize((length + duet::LANES - 1) / duet::LANES * duet::LANES);
      turned.resize(head);
      const int64_t row = task / kv_heads, one = task % kv_heads;
      const float* from = qkv + row * all;
      float* here_k = k + task * capacity * head;
      float* here_v = v + task * capacity * head;
      duet::rotate(from + (heads + one) * head, cos, sin, head, here_k + at * head);
      std::copy_n(from + (heads + kv_heads + one) * head, head, here_v + at * head);
      for (int64_t query = one * group; query < (one + 1) * group; ++query) {
        duet::rotate(from + query * head, cos, sin, head, turned.data());
        duet::attend(turned.data(), here_k, here_v, length, head, scale, weights.data(),
                     out + (row * heads + query) * head);
      }
    });
  }
};

extern "C" {

DuetDecoder* duet_decoder_new(const DuetDecodeLayer* layers, size_t count, DuetTensor table,
                              DuetTensor norm, DuetTensor head, int64_t heads, int64_t kv_heads,
                              double eps) {
  return duet::guarded(static_cast<DuetDecoder*>(nullptr), [&] {
    at::NoGradGuard no_grad;
    auto decoder = std::make_unique<DuetDecoder>();
    TORCH_CHECK(count > 0 && heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
                heads, " heads do not share ", kv_heads, " key heads");
    decoder->table = duet::of(table).detach().to(at::kFloat).contiguous();
    TORCH_CHECK(decoder->table.dim() == 2 && decoder->table.device().is_cpu(), "no CPU table");
    decoder->width = decoder->table.size(1);
    decoder->eps = static_cast<float>(eps);
    decoder->heads = heads;
    decoder->kv_heads = kv_heads;
    const auto panels = [](DuetTensor weight, DuetTensor bias) {
      return Panels::of(duet::of(weight), bias == nullptr ? nullptr : &duet::of(bias));
    };
    for (size_t index = 0; index < count; ++index) {
      const auto& from = layers[index];
      duet::DecodeLayer layer;
      layer.input_norm = duet::vector_of(from.input_norm, decoder->width);
      layer.post_norm = duet::vector_of(from.post_norm, decoder->width);
      layer.qkv = panels(from.qkv, from.qkv_bias);
      layer.out = panels(from.out, nullptr);
      layer.gate = panels(from.gate, nullptr);
      layer.up = panels(from.up, nullptr);
      layer.down = panels(from.down, nullptr);
      if (index == 0) {
        decoder->inner = layer.gate.out;
        decoder->head = layer.out.in / heads;
      }
      const int64_t mixed = heads * decoder->head;
      TORCH_CHECK(decoder->head % duet::LANES == 0 && layer.out.in == mixed &&
                      layer.out.out == decoder->width && layer.qkv.in == decoder->width &&
                      layer.qkv.out == mixed + 2 * kv_heads * decoder->head &&
                      layer.gate.in == decoder->width && layer.up.in == decoder->width &&
                      layer.gate.out == decoder->inner && layer.up.out == decoder->inner &&
                      layer.down.in == decoder->inner && layer.down.out == decoder->width,
                  "the weights of layer ", index, " do not fit each other");
      decoder->layers.push_back(std::move(layer));
    }
    decoder->norm = duet::vector_of(norm, decoder->width);
    decoder->logits = panels(head, nullptr);
    TORCH_CHECK(decoder->logits.in == decoder->width, "the output layer does not fit");
    return decoder.release();
  });
}

void duet_decoder_free(DuetDecoder* decoder) { delete decoder; }

int32_t duet_decoder_step(DuetDecoder* decoder, const int64_t* tokens, size_t n, int64_t position,
                          const DuetTensor* keys, const DuetTensor* values, size_t count,
                          DuetTensor cos_, DuetTensor sin_, DuetTensor logits_) {
  return duet::guarded(-1, [&] {
    const int64_t rows = static_cast<int64_t>(n), head = decoder->head;
    const auto whole = [](const at::Tensor& x) {
      return x.device().is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous();
    };
    TORCH_CHECK(count == decoder->layers.size(), "a cache of ", count, " layers for ",
                decoder->layers.size());
    for (size_t index = 0; index < 2 * count; ++index) {
      const auto& part = duet::of(index < count ? keys[index] : values[index - count]);
      TORCH_CHECK(whole(part) && part.dim() == 4 && part.size(0) == rows &&
                      part.size(1) == decoder->kv_heads && part.size(2) > position &&
                      part.size(3) == head,
                  "a cache of shape ", part.sizes(), " does not take position ", position);
    }
    const auto &cos = duet::of(cos_), &sin = duet::of(sin_), &logits = duet::of(logits_);
    TORCH_CHECK(whole(cos) && whole(sin) && cos.numel() == head && sin.numel() == head,
                "the rotation does not fit");
    TORCH_CHECK(whole(logits) && logits.numel() == rows * decoder->logits.out, "no room for logits");
    for (int64_t row = 0; row < rows; ++row)
      TORCH_CHECK(tokens[row] >= 0 && tokens[row] < decoder->table.size(0), "token ", tokens[row],
                  " is outside the vocabulary");
    decoder->step(tokens, rows, position, keys, values, cos.const_data_ptr<float>(),
                  sin.const_data_ptr<float>(), logits.data_ptr<float>());
    return 0;
  });
}

int32_t duet_choose(DuetTensor logits_, const double* numbers, size_t n, double temperature,
                    int64_t* tokens) {
  return duet::guarded(-1, [&] {
    const auto logits = duet::of(logits_).detach();
    const int64_t rows = static_cast<int64_t>(n);
    TORCH_CHECK(logits.device().is_cpu() && logits.scalar_type() == at::kFloat &&
                    logits.dim() == 2 && logits.size(0) == rows && logits.size(1) > 0 &&
                    logits.stride(1) == 1,
                "logits of shape ", logits.sizes(), " for ", rows, " numbers");
    const int64_t count = logits.size(1), stride = logits.stride(0);
    const float* from = logits.const_data_ptr<float>();
    duet::each(rows, std::max<int64_t>(1, 16384 / count), [&](int64_t row) {
      thread_local std::vector<float> weights;
      weights.resize((count + duet::LANES - 1) / duet::LANES * duet::LANES);
      tokens[row] = duet::choose(from + row * stride, count, numbers[row],
                                 static_cast<float>(temperature), weights.data());
    });
    return std::all_of(tokens, tokens + rows, [](int64_t token) { return token >= 0; }) ? 0 : 1;
  });
}
}
