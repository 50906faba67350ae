#include <memory>

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "duet_torch.h"
#include "error.hpp"

namespace {

namespace impl = torch::autograd::impl;

// Hands a leaf's gradient over as soon as it is complete, and forgets it.
struct Taker : torch::autograd::PostAccumulateGradHook {
  DuetReady ready;
  void* context;
  size_t index;

  Taker(DuetReady ready, void* context, size_t index)
      : ready(ready), context(context), index(index) {}

  void operator()(const at::Tensor& leaf) override {
    at::Tensor grad = leaf.grad();
    leaf.mutable_grad().reset();
    TORCH_CHECK(ready(context, index, &grad) == 0, "a gradient was not taken");
  }
};

// Hooks on leaves, taken off again whatever happens.
struct Hooked {
  const DuetTensor* leaves;
  size_t count;

  ~Hooked() {
    for (size_t i = 0; i < count; ++i) {
      impl::set_post_acc_grad_hooks(*static_cast<at::Tensor*>(leaves[i]), nullptr);
    }
  }
};

}  // namespace

extern "C" int32_t duet_backward(DuetTensor loss, const DuetTensor* leaves, size_t count,
                                 DuetReady ready, void* context) {
  return duet::guarded(-1, [&] {
    const Hooked hooked{leaves, count};
    for (size_t i = 0; i < count; ++i) {
      auto& leaf = *static_cast<at::Tensor*>(leaves[i]);
      impl::set_post_acc_grad_hooks(leaf, std::make_unique<Taker>(ready, context, i));
    }
    torch::autograd::backward({*static_cast<at::Tensor*>(loss)}, {});
    return 0;
  });
}
