// A Llama with packed weights over a cache of shared blocks, in fp32 on the CPU: the engine's prompts and its decoding.
//
// A token's numbers depend on the tokens before it in its sequence alone, to the last bit: not on what else is in the
// batch, on how a prompt is cut, or on whether its beginning was in the cache.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace srlm {

// Logits [N, vocab] of tokens `last` [N] out of the packed tokens `ids` [T], whose keys and values join the cache.
//   weights    per layer: input norm, panels of q k v, of o, post-attention norm, panels of gate and up, of down; then
//              embedding [vocab, dim], final norm, panels of the head, cosines and sines [positions, head_dim / 2]
//   shape      dim, inner dim, heads, key heads, head_dim
//   cache      [blocks, layers, key heads, 2, kBlockTokens * head_dim]; a block's keys are transposed
//   tables     [rows, m]: the blocks of each sequence, in order
//   owner      [T]: row of `tables` of each token
//   positions  [T]: of each token in its sequence
at::Tensor decoder_logits(at::TensorList weights, at::IntArrayRef shape, double eps, const at::Tensor& cache,
                          const at::Tensor& tables, const at::Tensor& ids, const at::Tensor& owner,
                          const at::Tensor& positions, const at::Tensor& last);

// The state of the running batch, one row a sequence: the fields of srlm_fast/engine/rows.py's Rows, in its order.
// Samples a token for each of `rows` [N] from `logits` [N, vocab] and adds it; bool [N]: the rows that end with it.
at::Tensor decoder_emit(const at::Tensor& logits, const at::Tensor& rows, at::TensorList state);

// Steps of one token for rows 0..active-1, until one of them ends or `most_steps` are done: (bool [active], steps).
std::tuple<at::Tensor, int64_t> decoder_generate(at::TensorList weights, at::IntArrayRef shape, double eps,
                                                 const at::Tensor& cache, const at::Tensor& tables,
                                                 at::TensorList state, int64_t active, int64_t most_steps);

}  // namespace srlm
