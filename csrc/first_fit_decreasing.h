// First-fit-decreasing bin packing, for batches by token budget.
#pragma once

#include <cstdint>
#include <vector>

namespace srlm {

// The bin of every item. Items are taken longest first (of equal length: lowest index first), each into the first bin
// that still has room. O(n log n) time, O(n) memory; the result depends on nothing but the arguments.
// Throws std::invalid_argument where a length is negative or greater than the budget.
std::vector<int64_t> first_fit_decreasing(const int64_t* lengths, int64_t n, int64_t budget);

}  // namespace srlm
