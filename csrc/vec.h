// Rows of any floating dtype as vectors of the type they are computed in: double for double, else float.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>

namespace srlm {

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
using Vec = at::vec::Vectorized<Wide<T>>;

// The first `n` <= Vec<T>::size() elements; the other lanes are zero.
template <typename T>
inline Vec<T> load(const T* from, int64_t n = Vec<T>::size()) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return n == Vec<T>::size() ? Vec<T>::loadu(from) : Vec<T>::loadu(from, n);
  } else {
    Vec<T> wide;
    if (n == Vec<T>::size()) {
      at::vec::load_to_float<T>(from, wide);
    } else {
      T padded[Vec<T>::size()] = {};
      std::copy_n(from, n, padded);
      at::vec::load_to_float<T>(padded, wide);
    }
    return wide;
  }
}

// The first `n` lanes, rounded to nearest even.
template <typename T>
inline void store(T* to, const Vec<T>& x, int64_t n = Vec<T>::size()) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    x.store(to, n);
  } else {
    at::vec::convert_from_float<T>(x, x).store(to, n);
  }
}

// body(offset, n) for every vector of a row of `size` elements.
template <typename T, typename Body>
inline void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + Vec<T>::size() <= size; i += Vec<T>::size()) body(i, static_cast<int64_t>(Vec<T>::size()));
  if (i < size) body(i, size - i);
}

}  // namespace srlm
