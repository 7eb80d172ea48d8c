// One step of AdamW on the CPU, with stochastic rounding of whatever is bf16. Formulas: kernels/adamw.py.
#pragma once

#include <ATen/core/Tensor.h>

namespace srlm {

// For every i: params[i], grads[i] float, double or bfloat16; exp_avgs[i], exp_avg_sqs[i] of the type computed in, or
// bfloat16 unless the parameter is double; all contiguous, of one shape; steps[i] counts from 1. Without seeds bf16 is
// rounded to nearest even.
void adamw_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                 double lr, double beta1, double beta2, double eps, double weight_decay, at::IntArrayRef steps,
                 at::OptionalIntArrayRef seeds);

}  // namespace srlm
