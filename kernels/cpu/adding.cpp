// What rows want of the adapters of one layer, however many they are. Semantics: kernels/lora.py.
#include "lora.h"

namespace skipc {

constexpr int64_t CHUNK = 16;  // rows of one slot that a task takes

// Rows that want one slot as their i-th, and how much of it.
struct Task {
  int64_t slot;
  std::vector<int64_t> rows;
  std::vector<float> gates;
};

// For each i the tasks of all rows: within one i no row occurs twice.
inline std::vector<std::vector<Task>> tasks_of(const Wanted& wanted, int64_t R) {
  const int64_t n = wanted.groups(R), size = n ? R / n : 0;
  std::vector<std::vector<Task>> tasks(n ? wanted.per() : 0);
  for (size_t i = 0; i < tasks.size(); i++) {
    std::vector<std::pair<int64_t, int64_t>> rows;  // slot and row
    for (int64_t g = 0; g < n; g++)
      if (const int64_t slot = wanted.table[2 + g * wanted.per() + i]; slot >= 0)
        for (int64_t r = g * size; r < (g + 1) * size; r++) rows.emplace_back(slot, r);
    std::stable_sort(rows.begin(), rows.end(), [](auto a, auto b) { return a.first < b.first; });
    for (auto [slot, r] : rows) {
      auto& of = tasks[i];
      if (of.empty() || of.back().slot != slot || int64_t(of.back().rows.size()) == CHUNK) of.push_back({slot, {}, {}});
      of.back().rows.push_back(r);
      of.back().gates.push_back(wanted.gate(r, R, i));
    }
  }
  return tasks;
}

// `bridge`: [rows, rank], of a task.
template <typename T>
void shrink_rows(const T* x, int64_t K, const Low<T>& low, const Task& task, std::vector<float>& bridge) {
  const int64_t R = task.rows.size(), rank = low.rank(task.slot);
  std::vector<float> rows(R * K), sums(R * BLOCK);
  for (int64_t r = 0; r < R; r++) spread(x + task.rows[r] * K, rows.data() + r * K, K);
  bridge.resize(R * rank);
  const T* a = low.first(task.slot);
  for (int64_t j = 0; j < rank; j += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, rank - j);
    block<T>(count, rows.data(), R, K, a + j * K, K, sums.data());
    for (int64_t r = 0; r < R; r++)
      for (int64_t n = 0; n < count; n++)
        bridge[r * rank + j + n] = sums[r * BLOCK + n] * task.gates[r] * low.scales[task.slot];
  }
}

// W outputs of RB rows more.
template <typename T, int RB>
inline void expand_tile(const T* b, int64_t rank, const float* bridge, T* const* out, int64_t count) {
  vec acc[RB] = {};
  for (int64_t j = 0; j < rank; j++) {
    const vec other = load(b + j * PACK);
    for (int r = 0; r < RB; r++) acc[r] += other * bridge[r * rank + j];
  }
  for (int r = 0; r < RB; r++) {
    float sums[W];
    store(sums, acc[r]);
    for (int64_t o = 0; o < count; o++) narrow(widen(out[r][o]) + sums[o], out[r] + o);
  }
}

template <typename T>
void expand_rows(T* out, int64_t N, const Low<T>& low, const Task& task, const std::vector<float>& bridge) {
  constexpr int RB = 8;
  const int64_t R = task.rows.size(), rank = low.rank(task.slot);
  const T* b = low.second(task.slot);
  T* at[RB];
  for (int64_t o = 0; o < N; o += W)
    for (int64_t r = 0; r < R; r += RB) {
      const int64_t rows = std::min<int64_t>(RB, R - r);
      for (int64_t i = 0; i < rows; i++) at[i] = out + task.rows[r + i] * N + o;
      const T* from = b + o / PACK * PACK * rank + o % PACK;
      const float* with = bridge.data() + r * rank;
      const int64_t count = std::min<int64_t>(W, N - o);
      if (rows == RB)
        expand_tile<T, RB>(from, rank, with, at, count);
      else
        for (int64_t i = 0; i < rows; i++) expand_tile<T, 1>(from, rank, with + i * rank, at + i, count);
    }
}

template <typename T>
void add_rows(const T* x, T* out, int64_t R, int64_t K, int64_t N, const Low<T>& low, const Wanted& wanted) {
  const auto tasks = tasks_of(wanted, R);
#pragma omp parallel
  for (const auto& alike : tasks) {
    std::vector<float> bridge;
#pragma omp for schedule(static)
    for (size_t t = 0; t < alike.size(); t++) {
      if (!low.rank(alike[t].slot)) continue;
      shrink_rows(x, K, low, alike[t], bridge);
      expand_rows(out, N, low, alike[t], bridge);
    }
  }
}

void add_lora(Tensor out, const Tensor& x, const std::vector<std::optional<Tensor>>& lora) {
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous(), "add_lora: x and what it adds to must be contiguous");
  const int64_t R = rows_of(x), K = x.size(x.dim() - 1), N = out.size(out.dim() - 1);
  const Wanted wanted(lora);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Low<T> low = low_of<T>(lora, 0);
    STD_TORCH_CHECK(low.packed, "add_lora: adapters must lie in one memory");
    struct {
      const Low<T>& low;
    } const parts[] = {{low}};
    wanted.check(R, "add_lora", parts);
    add_rows((const T*)x.const_data_ptr(), (T*)out.mutable_data_ptr(), R, K, N, low, wanted);
  };
  if (x.scalar_type() == ScalarType::Float) return run(float());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "add_lora: x must be fp32 or bf16");
  run(bf16());
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) { m.impl("add_lora", TORCH_BOX(&add_lora)); }

}  // namespace skipc
