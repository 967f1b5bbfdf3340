// Linear layers of a few rows at memory bandwidth. Semantics: kernels/linear.py.
#include "common.h"

namespace skipc {

// A step of the inner loop takes one cache line's worth of lanes: W floats, or 2 W bf16, whose even and odd elements
// fall apart by a shift and a mask. The rows of x are stored accordingly (see `spread`).
template <typename T>
constexpr int STEP = sizeof(T) == 4 ? W : 2 * W;

inline void multiply(vec& acc, const float* w, const float* x) { acc += load(w) * load(x); }
inline void multiply(vec& acc, const bf16* w, const float* x) {
  uvec pair;
  std::memcpy(&pair, w, sizeof(pair));
  const uvec even = pair << 16, odd = pair & 0xffff0000u;
  vec e, o;
  std::memcpy(&e, &even, sizeof(e));
  std::memcpy(&o, &odd, sizeof(o));
  acc += e * load(x);
  acc += o * load(x + W);
}

// Rows of x in fp32, each full step of bf16 as its even elements and then its odd ones.
inline void spread(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }
inline void spread(const bf16* from, float* to, int64_t count) {
  int64_t k = 0;
  for (; k + 2 * W <= count; k += 2 * W)
    for (int i = 0; i < W; i++) {
      to[k + i] = widen(from[k + 2 * i]);
      to[k + W + i] = widen(from[k + 2 * i + 1]);
    }
  for (; k < count; k++) to[k] = widen(from[k]);
}

// out[r * ldo + n] for NB weight rows and RB rows of x. Every output sees the same operations in the same order,
// whatever NB and RB are, so a row's result does not depend on its company.
template <typename T, int NB, int RB, bool FIRST>
inline void tile(const float* x, int64_t K, const T* w, int64_t stride, const T* b, T* out, int64_t ldo) {
  vec acc[NB][RB] = {};
  int64_t k = 0;
  for (; k + STEP<T> <= K; k += STEP<T>)
    for (int n = 0; n < NB; n++) {
      const T* at = w + n * stride + k;
      if (FIRST) __builtin_prefetch(at + NB * stride);  // the next block: hardware gives up at short rows
      for (int r = 0; r < RB; r++) multiply(acc[n][r], at, x + r * K + k);
    }
  for (int r = 0; r < RB; r++)
    for (int n = 0; n < NB; n++) {
      float s = sum(acc[n][r]);
      for (int64_t j = k; j < K; j++) s += widen(w[n * stride + j]) * x[r * K + j];
      narrow(b ? s + widen(b[n]) : s, out + r * ldo + n);
    }
}

// All R rows of x against NB rows of w, which stay in the first-level cache after the first tile.
template <typename T, int NB>
inline void block(const float* x, int64_t R, int64_t K, const T* w, int64_t stride, const T* b, T* out, int64_t ldo) {
  if (R == 1) return tile<T, NB, 1, true>(x, K, w, stride, b, out, ldo);
  constexpr int HALF = NB > 4 ? 4 : NB;  // wider tiles would spill
  for (int n = 0; n < NB; n += HALF) {
    const T *wn = w + n * stride, *bn = b ? b + n : nullptr;
    T* to = out + n;
    int64_t r = 0;
    if (R >= 4) {
      tile<T, HALF, 4, true>(x, K, wn, stride, bn, to, ldo);
      for (r = 4; r + 4 <= R; r += 4) tile<T, HALF, 4, false>(x + r * K, K, wn, stride, bn, to + r * ldo, ldo);
    }
    switch (R - r) {
      case 3: tile<T, HALF, 3, true>(x + r * K, K, wn, stride, bn, to + r * ldo, ldo); break;
      case 2: tile<T, HALF, 2, true>(x + r * K, K, wn, stride, bn, to + r * ldo, ldo); break;
      case 1: tile<T, HALF, 1, true>(x + r * K, K, wn, stride, bn, to + r * ldo, ldo); break;
    }
  }
}

template <typename T>
void linears(const T* rows, int64_t R, int64_t K, const std::vector<Tensor>& weights,
             const std::vector<std::optional<Tensor>>& biases, T* out, int64_t total) {
  std::vector<float> x(R * K);
  for (int64_t r = 0; r < R; r++) spread(rows + r * K, x.data() + r * K, K);
  struct Part {
    const T *w, *b;
    int64_t stride, first, count;
  };
  std::vector<Part> parts;
  int64_t first = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const Tensor& w = weights[i];
    const T* b = biases[i].has_value() ? (const T*)biases[i]->const_data_ptr() : nullptr;
    parts.push_back({(const T*)w.const_data_ptr(), b, w.stride(0), first, w.size(0)});
    first += w.size(0);
  }
  const int threads = total * K < 16384 ? 1 : omp_get_max_threads();
#pragma omp parallel num_threads(threads)
  {
    constexpr int NB = 8;  // weight rows taken together: streams from memory, and reuse of each vector of x
    const int64_t blocks = (total + NB - 1) / NB;
    const int64_t id = omp_get_thread_num(), of = omp_get_num_threads();
    const int64_t begin = std::min(total, blocks * id / of * NB), end = std::min(total, blocks * (id + 1) / of * NB);
    for (const Part& p : parts) {
      const int64_t stop = std::min(end, p.first + p.count);
      for (int64_t n = std::max(begin, p.first); n < stop;) {
        const int64_t row = n - p.first;
        const T *w = p.w + row * p.stride, *b = p.b ? p.b + row : nullptr;
        if (n + NB <= stop) {
          block<T, NB>(x.data(), R, K, w, p.stride, b, out + n, total);
          n += NB;
        } else {
          block<T, 1>(x.data(), R, K, w, p.stride, b, out + n, total);
          n += 1;
        }
      }
    }
  }
}

Tensor skinny_linear(const Tensor& x, const std::vector<Tensor>& weights,
                     const std::vector<std::optional<Tensor>>& biases) {
  STD_TORCH_CHECK(x.is_contiguous(), "skinny_linear: x must be contiguous");
  const int64_t dim = x.dim(), K = x.size(dim - 1);
  int64_t total = 0, R = 1;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < dim; i++) {
    sizes.push_back(x.size(i));
    R *= x.size(i);
  }
  for (const Tensor& w : weights) total += w.size(0);
  sizes.push_back(total);
  Tensor out = empty(sizes, x.scalar_type());
  if (x.scalar_type() == ScalarType::Float)
    linears((const float*)x.const_data_ptr(), R, K, weights, biases, (float*)out.mutable_data_ptr(), total);
  else
    linears((const bf16*)x.const_data_ptr(), R, K, weights, biases, (bf16*)out.mutable_data_ptr(), total);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) { m.impl("skinny_linear", TORCH_BOX(&skinny_linear)); }

}  // namespace skipc
