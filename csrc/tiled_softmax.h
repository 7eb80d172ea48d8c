// Losses of softmax(x w^T) and their gradients without the logits in memory: a tile of them is made, used and thrown
// away in the cache. The backward makes them again; it is four products instead of three, none of which waits for
// memory. For the plain loss alone: no soft-capping, label smoothing or z-loss, and no gradient of the entropy.
//
// Repeats bitwise, whatever the number of threads; a row's loss depends on nothing but that row.
#pragma once

#include <ATen/core/Tensor.h>

namespace srlm::tiled {

// loss[n] = lse[n] - z[n, target[n]] and lse [N], the latter in fp64, for x [N, D], w [V, D] of a dtype for which
// blocked::available, z = x w^T / temperature; and the entropy [N] of softmax(z) in nats if that is defined.
void losses(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target, double temperature, at::Tensor& loss,
            at::Tensor& lse, at::Tensor entropy);

// dX of sum_n coefficient[n] loss[n] into dx [N, D] in x's dtype, and dW into dw [V, D]: written in w's dtype, or added
// if `add`, where dw is fp32. Either may be undefined. A block of U of at most `elements` elements exists at a time.
void gradients(const at::Tensor& x, const at::Tensor& w, const at::Tensor& target, double temperature,
               const at::Tensor& loss, const at::Tensor& lse, const at::Tensor& coefficient, int64_t elements,
               at::Tensor dx, at::Tensor dw, bool add);

}  // namespace srlm::tiled
