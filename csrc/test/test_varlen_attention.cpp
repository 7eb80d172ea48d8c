// varlen_attention and its gradient against the definition in double precision: a prompt that two responses share,
// sequences of one token and of several blocks, grouped heads, head sizes that fill no vector.
#include "varlen_attention.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>
#include <vector>

namespace {

bool close(const at::Tensor& ours, const at::Tensor& exact, double tolerance, const char* what, int64_t head_dim) {
  const double error = ((ours.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
  if (error <= tolerance) return true;
  std::printf("%s, head_dim %ld: error %g, allowed %g\n", what, static_cast<long>(head_dim), error, tolerance);
  return false;
}

}  // namespace

int main() {
  const std::vector<int64_t> q_lens = {5, 3, 40, 1, 70};
  const std::vector<std::vector<int64_t>> starts = {{0}, {0, 5}, {0, 8}, {48}, {49}};
  const int64_t heads = 4, kv_heads = 2;
  std::vector<int64_t> cu_q = {0}, cu_k = {0};
  std::vector<at::Tensor> keys;
  for (size_t s = 0; s < q_lens.size(); ++s) {
    if (starts[s].size() == 2) keys.push_back(at::arange(starts[s][0], starts[s][0] + 5));
    keys.push_back(at::arange(cu_q.back(), cu_q.back() + q_lens[s]));
    cu_k.push_back(cu_k.back() + q_lens[s] + (starts[s].size() == 2 ? 5 : 0));
    cu_q.push_back(cu_q.back() + q_lens[s]);
  }
  const at::Tensor key_index = at::cat(keys), cu_q32 = at::tensor(cu_q).to(at::kInt), cu_k32 = at::tensor(cu_k).to(at::kInt);
  const int64_t tokens = cu_q.back();

  bool good = true;
  for (const auto& [dtype, tolerance] : {std::pair{at::kDouble, 1e-14}, {at::kFloat, 2e-6}, {at::kBFloat16, 1e-2}}) {
    for (const int64_t d : {1, 8, 20, 32, 64}) {
      const at::Tensor q = at::randn({tokens, heads, d}).to(dtype), grad = at::randn({tokens, heads, d}).to(dtype);
      const at::Tensor k = at::randn({tokens, kv_heads, d}).to(dtype), v = at::randn({tokens, kv_heads, d}).to(dtype);
      const auto [out, lse] = srlm::varlen_attention(q, k, v, cu_q32, cu_k32, key_index);
      const auto [d_q, d_k, d_v] = srlm::varlen_attention_backward(grad, q, k, v, out, lse, cu_q32, cu_k32, key_index);

      const auto wide = at::TensorOptions(at::kDouble);
      at::Tensor e_out = at::zeros({tokens, heads, d}, wide), e_lse = at::zeros({heads, tokens}, wide);
      at::Tensor e_q = at::zeros_like(e_out), e_k = at::zeros({tokens, kv_heads, d}, wide), e_v = at::zeros_like(e_k);
      for (size_t s = 0; s < q_lens.size(); ++s) {
        const at::Tensor index = key_index.slice(0, cu_k[s], cu_k[s + 1]);
        const int64_t n_keys = cu_k[s + 1] - cu_k[s];
        for (int64_t h = 0; h < heads; ++h) {
          const auto rows = [&](const at::Tensor& x) { return x.to(at::kDouble).select(1, h).slice(0, cu_q[s], cu_q[s + 1]); };
          const auto cols = [&](const at::Tensor& x) { return x.to(at::kDouble).select(1, h / 2).index_select(0, index); };
          const at::Tensor queries = rows(q) / std::sqrt(double(d)), dy = rows(grad);
          const at::Tensor hidden = at::ones({q_lens[s], n_keys}).triu(n_keys - q_lens[s] + 1).to(at::kBool);
          const at::Tensor scores = queries.mm(cols(k).t()).masked_fill(hidden, -INFINITY), p = scores.softmax(1);
          const at::Tensor dp = dy.mm(cols(v).t()), ds = p * (dp - (dp * p).sum(1, true));
          rows(e_out).copy_(p.mm(cols(v)));
          e_lse.select(0, h).slice(0, cu_q[s], cu_q[s + 1]).copy_(scores.logsumexp(1));
          rows(e_q).copy_(ds.mm(cols(k)) / std::sqrt(double(d)));
          e_k.select(1, h / 2).index_add_(0, index, ds.t().mm(queries));
          e_v.select(1, h / 2).index_add_(0, index, p.t().mm(dy));
        }
      }
      good &= close(out, e_out, tolerance, "out", d) & close(lse, e_lse, tolerance, "lse", d);
      good &= close(d_q, e_q, tolerance, "d_q", d) & close(d_k, e_k, tolerance, "d_k", d) & close(d_v, e_v, tolerance, "d_v", d);
    }
  }
  return good ? 0 : 1;
}
