// Attention of some queries of one sequence over its keys and values in blocks of the engine's cache, in fp32.
//
// A query's result is the same to the last bit whichever queries it is run with.
#pragma once

#include <cstdint>
#include <vector>

namespace srlm {

constexpr int64_t kBlockTokens = 16;  // positions of a block of the cache

struct Query {
  const float* q;   // [head_dim]
  int64_t length;   // it attends to the first `length` positions, 1 or more
  float* out;       // [head_dim]
};

// The work space of a thread.
class PagedAttention {
 public:
  // head_dim is a multiple of kBlockTokens.
  explicit PagedAttention(int64_t head_dim);

  std::vector<Query> queries;
  std::vector<const float*> blocks;  // keys [head_dim, kBlockTokens], then values [kBlockTokens, head_dim], of each block

  void run();

 private:
  template <int kQueries>
  void run_tile(const Query* tile);

  int64_t head_dim_;
  float scale_;
  std::vector<float> scores_;
};

}  // namespace srlm
