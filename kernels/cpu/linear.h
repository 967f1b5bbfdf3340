// Linear layers of a few rows at memory bandwidth, for a team of threads: what runs inside a parallel region.
#pragma once

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

// Where element i of a row of `count` lies after `spread`.
template <typename T>
inline int64_t spread_index(int64_t i, int64_t count) {
  if (sizeof(T) == 4 || i >= count / (2 * W) * (2 * W)) return i;
  return i / (2 * W) * (2 * W) + i % 2 * W + i % (2 * W) / 2;
}

// Rows of x as the kernels want them, after an RMS norm if there is one (in fp32, rounded nowhere).
template <typename T>
std::vector<float> prepare(const T* rows, int64_t R, int64_t K, const T* norm, double eps) {
  std::vector<float> x(R * K);
  std::vector<float> scale(norm ? K : 0);
  if (norm) spread(norm, scale.data(), K);
  for (int64_t r = 0; r < R; r++) {
    float* row = x.data() + r * K;
    spread(rows + r * K, row, K);
    if (!norm) continue;
    vec squares = {};
    int64_t k = 0;
    for (; k + W <= K; k += W) squares += load(row + k) * load(row + k);
    float total = sum(squares);
    for (; k < K; k++) total += row[k] * row[k];
    const float factor = 1.0f / std::sqrt(total / K + float(eps));
    for (k = 0; k < K; k++) row[k] = row[k] * factor * scale[k];
  }
  return x;
}

// How far ahead of reading weights are called into the second-level cache: that far, rows of any length follow each
// other, and the few places that the first level has for lines under way stay free. A fifth faster than what hardware
// does by itself.
constexpr int64_t AHEAD = 8192;

// out[r * NB + n]: NB weight rows times RB rows of x. Every output sees the same operations in the same order, whatever
// NB and RB are, so a row's result does not depend on its company.
template <typename T, int NB, int RB, bool FIRST>
inline void tile(const float* x, int64_t K, const T* w, int64_t stride, float* out, int64_t ldo) {
  vec acc[RB][NB] = {};
  int64_t k = 0;
  for (; k + STEP<T> <= K; k += STEP<T>)
    for (int n = 0; n < NB; n++) {
      const T* at = w + n * stride + k;
      if (FIRST) fetch((const char*)at + AHEAD);
      for (int r = 0; r < RB; r++) multiply(acc[r][n], at, x + r * K + k);
    }
  float total[RB * NB];
  sums<RB * NB>(acc[0], total);
  for (int r = 0; r < RB; r++)
    for (int n = 0; n < NB; n++) {
      float s = total[r * NB + n];
      for (int64_t j = k; j < K; j++) s += widen(w[n * stride + j]) * x[r * K + j];
      out[r * ldo + n] = s;
    }
}

constexpr int BLOCK = W;  // weight rows a task takes

// out[r * BLOCK + n]: all R rows of x times NB rows of w, which stay in the first-level cache after the first tile.
template <typename T, int NB>
inline void block(const float* x, int64_t R, int64_t K, const T* w, int64_t stride, float* out) {
  if (R == 1) {
    constexpr int PAIR = NB > 1 ? 2 : 1;  // more would read from as many places in a page at once, which memory dislikes
    for (int n = 0; n < NB; n += PAIR) tile<T, PAIR, 1, true>(x, K, w + n * stride, stride, out + n, BLOCK);
    return;
  }
  constexpr int HALF = NB > 4 ? 4 : NB;  // wider tiles would spill
  for (int n = 0; n < NB; n += HALF) {
    const T* wn = w + n * stride;
    float* to = out + n;
    int64_t r = 0;
    if (R >= 4) {
      tile<T, HALF, 4, true>(x, K, wn, stride, to, BLOCK);
      for (r = 4; r + 4 <= R; r += 4) tile<T, HALF, 4, false>(x + r * K, K, wn, stride, to + r * BLOCK, BLOCK);
    }
    switch (R - r) {
      case 3: tile<T, HALF, 3, true>(x + r * K, K, wn, stride, to + r * BLOCK, BLOCK); break;
      case 2: tile<T, HALF, 2, true>(x + r * K, K, wn, stride, to + r * BLOCK, BLOCK); break;
      case 1: tile<T, HALF, 1, true>(x + r * K, K, wn, stride, to + r * BLOCK, BLOCK); break;
    }
  }
}

template <typename T>
inline void block(int64_t count, const float* x, int64_t R, int64_t K, const T* w, int64_t stride, float* out) {
  if (count == BLOCK) return block<T, BLOCK>(x, R, K, w, stride, out);
  for (int64_t n = 0; n < count; n++) block<T, 1>(x, R, K, w + n * stride, stride, out + n);
}

// Calls `body(first, count)` for the blocks of [0, total) that are this thread's: a stretch, so that it reads memory in
// order. (Leaving a quarter to whoever is done first costs more than waiting for the slower core.)
template <typename Body>
inline void share(int64_t total, Body body) {
  const int64_t blocks = (total + BLOCK - 1) / BLOCK, id = omp_get_thread_num(), of = omp_get_num_threads();
  for (int64_t b = blocks * id / of; b < blocks * (id + 1) / of; b++)
    body(b * BLOCK, std::min<int64_t>(BLOCK, total - b * BLOCK));
}

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? (const T*)t->const_data_ptr() : nullptr;
}

// One of several weights that are multiplied in one go, and where its outputs begin.
template <typename T>
struct Part {
  const T *w, *b;
  int64_t stride, first, count;
};

template <typename T>
std::vector<Part<T>> parts_of(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases) {
  std::vector<Part<T>> parts;
  int64_t first = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const Tensor& w = weights[i];
    parts.push_back({(const T*)w.const_data_ptr(), pointer<T>(biases[i]), w.stride(0), first, w.size(0)});
    first += w.size(0);
  }
  return parts;
}

// out = x @ w.T + b + residual for all parts. Called by every thread of a team; ends without a barrier.
template <typename T, typename Out>
void linears(const float* x, int64_t R, int64_t K, const std::vector<Part<T>>& parts, const T* residual, Out* out) {
  const int64_t total = parts.back().first + parts.back().count;
  std::vector<float> sums(R * BLOCK);
  share(total, [&](int64_t begin, int64_t size) {
    for (const Part<T>& p : parts) {
      const int64_t n = std::max(begin, p.first), count = std::min(begin + size, p.first + p.count) - n;
      if (count <= 0) continue;
      const int64_t row = n - p.first;
      block<T>(count, x, R, K, p.w + row * p.stride, p.stride, sums.data());
      for (int64_t r = 0; r < R; r++)
        for (int64_t i = 0; i < count; i++) {
          float s = sums[r * BLOCK + i];
          if (p.b) s += widen(p.b[row + i]);
          if (residual) s += widen(residual[r * total + n + i]);
          narrow(s, out + r * total + n + i);
        }
    }
  });
}

// Linear layers that share an input, after an RMS norm if there is one.
template <typename T>
struct Linears {
  int64_t R, K, N;
  const T* norm;
  double eps;
  std::vector<Part<T>> parts;

  Linears(int64_t rows, const std::optional<Tensor>& norm, double eps, const std::vector<Tensor>& weights,
          const std::vector<std::optional<Tensor>>& biases)
      : R(rows), K(weights[0].size(1)), norm(pointer<T>(norm)), eps(eps), parts(parts_of<T>(weights, biases)) {
    N = parts.back().first + parts.back().count;
  }

  int64_t scratch() const { return 0; }
  int64_t work() const { return N * K; }

  // Called by every thread of a team. Ends without a barrier.
  void run(const T* x, const T* residual, T* out, float*) const {
    linears<T>(prepare(x, R, K, norm, eps).data(), R, K, parts, residual, out);
  }
};

// Activations of gates, by number: see kernels/linear.py.
inline vec activate(vec g, int64_t kind) {
  const vec one = vec{} + 1.0f;
  if (kind == 0) {  // silu
    const vec e = exp_nonpositive(g < 0 ? g : -g);
    return g * (g < 0 ? e : one) / (one + e);
  }
  if (kind == 1) {  // gelu, by tanh
    const vec z = 0.7978845608028654f * (g + 0.044715f * g * g * g), e = exp_nonpositive((z < 0 ? z : -z) * 2.0f);
    const vec t = (one - e) / (one + e);
    return 0.5f * g * (one + (z < 0 ? -t : t));
  }
  return g < 0 ? vec{} : g;  // relu
}

// A gated MLP of R rows.
template <typename T>
struct GatedMLP {
  int64_t R, K, inner, N, activation;
  const T *norm, *gate, *up, *down;
  int64_t gate_row, up_row, down_row;
  double eps;

  GatedMLP(int64_t rows, const std::optional<Tensor>& norm, double eps, const Tensor& gate,
           const std::optional<Tensor>& up, const Tensor& down, int64_t activation)
      : R(rows), K(gate.size(1)), inner(down.size(1)), N(down.size(0)), activation(activation),
        norm(pointer<T>(norm)), gate((const T*)gate.const_data_ptr()), up(pointer<T>(up)),
        down((const T*)down.const_data_ptr()), gate_row(gate.stride(0)), up_row(up ? up->stride(0) : gate_row),
        down_row(down.stride(0)), eps(eps) {
    STD_TORCH_CHECK(gate.size(0) == (up ? inner : 2 * inner) && (!up || (up->size(0) == inner && up->size(1) == K)),
                    "gated_mlp: weights of ", gate.size(0), " and ", up ? up->size(0) : 0, " neurons before one of ",
                    inner);
    if (!up) this->up = this->gate + inner * gate_row;  // one weight holds both
  }

  int64_t scratch() const { return R * inner; }
  int64_t work() const { return inner * K; }

  // Called by every thread of a team; `hidden` is theirs in common. Ends without a barrier.
  void run(const T* x, const T* residual, T* out, float* hidden) const {
    const std::vector<float> rows = prepare(x, R, K, norm, eps);
    std::vector<float> a(R * BLOCK + W), b(R * BLOCK + W);  // read by whole vectors
    share(inner, [&](int64_t n, int64_t count) {
      block<T>(count, rows.data(), R, K, gate + n * gate_row, gate_row, a.data());
      block<T>(count, rows.data(), R, K, up + n * up_row, up_row, b.data());
      for (int64_t i = 0; i < R * BLOCK; i += W)
        store(a.data() + i, activate(load(a.data() + i), activation) * load(b.data() + i));
      for (int64_t r = 0; r < R; r++)
        for (int64_t i = 0; i < count; i++) hidden[r * inner + spread_index<T>(n + i, inner)] = a[r * BLOCK + i];
    });
#pragma omp barrier
    share(N, [&](int64_t n, int64_t count) {
      block<T>(count, hidden, R, inner, down + n * down_row, down_row, a.data());
      for (int64_t r = 0; r < R; r++)
        for (int64_t i = 0; i < count; i++) {
          const float s = a[r * BLOCK + i];
          narrow(residual ? s + widen(residual[r * N + n + i]) : s, out + r * N + n + i);
        }
    });
  }
};

}  // namespace skipc
