// Linear layers whose weights were laid out for the product beforehand, fp32 on the CPU: what a library
// copies and sorts anew at every call.

#include <algorithm>
#include <cstring>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "duet_torch.h"
#include "error.hpp"
#include "pairs.hpp"

namespace duet {

// Rows that go through all panels together: they stay in the second cache, a panel in the first.
constexpr int64_t BLOCK = 64;

static at::Tensor panels_linear(const at::Tensor& x_, const at::Tensor& panels,
                                const at::Tensor* bias_, int64_t out) {
  const auto plain = [](const at::Tensor& of) {
    return of.device().is_cpu() && of.scalar_type() == at::kFloat && of.is_contiguous();
  };
  const auto x = x_.detach().contiguous();
  const int64_t in = x.size(-1), rows = in == 0 ? 0 : x.numel() / in, count = panels.size(0);
  TORCH_CHECK(plain(x) && plain(panels) && panels.dim() == 3 && panels.size(1) == in &&
                  panels.size(2) == WIDTH && count == (out + WIDTH - 1) / WIDTH,
              "panels of shape ", panels.sizes(), " do not take ", x.sizes(), " to ", out);
  std::vector<float> bias(count * WIDTH, 0.0f);
  if (bias_ != nullptr) {
    TORCH_CHECK(plain(*bias_) && bias_->numel() == out, "a bias does not fit its weight");
    std::copy_n(bias_->const_data_ptr<float>(), out, bias.data());
  }
  auto shape = x.sizes().vec();
  shape.back() = out;
  auto y = at::empty(shape, x.options());
  const float* from = x.const_data_ptr<float>();
  const float* weights = panels.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, (rows + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * BLOCK, n = std::min(BLOCK, rows - first);
      int64_t panel = 0;
      for (; (panel + 2) * WIDTH <= out; panel += 2) {
        float* here = to + first * out + panel * WIDTH;
        multiply_pair(from + first * in, n, in, weights + panel * in * WIDTH,
                      bias.data() + panel * WIDTH, here, here + WIDTH, out);
      }
      for (; panel < count; ++panel) {
        const int64_t column = panel * WIDTH, columns = std::min(WIDTH, out - column);
        const float* w = weights + panel * in * WIDTH;
        float* here = to + first * out + column;
        if (columns == WIDTH) {
          multiply(from + first * in, n, in, w, bias.data() + column, here, out);
          continue;
        }
        float whole[BLOCK * WIDTH];
        multiply(from + first * in, n, in, w, bias.data() + column, whole, WIDTH);
        for (int64_t row = 0; row < n; ++row)
          std::copy_n(whole + row * WIDTH, columns, here + row * out);
      }
    }
  });
  return y;
}

}  // namespace duet

extern "C" DuetTensor duet_panels_linear(DuetTensor x, DuetTensor panels, DuetTensor bias,
                                         int64_t out) {
  return duet::guarded(DuetTensor(nullptr), [&]() -> DuetTensor {
    const auto of = [](DuetTensor tensor) { return static_cast<const at::Tensor*>(tensor); };
    return new at::Tensor(duet::panels_linear(*of(x), *of(panels), of(bias), out));
  });
}
