#include <cmath>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include "duet_torch.h"
#include "error.hpp"

extern "C" int32_t duet_adamw(DuetTensor param_, DuetTensor grad_, DuetTensor exp_avg_,
                              DuetTensor exp_avg_sq_, double lr, double beta1, double beta2,
                              double eps, double weight_decay, int64_t step) {
  return duet::guarded(-1, [&] {
    at::NoGradGuard no_grad;
    auto& param = *static_cast<at::Tensor*>(param_);
    const auto& grad = *static_cast<at::Tensor*>(grad_);
    auto& exp_avg = *static_cast<at::Tensor*>(exp_avg_);
    auto& exp_avg_sq = *static_cast<at::Tensor*>(exp_avg_sq_);

    // Scalars in double precision, as Python has them.
    const double count = static_cast<double>(step);
    const double bias_correction1 = 1.0 - std::pow(beta1, count);
    const double bias_correction2 = 1.0 - std::pow(beta2, count);
    const double step_size = lr / bias_correction1;

    param.mul_(1.0 - lr * weight_decay);
    exp_avg.lerp_(grad, 1.0 - beta1);
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, 1.0 - beta2);
    const auto denominator = exp_avg_sq.sqrt().div_(std::sqrt(bias_correction2)).add_(eps);
    param.addcdiv_(exp_avg, denominator, -step_size);
    return 0;
  });
}
