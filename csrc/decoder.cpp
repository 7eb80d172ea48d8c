#include "decoder.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "paged_attention.h"
#include "panels.h"
#include "sampling.h"
#include "vec.h"

namespace srlm {
namespace {

using Lanes = Vec<float>;
constexpr int64_t kLanes = Lanes::size();
constexpr int64_t kTensorsOfLayer = 6;
constexpr int64_t kRowsPerTask = 64;  // of norms and the like
constexpr int64_t kTokensPerTask = 8, kSamplesPerTask = 8;
constexpr int64_t kTokensAtOnce = 256;  // that go through a layer: what it makes of them stays in the processor's cache

struct Layer {
  const float *input_norm, *qkv, *output, *post_norm, *gate_up, *down;
};

struct Model {
  int64_t dim, inner, heads, kv_heads, head_dim, vocab;
  double eps;
  std::vector<Layer> layers;
  const float *embedding, *final_norm, *head, *cosines, *sines;
  int64_t positions;

  int64_t qkv_size() const { return (heads + 2 * kv_heads) * head_dim; }
};

Model model_of(at::TensorList weights, at::IntArrayRef shape, double eps) {
  TORCH_CHECK_VALUE(shape.size() == 5 && weights.size() > 5 && (weights.size() - 5) % kTensorsOfLayer == 0,
                    "decoder: 5 sizes, 6 weights a layer and 5 more wanted");
  for (const at::Tensor& weight : weights) {
    TORCH_CHECK_VALUE(weight.scalar_type() == at::kFloat && weight.is_contiguous(), "decoder: dense fp32 weights only");
  }
  const auto data = [&](int64_t i) { return weights[i].const_data_ptr<float>(); };
  const int64_t n = weights.size() - 5;
  Model m{shape[0], shape[1], shape[2], shape[3], shape[4], weights[n].size(0), eps, {}, data(n), data(n + 1), data(n + 2),
          data(n + 3), data(n + 4), weights[n + 3].size(0)};
  TORCH_CHECK_VALUE(m.head_dim % kBlockTokens == 0 && m.heads % m.kv_heads == 0,
                    "decoder: head_dim ", m.head_dim, " is no multiple of ", kBlockTokens);
  for (int64_t i = 0; i < n; i += kTensorsOfLayer) {
    m.layers.push_back({data(i), data(i + 1), data(i + 2), data(i + 3), data(i + 4), data(i + 5)});
  }
  return m;
}

// Blocks of keys and values, and which of them each sequence has.
struct Cache {
  float* data;
  int64_t block_stride, layer_stride, head_stride;
  const int64_t* tables;
  int64_t table_stride;

  Cache(const Model& m, const at::Tensor& cache, const at::Tensor& tables_)
      : data(cache.mutable_data_ptr<float>()), block_stride(cache.stride(0)), layer_stride(cache.stride(1)),
        head_stride(cache.stride(2)), tables(tables_.const_data_ptr<int64_t>()), table_stride(tables_.stride(0)) {
    TORCH_CHECK_VALUE(cache.is_contiguous() && cache.dim() == 5 && cache.scalar_type() == at::kFloat &&
                          cache.size(1) == static_cast<int64_t>(m.layers.size()) && cache.size(2) == m.kv_heads &&
                          cache.size(4) == kBlockTokens * m.head_dim && tables_.scalar_type() == at::kLong &&
                          tables_.stride(1) == 1,
                      "decoder: the cache does not fit the model");
  }

  float* block(int64_t owner, int64_t index, int64_t layer, int64_t head) const {
    return data + tables[owner * table_stride + index] * block_stride + layer * layer_stride + head * head_stride;
  }
};

// y = weight * x / rms(x)
void rms_norm(const float* x, const float* weight, int64_t dim, double eps, float* y) {
  const float squares = sum<float>(dim, [&](int64_t i, int64_t n) {
    const Lanes v = load(x + i, n);
    return v * v;
  });
  const Lanes scale(1.0f / std::sqrt(squares / static_cast<float>(dim) + static_cast<float>(eps)));
  for_each_vector<float>(dim, [&](int64_t i, int64_t n) {
    store<float>(y + i, load(weight + i, n) * (load(x + i, n) * scale), n);
  });
}

void add(float* x, const float* delta, int64_t dim) {
  for_each_vector<float>(dim, [&](int64_t i, int64_t n) { store<float>(x + i, load(x + i, n) + load(delta + i, n), n); });
}

// Rotates the halves of a head, in place.
void rotate(float* head, const float* cosines, const float* sines, int64_t half) {
  for_each_vector<float>(half, [&](int64_t i, int64_t n) {
    const Lanes c = load(cosines + i, n), s = load(sines + i, n);
    const Lanes first = load(head + i, n), second = load(head + half + i, n);
    store<float>(head + i, first * c - second * s, n);
    store<float>(head + half + i, second * c + first * s, n);
  });
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  const Lanes one(1);
  for_each_vector<float>(n, [&](int64_t i, int64_t count) {
    const Lanes g = load(gate + i, count);
    store<float>(y + i, g / (one + exp<float>(g.neg())) * load(up + i, count), count);
  });
}

// Packed tokens and where they are.
struct Tokens {
  int64_t count;
  const int64_t *ids, *owner, *positions;

  Tokens part(int64_t begin, int64_t n) const { return {n, ids + begin, owner + begin, positions + begin}; }
};

// Work space for `count` tokens and `rows` rows of logits, cut from one allocation.
class Scratch {
 public:
  Scratch(const Model& m, int64_t count, int64_t rows) {
    const int64_t at_once = std::min(count, kTokensAtOnce);
    qkv_width = panel_columns(m.qkv_size());
    gate_width = panel_columns(2 * m.inner);
    dim_width = panel_columns(m.dim);
    vocab_width = panel_columns(m.vocab);
    const int64_t attended_width = m.heads * m.head_dim;
    memory_ = at::empty({count * m.dim + at_once * (dim_width * 2 + qkv_width + gate_width + m.inner + attended_width) +
                         rows * (m.dim + 2 * vocab_width)}, at::kFloat);
    float* next = memory_.mutable_data_ptr<float>();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    x = take(count * m.dim);
    normed = take(at_once * dim_width);
    delta = take(at_once * dim_width);
    qkv = take(at_once * qkv_width);
    gate_up = take(at_once * gate_width);
    inner = take(at_once * m.inner);
    attended = take(at_once * attended_width);
    last = take(rows * m.dim);
    logits = take(rows * vocab_width);
    sampling = take(rows * vocab_width);
  }

  int64_t qkv_width, gate_width, dim_width, vocab_width;
  float *x, *normed, *delta, *qkv, *gate_up, *inner, *attended, *last, *logits, *sampling;

 private:
  at::Tensor memory_;
};

template <typename Body>
void for_each_row(int64_t rows, const Body& body, int64_t rows_per_task = kRowsPerTask) {
  at::parallel_for(0, rows, rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

void check_tokens(const Model& m, const Tokens& tokens) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    TORCH_CHECK_INDEX(tokens.ids[t] >= 0 && tokens.ids[t] < m.vocab && tokens.positions[t] >= 0 &&
                          tokens.positions[t] < m.positions,
                      "decoder: token ", tokens.ids[t], " at position ", tokens.positions[t], " is outside the model");
  }
}

// Attention of tokens to their sequences, from s.qkv to s.attended.
void attend(const Model& m, const Cache& cache, const Tokens& tokens, int64_t layer, const Scratch& s) {
  const int64_t q_size = m.heads * m.head_dim, group = m.heads / m.kv_heads;
  at::parallel_for(0, tokens.count, kTokensPerTask, [&](int64_t begin, int64_t end) {
    PagedAttention attention(m.head_dim);
    // Head by head: what sequences or tokens share of one head stays in the processor's cache.
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      for (int64_t first = begin, t = begin; t < end; first = t) {
        attention.queries.clear();
        int64_t longest = 0;
        for (; t < end && tokens.owner[t] == tokens.owner[first]; ++t) {
          const int64_t length = tokens.positions[t] + 1;
          longest = std::max(longest, length);
          for (int64_t g = h * group; g < (h + 1) * group; ++g) {
            attention.queries.push_back(
                {s.qkv + t * s.qkv_width + g * m.head_dim, length, s.attended + t * q_size + g * m.head_dim});
          }
        }
        attention.blocks.resize((longest + kBlockTokens - 1) / kBlockTokens);
        for (size_t b = 0; b < attention.blocks.size(); ++b) {
          attention.blocks[b] = cache.block(tokens.owner[first], b, layer, h);
        }
        attention.run();
      }
    }
  });
}

// Tokens through layer l: x [tokens, dim] becomes the residual stream after it. Those before them in their sequences
// have been there.
void run_layer(const Model& m, const Cache& cache, const Tokens& tokens, int64_t l, float* x, const Scratch& s) {
  const Layer& layer = m.layers[l];
  const int64_t count = tokens.count, half = m.head_dim / 2;
  const int64_t q_size = m.heads * m.head_dim, kv_size = m.kv_heads * m.head_dim;
  for_each_row(count, [&](int64_t t) {
    rms_norm(x + t * m.dim, layer.input_norm, m.dim, m.eps, s.normed + t * s.dim_width);
  });
  multiply_panels(s.normed, s.dim_width, count, layer.qkv, m.dim, m.qkv_size(), s.qkv, s.qkv_width);
  for_each_row(count, [&](int64_t t) {
    float* const row = s.qkv + t * s.qkv_width;
    const int64_t position = tokens.positions[t], place = position % kBlockTokens;
    for (int64_t h = 0; h < m.heads + m.kv_heads; ++h) {
      rotate(row + h * m.head_dim, m.cosines + position * half, m.sines + position * half, half);
    }
    for (int64_t h = 0; h < m.kv_heads; ++h) {
      float* const keys = cache.block(tokens.owner[t], position / kBlockTokens, l, h);
      const float* const key = row + q_size + h * m.head_dim;
      for (int64_t d = 0; d < m.head_dim; ++d) keys[d * kBlockTokens + place] = key[d];
      std::copy_n(key + kv_size, m.head_dim, keys + (kBlockTokens + place) * m.head_dim);
    }
  });
  attend(m, cache, tokens, l, s);
  multiply_panels(s.attended, q_size, count, layer.output, q_size, m.dim, s.delta, s.dim_width);
  for_each_row(count, [&](int64_t t) {
    add(x + t * m.dim, s.delta + t * s.dim_width, m.dim);
    rms_norm(x + t * m.dim, layer.post_norm, m.dim, m.eps, s.normed + t * s.dim_width);
  });
  multiply_panels(s.normed, s.dim_width, count, layer.gate_up, m.dim, 2 * m.inner, s.gate_up, s.gate_width);
  for_each_row(count, [&](int64_t t) {
    swiglu(s.gate_up + t * s.gate_width, s.gate_up + t * s.gate_width + m.inner, m.inner, s.inner + t * m.inner);
  });
  multiply_panels(s.inner, m.inner, count, layer.down, m.inner, m.dim, s.delta, s.dim_width);
  for_each_row(count, [&](int64_t t) { add(x + t * m.dim, s.delta + t * s.dim_width, m.dim); });
}

// The residual stream after all layers, in scratch.x.
void run_layers(const Model& m, const Cache& cache, const Tokens& tokens, const Scratch& s) {
  check_tokens(m, tokens);
  for_each_row(tokens.count,
               [&](int64_t t) { std::copy_n(m.embedding + tokens.ids[t] * m.dim, m.dim, s.x + t * m.dim); });
  for (size_t l = 0; l < m.layers.size(); ++l) {
    for (int64_t begin = 0; begin < tokens.count; begin += kTokensAtOnce) {
      const int64_t n = std::min(kTokensAtOnce, tokens.count - begin);
      run_layer(m, cache, tokens.part(begin, n), l, s.x + begin * m.dim, s);
    }
  }
}

// Logits of tokens `last` in scratch.logits, vocab_width apart.
void run_head(const Model& m, const Scratch& s, int64_t rows, const int64_t* last) {
  for_each_row(rows, [&](int64_t i) {
    rms_norm(s.x + (last ? last[i] : i) * m.dim, m.final_norm, m.dim, m.eps, s.last + i * m.dim);
  });
  multiply_panels(s.last, m.dim, rows, m.head, m.dim, m.vocab, s.logits, s.vocab_width);
}

template <typename T>
struct Column {  // one field of the state: [rows] or [rows, width]
  T* data;
  int64_t stride, width;

  explicit Column(const at::Tensor& x)
      : data(x.mutable_data_ptr<T>()), stride(x.stride(0)), width(x.dim() > 1 ? x.size(1) : 1) {
    TORCH_CHECK_VALUE(x.is_contiguous(), "decoder: the state of the rows must be dense");
  }
  T* row(int64_t i) const { return data + i * stride; }
  T& at(int64_t i) const { return data[i * stride]; }
};

struct State {
  Column<int64_t> last_tokens, lengths, steps, room, keys;
  Column<float> temperature, top_p;
  Column<int64_t> stop_ids, extra_ids, tokens;
  Column<float> logprobs, extra_logprobs;

  explicit State(at::TensorList t)
      : last_tokens(t[0]), lengths(t[1]), steps(t[2]), room(t[3]), keys(t[4]), temperature(t[5]), top_p(t[6]),
        stop_ids(t[7]), extra_ids(t[8]), tokens(t[9]), logprobs(t[10]), extra_logprobs(t[11]) {}

  // Samples and adds a token; whether the row ends: stop token, no room, or a log-probability that is no number.
  bool append(int64_t row, const float* logits, int64_t vocab, float* scratch) const {
    const int64_t step = steps.at(row);
    const Sampled sampled =
        sample(logits, vocab, temperature.at(row), top_p.at(row), keys.at(row), step, scratch);
    tokens.row(row)[step] = sampled.token;
    logprobs.row(row)[step] = sampled.logprob;
    const int64_t n_extra = extra_ids.width;
    for (int64_t e = 0; e < n_extra; ++e) {
      extra_logprobs.row(row)[step * n_extra + e] = logits[extra_ids.row(row)[e]] - sampled.log_normaliser;
    }
    last_tokens.at(row) = sampled.token;
    steps.at(row) = step + 1;
    const int64_t* const stops = stop_ids.row(row);
    return std::find(stops, stops + stop_ids.width, sampled.token) != stops + stop_ids.width ||
           step + 1 >= room.at(row) || !std::isfinite(sampled.logprob);
  }
};

}  // namespace

at::Tensor decoder_logits(at::TensorList weights, at::IntArrayRef shape, double eps, const at::Tensor& cache,
                          const at::Tensor& tables, const at::Tensor& ids, const at::Tensor& owner,
                          const at::Tensor& positions, const at::Tensor& last) {
  const Model m = model_of(weights, shape, eps);
  for (const at::Tensor& x : {ids, owner, positions, last}) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kLong && x.is_contiguous(), "decoder_logits: dense int64 tokens only");
  }
  const Scratch scratch(m, ids.numel(), last.numel());
  run_layers(m, Cache(m, cache, tables),
             {ids.numel(), ids.const_data_ptr<int64_t>(), owner.const_data_ptr<int64_t>(),
              positions.const_data_ptr<int64_t>()}, scratch);
  run_head(m, scratch, last.numel(), last.const_data_ptr<int64_t>());
  at::Tensor out = at::empty({last.numel(), m.vocab}, at::kFloat);
  for_each_row(last.numel(), [&](int64_t i) {
    std::copy_n(scratch.logits + i * scratch.vocab_width, m.vocab, out.mutable_data_ptr<float>() + i * m.vocab);
  });
  return out;
}

at::Tensor decoder_emit(const at::Tensor& logits, const at::Tensor& rows, at::TensorList state) {
  TORCH_CHECK_VALUE(logits.is_contiguous() && logits.scalar_type() == at::kFloat && state.size() == 12,
                    "decoder_emit: dense fp32 logits and the 12 fields of a row wanted");
  const State s(state);
  const int64_t n = rows.numel(), vocab = logits.size(1);
  const float* const data = logits.const_data_ptr<float>();
  const int64_t* const row = rows.const_data_ptr<int64_t>();
  at::Tensor ended = at::empty({n}, at::kBool), scratch = at::empty({n, vocab}, at::kFloat);
  bool* const flags = ended.mutable_data_ptr<bool>();
  float* const space = scratch.mutable_data_ptr<float>();
  for_each_row(n, [&](int64_t i) { flags[i] = s.append(row[i], data + i * vocab, vocab, space + i * vocab); },
               kSamplesPerTask);
  return ended;
}

std::tuple<at::Tensor, int64_t> decoder_generate(at::TensorList weights, at::IntArrayRef shape, double eps,
                                                 const at::Tensor& cache, const at::Tensor& tables,
                                                 at::TensorList state, int64_t active, int64_t most_steps) {
  TORCH_CHECK_VALUE(state.size() == 12, "decoder_generate: the 12 fields of a row wanted");
  const Model m = model_of(weights, shape, eps);
  const State s(state);
  const Cache blocks(m, cache, tables);
  const Scratch scratch(m, active, active);
  const at::Tensor owner = at::arange(active, at::kLong);
  at::Tensor ended = at::zeros({active}, at::kBool);
  bool* const flags = ended.mutable_data_ptr<bool>();
  int64_t steps = 0;
  while (steps < most_steps && std::none_of(flags, flags + active, [](bool flag) { return flag; })) {
    run_layers(m, blocks, {active, s.last_tokens.data, owner.const_data_ptr<int64_t>(), s.lengths.data}, scratch);
    run_head(m, scratch, active, nullptr);
    for_each_row(active, [&](int64_t row) {
      ++s.lengths.at(row);
      flags[row] = s.append(row, scratch.logits + row * scratch.vocab_width, m.vocab,
                            scratch.sampling + row * scratch.vocab_width);
    }, kSamplesPerTask);
    ++steps;
  }
  return {ended, steps};
}

}  // namespace srlm

TORCH_LIBRARY_FRAGMENT(srlm, m) {
  m.def("pack_panels(Tensor weight) -> Tensor");
  m.def(
      "decoder_logits(Tensor[] weights, int[] shape, float eps, Tensor(a!) cache, Tensor tables, Tensor ids, Tensor "
      "owner, Tensor positions, Tensor last) -> Tensor");
  m.def("decoder_emit(Tensor logits, Tensor rows, Tensor(a!)[] state) -> Tensor");
  m.def(
      "decoder_generate(Tensor[] weights, int[] shape, float eps, Tensor(a!) cache, Tensor tables, Tensor(b!)[] state, "
      "int active, int most_steps) -> (Tensor, int)");
}

TORCH_LIBRARY_IMPL(srlm, CPU, m) {
  m.impl("pack_panels", &srlm::pack_panels);
  m.impl("decoder_logits", &srlm::decoder_logits);
  m.impl("decoder_emit", &srlm::decoder_emit);
  m.impl("decoder_generate", &srlm::decoder_generate);
}
