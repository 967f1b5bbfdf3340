// Products of a few rows with a weight at memory bandwidth, for a team of threads.
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

// Elements `first` to `first + count` of a row of `size`, at most W of them and `first` a multiple of W, to where they lie
// after `spread`.
template <typename T>
inline void spread_block(const float* from, int64_t first, int64_t count, float* row, int64_t size) {
  if (sizeof(T) == 2 && first < size / (2 * W) * (2 * W)) {  // all of them, then
    float* const to = row + first / (2 * W) * (2 * W) + first % (2 * W) / 2;
    for (int i = 0; i < W / 2; i++) {
      to[i] = from[2 * i];
      to[W + i] = from[2 * i + 1];
    }
  } else {
    std::copy_n(from, count, row + first);
  }
}

// Rows of x as the kernels want them, after an RMS norm if there is one (in fp32, rounded nowhere but in tiles.h).
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

// How weights are read, unless a table says otherwise (see product_for). All ways give the same bits.
//
// How many bytes ahead of reading weights are called into the second-level cache: that far, rows of any length follow each
// other, and the few places that the first level has for lines under way stay free. A fifth faster than what hardware
// does by itself.
constexpr int64_t AHEAD = 8192;
// How many weight rows go together with one row of x: more would read from as many places in a page at once, which memory
// dislikes.
constexpr int PAIR = 2;
// And with several: wider tiles would spill.
constexpr int HALF = 4;

// out[r * NB + n]: NB weight rows times RB rows of x. Every output sees the same operations in the same order, whatever
// NB and RB are, so a row's result does not depend on its company. FAR: how many bytes ahead weights are called; 0: not.
template <typename T, int NB, int RB, int64_t FAR>
inline void tile(const float* x, int64_t K, const T* w, int64_t stride, float* out, int64_t ldo) {
  vec acc[RB][NB] = {};
  int64_t k = 0;
  for (; k + STEP<T> <= K; k += STEP<T>)
    for (int n = 0; n < NB; n++) {
      const T* at = w + n * stride + k;
      if constexpr (FAR > 0) fetch((const char*)at + FAR);
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

// out[r * BLOCK + n]: one row of x times NB rows of w.
template <typename T, int NB, int64_t FAR = AHEAD, int TOGETHER = PAIR>
inline void block_of_one(const float* x, int64_t K, const T* w, int64_t stride, float* out) {
  constexpr int N = std::min(NB, TOGETHER);
  for (int n = 0; n < NB; n += N) tile<T, N, 1, FAR>(x, K, w + n * stride, stride, out + n, BLOCK);
}

// out[r * BLOCK + n]: all R rows of x times NB rows of w, which stay in the first-level cache after the first tile.
template <typename T, int NB, int64_t FAR = AHEAD, int TOGETHER = HALF>
inline void block_of_several(const float* x, int64_t R, int64_t K, const T* w, int64_t stride, float* out) {
  constexpr int N = std::min(NB, TOGETHER);
  for (int n = 0; n < NB; n += N) {
    const T* wn = w + n * stride;
    float* to = out + n;
    int64_t r = 0;
    if (R >= 4) {
      tile<T, N, 4, FAR>(x, K, wn, stride, to, BLOCK);
      for (r = 4; r + 4 <= R; r += 4) tile<T, N, 4, 0>(x + r * K, K, wn, stride, to + r * BLOCK, BLOCK);
    }
    switch (R - r) {
      case 3: tile<T, N, 3, FAR>(x + r * K, K, wn, stride, to + r * BLOCK, BLOCK); break;
      case 2: tile<T, N, 2, FAR>(x + r * K, K, wn, stride, to + r * BLOCK, BLOCK); break;
      case 1: tile<T, N, 1, FAR>(x + r * K, K, wn, stride, to + r * BLOCK, BLOCK); break;
    }
  }
}

template <typename T, int NB>
inline void block(const float* x, int64_t R, int64_t K, const T* w, int64_t stride, float* out) {
  R == 1 ? block_of_one<T, NB>(x, K, w, stride, out) : block_of_several<T, NB>(x, R, K, w, stride, out);
}

template <typename T>
inline void block(int64_t count, const float* x, int64_t R, int64_t K, const T* w, int64_t stride, float* out) {
  if (count == BLOCK) return block<T, BLOCK>(x, R, K, w, stride, out);
  for (int64_t n = 0; n < count; n++) block<T, 1>(x, R, K, w + n * stride, stride, out + n);
}

// What `block` does for BLOCK rows of w, in one of several ways.
template <typename T>
using Product = void (*)(const float* x, int64_t R, int64_t K, const T* w, int64_t stride, float* out);

// The way in which R rows of x are best multiplied by weights of N rows and K columns: what tune_products was told, else
// as `block` does it. Asked once for each kernel, not at each block.
template <typename T>
Product<T> product_for(int64_t R, int64_t K, int64_t N);

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

}  // namespace skipc
