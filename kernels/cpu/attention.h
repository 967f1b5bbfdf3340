// Attention of a few queries over a long cache, for a team of threads: what runs inside a parallel region.
#pragma once

#include "common.h"

namespace skipc {

constexpr int64_t CHUNK = 256;  // keys a task takes; fixed, so that a result does not depend on threads or on company
constexpr int64_t SLICE = 8;    // rows of queries it takes: few heads of keys would not keep all threads busy

// Dot products of MB queries (fp32, rows of length D) with NB keys.
template <typename T, int MB, int NB>
inline void dots(const float* q, int64_t D, const T* k, int64_t stride, float* out) {
  vec acc[MB][NB] = {};
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    vec kv[NB];
    for (int n = 0; n < NB; n++) kv[n] = load(k + n * stride + d);
    for (int m = 0; m < MB; m++) {
      const vec qv = load(q + m * D + d);
      for (int n = 0; n < NB; n++) acc[m][n] += qv * kv[n];
    }
  }
  float total[MB * NB];
  sums<MB * NB>(acc[0], total);
  for (int m = 0; m < MB; m++)
    for (int n = 0; n < NB; n++) {
      float s = total[m * NB + n];
      for (int64_t j = d; j < D; j++) s += q[m * D + j] * widen(k[n * stride + j]);
      out[m * CHUNK + n] = s;
    }
}

template <typename T, int MB>
void scores(const float* q, int64_t D, const T* k, int64_t stride, int64_t count, float* out) {
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) dots<T, MB, 4>(q, D, k + n * stride, stride, out + n);
  for (; n < count; n++) dots<T, MB, 1>(q, D, k + n * stride, stride, out + n);
}

// out[m][d] = sum over keys of p[m][n] * v[n][d], for MB rows.
template <typename T, int MB, int DB>
inline void mix(const float* p, const T* v, int64_t stride, int64_t count, float* out, int64_t D) {
  vec acc[MB][DB] = {};
  for (int64_t n = 0; n < count; n++) {
    vec vv[DB];
    for (int d = 0; d < DB; d++) vv[d] = load(v + n * stride + d * W);
    for (int m = 0; m < MB; m++)
      for (int d = 0; d < DB; d++) acc[m][d] += vv[d] * p[m * CHUNK + n];
  }
  for (int m = 0; m < MB; m++)
    for (int d = 0; d < DB; d++) store(out + m * D + d * W, acc[m][d]);
}

template <typename T, int MB>
void values(const float* p, const T* v, int64_t stride, int64_t count, float* out, int64_t D) {
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) mix<T, MB, 4>(p, v + d, stride, count, out + d, D);
  for (; d + W <= D; d += W) mix<T, MB, 1>(p, v + d, stride, count, out + d, D);
  for (; d < D; d++)
    for (int m = 0; m < MB; m++) {
      float s = 0;
      for (int64_t n = 0; n < count; n++) s += p[m * CHUNK + n] * widen(v[n * stride + d]);
      out[m * D + d] = s;
    }
}

struct Shape {
  int64_t B, H, Q, D, Hkv, L, Dv;
  int64_t groups() const { return H / Hkv; }
};

struct Mask {
  enum Kind { NONE, BOOL, FLOAT, BF16 } kind = NONE;
  const char* data = nullptr;
  int64_t stride[4] = {};  // in elements; 0 where it is broadcast
  float at(int64_t b, int64_t h, int64_t q, int64_t l) const {
    const int64_t i = b * stride[0] + h * stride[1] + q * stride[2] + l * stride[3];
    if (kind == BOOL) return data[i] ? 0.0f : -std::numeric_limits<float>::infinity();
    if (kind == FLOAT) return ((const float*)data)[i];
    return widen(((const bf16*)data)[i]);
  }
};

struct Options {
  bool causal;
  float scale, softcap;
};

// One chunk of keys for `rows` queries of one key head, from `start` on: unnormalised sums, with each row's maximum and
// weight.
template <typename T>
void chunk(const Shape& s, const Options& o, const Mask& mask, const float* q, const T* k, int64_t k_stride, const T* v,
           int64_t v_stride, int64_t b, int64_t g, int64_t start, int64_t rows, int64_t first, int64_t count, float* p,
           float* top, float* weight, float* out) {
  const float never = -std::numeric_limits<float>::infinity();
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) scores<T, 4>(q + m * s.D, s.D, k, k_stride, count, p + m * CHUNK);
  if (rows - m == 3) scores<T, 3>(q + m * s.D, s.D, k, k_stride, count, p + m * CHUNK);
  if (rows - m == 2) scores<T, 2>(q + m * s.D, s.D, k, k_stride, count, p + m * CHUNK);
  if (rows - m == 1) scores<T, 1>(q + m * s.D, s.D, k, k_stride, count, p + m * CHUNK);
  const int64_t padded = (count + W - 1) / W * W;
  for (m = 0; m < rows; m++) {
    float* row = p + m * CHUNK;
    const int64_t h = g * s.groups() + (start + m) / s.Q, i = (start + m) % s.Q;
    for (int64_t n = 0; n < count; n++) row[n] *= o.scale;
    if (o.softcap > 0)
      for (int64_t n = 0; n < count; n++) row[n] = std::tanh(row[n] / o.softcap) * o.softcap;
    if (mask.kind != Mask::NONE)
      for (int64_t n = 0; n < count; n++) row[n] += mask.at(b, h, i, first + n);
    if (o.causal)
      for (int64_t n = std::max<int64_t>(0, i + 1 - first); n < count; n++) row[n] = never;
    for (int64_t n = count; n < padded; n++) row[n] = never;
    float best = never;
    for (int64_t n = 0; n < count; n++) best = row[n] > best ? row[n] : best;
    top[m] = best;
    vec total = {};
    if (best == never) {
      std::memset(row, 0, padded * sizeof(float));
    } else {
      for (int64_t n = 0; n < padded; n += W) {
        const vec e = exp_nonpositive(load(row + n) - best);
        store(row + n, e);
        total += e;
      }
    }
    weight[m] = sum(total);
  }
  for (m = 0; m + 4 <= rows; m += 4) values<T, 4>(p + m * CHUNK, v, v_stride, count, out + m * s.Dv, s.Dv);
  if (rows - m == 3) values<T, 3>(p + m * CHUNK, v, v_stride, count, out + m * s.Dv, s.Dv);
  if (rows - m == 2) values<T, 2>(p + m * CHUNK, v, v_stride, count, out + m * s.Dv, s.Dv);
  if (rows - m == 1) values<T, 1>(p + m * CHUNK, v, v_stride, count, out + m * s.Dv, s.Dv);
}

// Keys and values of a cache: where element (row, head, position, 0) lies.
template <typename T>
struct Cache {
  T* data;
  int64_t batch, head, row;
  explicit Cache(const Tensor& t)
      : data((T*)t.const_data_ptr()), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)) {}
  T* at(int64_t b, int64_t h, int64_t l) const { return data + b * batch + h * head + l * row; }
};

inline Mask mask_of(const std::optional<Tensor>& mask) {
  Mask m;
  if (!mask.has_value()) return m;
  const ScalarType dtype = mask->scalar_type();
  m.kind = dtype == ScalarType::Bool ? Mask::BOOL : dtype == ScalarType::Float ? Mask::FLOAT : Mask::BF16;
  m.data = (const char*)mask->const_data_ptr();
  const int64_t skip = 4 - mask->dim();
  for (int64_t i = skip; i < 4; i++) m.stride[i] = mask->size(i - skip) == 1 ? 0 : mask->stride(i - skip);
  return m;
}

template <typename T>
struct Attention {
  Shape s;
  Options o;
  Mask mask;
  Cache<const T> k, v;
  const int64_t* live;
  int64_t live_stride;

  Attention(const Shape& s, const Options& o, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
            const std::optional<Tensor>& live)
      : s(s), o(o), mask(mask_of(mask)), k(k), v(v),
        live(live.has_value() ? (const int64_t*)live->const_data_ptr() : nullptr),
        live_stride(live.has_value() && live->size(0) > 1 ? live->stride(0) : 0) {}

  int64_t record() const { return s.groups() * s.Q * (s.Dv + 2); }
  int64_t scratch() const { return s.B * s.Hkv * (s.L / CHUNK + 1) * record(); }

  struct Task {
    int64_t b, g, first, count;
  };

  // Called by every thread of a team. `queries` is fp32 [B, H, Q, D], `partial` their common scratch. The result of
  // (row, head, query) is handed to `write(b, h, i, values)`, on some thread. Ends with a barrier.
  template <typename Write>
  void run(const float* queries, float* partial, Write write) const {
    const int64_t M = s.groups() * s.Q, size = record();
    std::vector<Task> tasks;
    std::vector<int64_t> begins;  // of the tasks of each (row, key head)
    for (int64_t b = 0; b < s.B; b++) {
      // Chunks are aligned to the cache, not to the live part: a row's sums are grouped alike whatever is live.
      int64_t start = live ? std::max<int64_t>(0, live[b * live_stride]) : 0;
      const int64_t stop = live ? std::min(s.L, live[b * live_stride + 1]) : s.L;
      start = start / W * W;
      for (int64_t g = 0; g < s.Hkv; g++) {
        begins.push_back(tasks.size());
        for (int64_t c = start / CHUNK * CHUNK; c < stop; c += CHUNK) {
          const int64_t first = std::max(c, start);
          tasks.push_back({b, g, first, std::min(c + CHUNK, stop) - first});
        }
      }
    }
    begins.push_back(tasks.size());
    const int64_t count = tasks.size();
    const int64_t slices = (M + SLICE - 1) / SLICE;
    std::vector<float> p(SLICE * CHUNK), total(s.Dv);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < count * slices; t++) {
      const Task& task = tasks[t / slices];
      const int64_t start = t % slices * SLICE, rows = std::min(SLICE, M - start);
      float* const to = partial + t / slices * size;
      chunk<T>(s, o, mask, queries + ((task.b * s.H + task.g * s.groups()) * s.Q + start) * s.D,
               k.at(task.b, task.g, task.first), k.row, v.at(task.b, task.g, task.first), v.row, task.b, task.g, start,
               rows, task.first, task.count, p.data(), to + start, to + M + start, to + 2 * M + start * s.Dv);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.B * s.H * s.Q; row++) {
      const int64_t b = row / (s.H * s.Q), h = row / s.Q % s.H, i = row % s.Q;
      const int64_t pair = b * s.Hkv + h / s.groups(), m = h % s.groups() * s.Q + i;
      float best = -std::numeric_limits<float>::infinity(), weight = 0;
      for (int64_t t = begins[pair]; t < begins[pair + 1]; t++) best = std::max(best, partial[t * size + m]);
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t t = begins[pair]; t < begins[pair + 1]; t++) {
        const float* from = partial + t * size;
        const float factor = from[M + m] > 0 ? std::exp(from[m] - best) : 0.0f;
        weight += factor * from[M + m];
        if (factor > 0)
          for (int64_t d = 0; d < s.Dv; d++) total[d] += factor * from[2 * M + m * s.Dv + d];
      }
      const float norm = weight > 0 ? 1.0f / weight : 0.0f;  // nothing to attend to: zero, as in torch
      for (int64_t d = 0; d < s.Dv; d++) total[d] *= norm;
      write(b, h, i, total.data());
    }
  }
};

}  // namespace skipc
