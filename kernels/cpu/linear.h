// Linear layers of a few rows, and gated MLPs made of them, for a team of threads: what runs inside a parallel region.
#pragma once

#include "lora.h"
#include "tiles.h"

namespace skipc {

// Rows of x, as products in one thread read them.
template <typename T>
struct Operand {
  const float* x;  // see `spread`
  int64_t R, K;
  std::optional<Tiles> tiles;

  Operand(const float* x, int64_t R, int64_t K) : x(x), R(R), K(K) {
    if constexpr (std::is_same_v<T, bf16>)
      if (tiles_used()) tiles.emplace(x, R, K);
  }
};

// One of several weights that are multiplied in one go, and where its outputs begin.
template <typename T>
struct Part {
  const T *w, *b;
  int64_t stride, first, count;
  Low<T> low;
  Product<T> product = nullptr;  // see `tune`

  // sums[r * BLOCK + n]: x times `count` weights from `row` on.
  void multiply(Operand<T>& rows, int64_t row, int64_t count, float* sums) const {
    const T* at = w + row * stride;
    if constexpr (std::is_same_v<T, bf16>)
      if (rows.tiles) return rows.tiles->multiply(at, stride, count, sums);
    count == BLOCK ? product(rows.x, rows.R, rows.K, at, stride, sums)
                   : block<T>(count, rows.x, rows.R, rows.K, at, stride, sums);
  }
};

// `lora`: for each weight from `at` on its adapters' operands, or None four times;
// nothing at all if no weight has any.
template <typename T>
std::vector<Part<T>> parts_of(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                              const std::vector<std::optional<Tensor>>& lora = {}, int64_t at = 0) {
  std::vector<Part<T>> parts;
  int64_t first = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const Tensor& w = weights[i];
    parts.push_back({(const T*)w.const_data_ptr(), pointer<T>(biases[i]), w.stride(0), first, w.size(0),
                     low_of<T>(lora, at + i)});
    first += w.size(0);
  }
  return parts;
}

// Has parts multiply in the way that is best for R rows and all their weights together.
template <typename T>
void tune(std::vector<Part<T>>& parts, int64_t R, int64_t K) {
  if (parts.empty()) return;
  const Product<T> product = product_for<T>(R, K, parts.back().first + parts.back().count);
  for (Part<T>& p : parts) p.product = product;
}

// Gives each part its place in the bridge; how much room all take.
template <typename T>
int64_t place_bridges(std::vector<Part<T>>& parts, int64_t R) {
  int64_t at = 0;
  for (Part<T>& p : parts) {
    p.low.bridge = p.low.own ? at : p.low.bridge;
    at += p.low.scratch(R);
  }
  return at;
}

// out = x @ w.T + b + residual for all parts, and what adapters add. Called by every thread of a team; ends without a
// barrier. `bridge` is theirs in common.
template <typename T, typename Out>
void linears(const float* x, int64_t R, int64_t K, const std::vector<Part<T>>& parts, const T* residual, Out* out,
             const Wanted& wanted, float* bridge) {
  const bool adapted = shrink<T>(x, R, K, parts, wanted, bridge);
  const int64_t total = parts.back().first + parts.back().count;
  Operand<T> rows(x, R, K);
  std::vector<float> sums(R * BLOCK);
  share(total, [&](int64_t begin, int64_t size) {
    for (const Part<T>& p : parts) {
      const int64_t n = std::max(begin, p.first), count = std::min(begin + size, p.first + p.count) - n;
      if (count <= 0) continue;
      const int64_t row = n - p.first;
      p.multiply(rows, row, count, sums.data());
      if (adapted && p.low.a) expand(p.low, R, row, count, wanted, bridge, sums.data());
      for (int64_t r = 0; r < R; r++) {
        const int64_t to = r * total + n;
        if (count == BLOCK) {
          vec s = load(sums.data() + r * BLOCK);
          if (p.b) s += load(p.b + row);
          if (residual) s += load(residual + to);
          store(out + to, s);
          continue;
        }
        for (int64_t i = 0; i < count; i++) {
          float s = sums[r * BLOCK + i];
          if (p.b) s += widen(p.b[row + i]);
          if (residual) s += widen(residual[to + i]);
          narrow(s, out + to + i);
        }
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
  Wanted wanted;
  int64_t bridge;

  Linears(int64_t rows, const std::optional<Tensor>& norm, double eps, const std::vector<Tensor>& weights,
          const std::vector<std::optional<Tensor>>& biases, const std::vector<std::optional<Tensor>>& lora)
      : R(rows), K(weights[0].size(1)), norm(pointer<T>(norm)), eps(eps), parts(parts_of<T>(weights, biases, lora)),
        wanted(lora) {
    N = parts.back().first + parts.back().count;
    tune(parts, R, K);
    bridge = place_bridges(parts, R);
  }

  void check() const { wanted.check(R, "skinny_linear", parts); }
  int64_t scratch() const { return bridge; }
  int64_t work() const { return N * K; }

  // Called by every thread of a team; `scratch` is theirs in common. Ends without a barrier.
  void run(const T* x, const T* residual, T* out, float* scratch) const {
    linears<T>(prepare(x, R, K, norm, eps).data(), R, K, parts, residual, out, wanted, scratch);
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
  const T* norm;
  double eps;
  std::vector<Part<T>> entry, exit;  // gate and up; down
  Wanted wanted;
  int64_t bridge;

  GatedMLP(int64_t rows, const std::optional<Tensor>& norm, double eps, const Tensor& gate,
           const std::optional<Tensor>& up, const Tensor& down, int64_t activation,
           const std::vector<std::optional<Tensor>>& lora)
      : R(rows), K(gate.size(1)), inner(down.size(1)), N(down.size(0)), activation(activation),
        norm(pointer<T>(norm)), eps(eps), exit(parts_of<T>({down}, {{}}, lora, 2)), wanted(lora) {
    STD_TORCH_CHECK(gate.size(0) == (up ? inner : 2 * inner) && (!up || (up->size(0) == inner && up->size(1) == K)),
                    "gated_mlp: weights of ", gate.size(0), " and ", up ? up->size(0) : 0, " neurons before one of ",
                    inner);
    if (up) {
      entry = parts_of<T>({gate, *up}, {{}, {}}, lora);
    } else {  // one weight, whose second half is up
      entry = parts_of<T>({gate}, {{}}, lora);
      entry.push_back(entry[0]);
      entry[1].w += inner * entry[1].stride;
      entry[1].low.row = inner;
      entry[1].low.own = false;
    }
    tune(entry, R, K);
    tune(exit, R, inner);
    bridge = std::max(place_bridges(entry, R), place_bridges(exit, R));
  }

  void check() const { wanted.check(R, "gated_mlp", entry, exit); }
  int64_t scratch() const { return R * inner + bridge; }
  int64_t work() const { return inner * K; }

  // Called by every thread of a team; `hidden` is theirs in common. Ends without a barrier.
  void run(const T* x, const T* residual, T* out, float* hidden) const {
    float* const between = hidden + R * inner;
    const std::vector<float> normed = prepare(x, R, K, norm, eps);
    const bool adapted = shrink<T>(normed.data(), R, K, entry, wanted, between);
    enter(Operand<T>(normed.data(), R, K), adapted, hidden);
#pragma omp barrier
    linears<T>(hidden, R, inner, exit, residual, out, wanted, between);
  }

  // hidden = activation of gate times up, as products of the exit read it. Called by every thread of a team.
  void enter(Operand<T> rows, bool adapted, float* hidden) const {
    const float* const between = hidden + R * inner;
    std::vector<float> a(R * BLOCK + W), b(R * BLOCK + W);  // read by whole vectors
    const auto product = [&](const Part<T>& p, int64_t n, int64_t count, float* sums) {
      p.multiply(rows, n, count, sums);
      if (adapted && p.low.a) expand(p.low, R, n, count, wanted, between, sums);
    };
    share(inner, [&](int64_t n, int64_t count) {
      product(entry[0], n, count, a.data());
      product(entry[1], n, count, b.data());
      for (int64_t i = 0; i < R * BLOCK; i += W)
        store(a.data() + i, activate(load(a.data() + i), activation) * load(b.data() + i));
      for (int64_t r = 0; r < R; r++) spread_block<T>(a.data() + r * BLOCK, n, count, hidden + r * inner, inner);
    });
  }
};

}  // namespace skipc
