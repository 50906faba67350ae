#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "duet_torch.h"
#include "error.hpp"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The caller's function, freed when the graph that refers to it is, and the leaves it holds.
struct Body : torch::CustomClassHolder {
  DuetBody call;
  DuetDrop drop;
  void* context;
  size_t count = 0;
  variable_list leaves;

  Body(DuetBody call, DuetDrop drop, void* context) : call(call), drop(drop), context(context) {}
  ~Body() override { drop(context); }

  variable_list run(variable_list& inputs) const {
    std::vector<DuetTensor> handles;
    for (auto& input : inputs) handles.push_back(&input);
    variable_list outputs;
    TORCH_CHECK(call(context, handles.data(), handles.size(), &outputs) == 0,
                "the function to compute again failed");
    return outputs;
  }
};

// Leaves are variables of the node as inputs are: their gradients join the outer graph's sums, so
// that they are added up in the order of a plain backward pass.
struct Recompute : torch::autograd::Function<Recompute> {
  static variable_list forward(AutogradContext* ctx, c10::intrusive_ptr<Body> body,
                               at::TensorList all) {
    variable_list inputs(all.begin(), all.begin() + body->count);
    ctx->save_for_backward(inputs);
    c10::List<bool> wanted;
    for (const auto& input : inputs) wanted.push_back(input.requires_grad());
    ctx->saved_data["wanted"] = wanted;
    ctx->saved_data["body"] = c10::IValue::make_capsule(body);
    return body->run(inputs);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toBoolList();
    const auto capsule = ctx->saved_data["body"].toCapsule();
    const auto& body = *static_cast<Body*>(capsule.get());
    variable_list inputs;
    for (size_t i = 0; i < saved.size(); ++i) {
      inputs.push_back(saved[i].detach().requires_grad_(wanted[i]));
    }
    at::AutoGradMode on(true);
    const auto again = body.run(inputs);
    variable_list outputs, seeds, sources;
    for (size_t i = 0; i < again.size(); ++i) {
      if (grads[i].defined() && again[i].requires_grad()) {
        outputs.push_back(again[i]);
        seeds.push_back(grads[i]);
      }
    }
    for (const auto& input : inputs) {
      if (input.requires_grad()) sources.push_back(input);
    }
    for (const auto& leaf : body.leaves) {
      if (leaf.requires_grad()) sources.push_back(leaf);
    }
    variable_list found;
    if (!outputs.empty() && !sources.empty()) {
      found = torch::autograd::grad(outputs, sources, seeds, std::nullopt, false, true);
    }
    found.resize(sources.size());
    auto next = found.begin();
    // One slot for the body itself, then one for each variable.
    variable_list result(1);
    for (const auto& input : inputs) result.push_back(input.requires_grad() ? *next++ : at::Tensor());
    for (const auto& leaf : body.leaves) result.push_back(leaf.requires_grad() ? *next++ : at::Tensor());
    return result;
  }
};

}  // namespace

extern "C" int32_t duet_list_push(void* list, DuetTensor tensor) {
  return duet::guarded(-1, [&] {
    static_cast<variable_list*>(list)->push_back(*static_cast<at::Tensor*>(tensor));
    return 0;
  });
}

extern "C" int32_t duet_recompute(DuetBody call, DuetDrop drop, void* context,
                                  const DuetTensor* inputs, size_t count,
                                  const DuetTensor* leaves, size_t leaf_count, void* take,
                                  DuetTake give) {
  // Owns `context` from here on, whatever happens.
  const auto body = c10::make_intrusive<Body>(call, drop, context);
  return duet::guarded(-1, [&] {
    variable_list all;
    for (size_t i = 0; i < count; ++i) all.push_back(*static_cast<at::Tensor*>(inputs[i]));
    variable_list outputs;
    if (at::GradMode::is_enabled()) {
      body->count = count;
      for (size_t i = 0; i < leaf_count; ++i) {
        body->leaves.push_back(*static_cast<at::Tensor*>(leaves[i]));
        all.push_back(body->leaves.back());
      }
      outputs = Recompute::apply(body, at::TensorList(all));
    } else {
      outputs = body->run(all);
    }
    for (auto& output : outputs) give(take, &output);
    return 0;
  });
}
