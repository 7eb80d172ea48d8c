#include "first_fit_decreasing.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace srlm {

std::vector<int64_t> first_fit_decreasing(const int64_t* lengths, int64_t n, int64_t budget) {
  for (int64_t i = 0; i < n; ++i) {
    if (lengths[i] < 0 || lengths[i] > budget) {
      throw std::invalid_argument("first_fit_decreasing: item " + std::to_string(i) + " has length " +
                                  std::to_string(lengths[i]) + ", outside 0.." + std::to_string(budget));
    }
  }
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  // room[1] is the root of a complete binary tree whose leaves are the bins; a node holds the most room below it.
  // n bins always suffice, and an unopened bin is one with the whole budget, so "first fit" is one descent.
  int64_t leaves = 1;
  while (leaves < n) leaves *= 2;
  std::vector<int64_t> room(2 * leaves, budget);
  std::vector<int64_t> bin(n);
  for (int64_t item : order) {
    int64_t node = 1;
    while (node < leaves) {
      node *= 2;
      if (room[node] < lengths[item]) ++node;
    }
    bin[item] = node - leaves;
    room[node] -= lengths[item];
    while (node > 1) {
      node /= 2;
      room[node] = std::max(room[2 * node], room[2 * node + 1]);
    }
  }
  return bin;
}

}  // namespace srlm
