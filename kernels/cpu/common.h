// What the CPU kernels share: vectors, bf16, and views of torch's stable ABI.
#pragma once

#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace skipc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// GCC and clang lower these to whatever the machine has.
#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float vec __attribute__((vector_size(W * 4)));
typedef uint32_t uvec __attribute__((vector_size(W * 4)));
typedef uint16_t hvec __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = std::isnan(x) ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Calls a line into the second-level cache.
inline void fetch(const void* at) { __builtin_prefetch(at, 0, 2); }

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vec load(const bf16* p) {
  hvec h;
  std::memcpy(&h, p, sizeof(h));
  uvec u = __builtin_convertvector(h, uvec) << 16;
  vec v;
  std::memcpy(&v, &u, sizeof(v));
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof(v)); }

// As `narrow` rounds, but in the upper halves.
inline uvec rounded(vec v) {
  uvec bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const uvec nan = uvec{} + 0x7fc00000u;
  return v == v ? bits + 0x7fff + (bits >> 16 & 1) : nan;
}
inline void store(bf16* p, vec v) {
  const hvec h = __builtin_convertvector(rounded(v) >> 16, hvec);
  std::memcpy(p, &h, sizeof(h));
}

// Sums over the lanes of N vectors at once: halves of neighbours are put side by side and added, again and again. Every
// sum adds the same lanes in the same order, whatever N is.
template <int N, int GROUP = W / 2, size_t... I>
inline void fold(vec* v, std::index_sequence<I...> lanes) {
  if constexpr (N > 1) {
    for (int i = 0; i < N / 2; i++) {
      const vec a = v[2 * i], b = v[2 * i + 1];
      v[i] = __builtin_shufflevector(a, b, int(I % GROUP + I / GROUP * 2 * GROUP)...) +
             __builtin_shufflevector(a, b, int(I % GROUP + I / GROUP * 2 * GROUP + GROUP)...);
    }
    if constexpr (GROUP > 1) fold<N / 2, GROUP / 2>(v, lanes);
  } else {  // one vector of sums over groups of 2 * GROUP lanes: what would be its neighbour is itself
    const vec a = v[0];
    v[0] = __builtin_shufflevector(a, a, int((I % GROUP + I / GROUP * 2 * GROUP) % W)...) +
           __builtin_shufflevector(a, a, int((I % GROUP + I / GROUP * 2 * GROUP + GROUP) % W)...);
    if constexpr (GROUP > 1) fold<1, GROUP / 2>(v, lanes);
  }
}
template <int N>
inline void sums(vec* v, float* out) {  // destroys v
  if constexpr ((N & (N - 1)) == 0 && N <= W) {
    fold<N>(v, std::make_index_sequence<W>{});
    float all[W];
    std::memcpy(all, v, sizeof(vec));
    std::memcpy(out, all, N * sizeof(float));
  } else {
    constexpr int M = N > 8 ? 8 : N > 4 ? 4 : N > 2 ? 2 : 1;
    sums<M>(v, out);
    sums<N - M>(v + M, out + M);
  }
}
inline float sum(vec v) {
  float out;
  sums<1>(&v, &out);
  return out;
}

// exp for x <= 0, to about 1 ulp (Cephes' polynomial); exact 0 far below.
inline vec exp_nonpositive(vec x) {
  const vec low = vec{} - 87.33f;
  const auto dead = x < low;
  x = dead ? low : x;
  const vec magic = vec{} + 12582912.0f;  // adding it rounds to a whole number
  const vec t = x * 1.44269504088896341f + magic;
  const vec n = t - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uvec bits;
  std::memcpy(&bits, &t, sizeof(bits));
  bits = (bits << 23) + (127u << 23);  // the low bits of t hold n: 2^n
  vec scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return dead ? vec{} : p * scale;
}

// A new CPU tensor. (The shim's own call: aten::empty through the boxed dispatcher costs two microseconds more.)
inline Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t i = int64_t(sizes.size()) - 2; i >= 0; i--) strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes[i + 1]);
  return empty(sizes, strides, dtype);
}

// Rows of a contiguous tensor, and its sizes with another last one.
inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) rows *= x.size(i);
  return rows;
}
inline std::vector<int64_t> sizes_like(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); i++) sizes.push_back(x.size(i));
  sizes.push_back(last);
  return sizes;
}

inline int threads_for(int64_t elements) { return elements < 16384 ? 1 : omp_get_max_threads(); }

}  // namespace skipc
