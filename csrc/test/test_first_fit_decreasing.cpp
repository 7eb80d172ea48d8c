// first_fit_decreasing against the O(n^2) definition, on random and on extreme inputs.
#include "first_fit_decreasing.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>

namespace {

std::vector<int64_t> by_definition(const std::vector<int64_t>& lengths, int64_t budget) {
  std::vector<size_t> order(lengths.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return lengths[a] > lengths[b]; });
  std::vector<int64_t> room, bin(lengths.size());
  for (size_t item : order) {
    size_t b = 0;
    while (b < room.size() && room[b] < lengths[item]) ++b;
    if (b == room.size()) room.push_back(budget);
    room[b] -= lengths[item];
    bin[item] = static_cast<int64_t>(b);
  }
  return bin;
}

int failures = 0;

void check(bool ok, const char* what) {
  if (!ok) {
    std::fprintf(stderr, "FAILED: %s\n", what);
    ++failures;
  }
}

void check_case(const std::vector<int64_t>& lengths, int64_t budget, const char* what) {
  check(srlm::first_fit_decreasing(lengths.data(), lengths.size(), budget) == by_definition(lengths, budget), what);
}

bool refused(const std::vector<int64_t>& lengths, int64_t budget) {
  try {
    srlm::first_fit_decreasing(lengths.data(), lengths.size(), budget);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  std::mt19937_64 random(20401);
  for (int round = 0; round < 500; ++round) {
    const int64_t budget = 1 + random() % 200;
    std::vector<int64_t> lengths(random() % 300);
    for (auto& length : lengths) length = random() % (budget + 1);
    check_case(lengths, budget, "random lengths");
  }
  check_case({}, 8, "no items");
  check_case({0}, 0, "one empty item, no budget");
  check_case({0, 0, 5, 0}, 5, "empty items fit into a full bin");
  check_case({5, 5, 5}, 5, "every item fills a bin");
  check_case({3, 3, 3, 2, 2, 2}, 5, "ties go by index");
  const int64_t huge = std::numeric_limits<int64_t>::max();
  check_case({huge, 1, huge - 1}, huge, "the largest budget");
  check(refused({1, 6}, 5), "a length over the budget is refused");
  check(refused({-1}, 5), "a negative length is refused");
  if (failures == 0) std::puts("first_fit_decreasing: all cases agree with the definition");
  return failures != 0;
}
