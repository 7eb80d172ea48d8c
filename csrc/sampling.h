// One token from the logits of a row, by srlm_fast/engine/sampling.py's rules.
#pragma once

#include <cstdint>

namespace srlm {

struct Sampled {
  int64_t token;
  float logprob;        // raw: before temperature and top-p; no number where a logit is none
  float log_normaliser;  // logprob of token i = logits[i] - log_normaliser
};

// The most probable token for temperature 0 (of equals, the first), else one drawn from stream `key` at `step`.
//   logits   [vocab]
//   scratch  as many floats
Sampled sample(const float* logits, int64_t vocab, float temperature, float top_p, int64_t key, int64_t step,
               float* scratch);

}  // namespace srlm
