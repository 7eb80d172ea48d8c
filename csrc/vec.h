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
    T narrow[at::vec::Vectorized<T>::size()];
    at::vec::convert_from_float<T>(x, x).store(narrow);
    std::copy_n(narrow, n, to);
  }
}

// e^x within 2 ulp. AVX-512 has 2^n as one instruction, with which half of the library function's time is saved:
// 2^n * e^r with |r| <= ln(2) / 2 and the Taylor polynomial of degree 7 for e^r.
template <typename T>
[[gnu::always_inline]] inline Vec<T> exp(const Vec<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<Wide<T>, float>) {
    using at::vec::fmadd;
    const Vec<T> bounded = at::vec::clamp(x, Vec<T>(-110.0f), Vec<T>(90.0f));  // 0 and inf lie within
    const Vec<T> n = (bounded * Vec<T>(1.44269504f)).round();
    const Vec<T> r = fmadd(n, Vec<T>(2.12194440e-4f), fmadd(n, Vec<T>(-0.693359375f), bounded));
    Vec<T> p(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fmadd(p, r, Vec<T>(c));
    return _mm512_scalef_ps(p, n);
  }
#endif
  return x.exp();
}

// body(offset, n) for every vector of a row of `size` elements.
template <typename T, typename Body>
inline void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + Vec<T>::size() <= size; i += Vec<T>::size()) body(i, static_cast<int64_t>(Vec<T>::size()));
  if (i < size) body(i, size - i);
}

// The lanes as they read back once stored as T.
template <typename T>
inline Vec<T> rounded(const Vec<T>& x) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return x;
  } else {
    return std::get<0>(at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(x, x)));
  }
}

// The sum over a row of `size` elements of term(offset, n), a vector whose lanes from n on are zero.
template <typename T, typename Term>
inline Wide<T> sum(int64_t size, const Term& term) {
  constexpr int64_t lanes = Vec<T>::size();
  Vec<T> sums[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};  // additions that need not wait for each other
  int64_t i = 0;
  for (; i + 4 * lanes <= size; i += 4 * lanes) {
    for (int64_t j = 0; j < 4; ++j) sums[j] += term(i + j * lanes, lanes);
  }
  for (; i + lanes <= size; i += lanes) sums[0] += term(i, lanes);
  if (i < size) sums[1] += term(i, size - i);
  Wide<T> folded[lanes];
  ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(folded);
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) folded[j] += folded[j + half];
  }
  return folded[0];
}

}  // namespace srlm
