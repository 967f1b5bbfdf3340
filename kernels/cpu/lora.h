// Low-rank adapters on linear layers of a few rows. Semantics: kernels/lora.py.
#pragma once

#include "products.h"

namespace skipc {

constexpr int64_t MOST_ADAPTERS = 8;  // of a row
constexpr int64_t PACK = 16;          // outputs that lie together in packed second matrices: see kernels/lora.py

// The adapters of one linear layer, by slot.
template <typename T>
struct Low {
  const T *a = nullptr, *b = nullptr;  // none
  const int64_t* where = nullptr;      // for each slot: rank, and where its matrices begin; and the largest rank
  const float* scales = nullptr;
  int64_t room = 0;
  bool packed = false;
  int64_t row = 0;     // of the outputs, where a part begins that is not all of the layer
  bool own = true;     // false if another part has the same first matrices
  int64_t bridge = 0;  // where its rows of the bridge begin

  Low() = default;
  Low(const Tensor& a, const Tensor& b, const Tensor& where, const Tensor& scales)
      : a((const T*)a.const_data_ptr()), b((const T*)b.const_data_ptr()), where((const int64_t*)where.const_data_ptr()),
        scales((const float*)scales.const_data_ptr()), room(this->where[3]), packed(b.dim() == 1) {}

  int64_t rank(int64_t slot) const { return where[4 * slot]; }
  const T* first(int64_t slot) const { return a + where[4 * slot + 1]; }
  const T* second(int64_t slot) const { return b + where[4 * slot + 2]; }
  int64_t at(int64_t r, int64_t i) const { return bridge + (r * MOST_ADAPTERS + i) * room; }
  int64_t scratch(int64_t R) const { return own ? R * MOST_ADAPTERS * room : 0; }
};

// The `at`-th of a list of adapters (see parts_of).
template <typename T>
Low<T> low_of(const std::vector<std::optional<Tensor>>& lora, int64_t at) {
  if (lora.empty() || !lora[4 * at].has_value()) return {};
  return {*lora[4 * at], *lora[4 * at + 1], *lora[4 * at + 2], *lora[4 * at + 3]};
}

// Which adapters rows want: row r of R belongs to group r * groups / R, and each group names `per` slots (or -1), and how
// much of each it wants. Groups that a router made are tokens; layers of other rows must have nothing for them. Read at each
// call: what a tensor holds may change where the tensor does not.
struct Wanted {
  const int64_t* table = nullptr;
  const float* gates = nullptr;

  Wanted() = default;
  explicit Wanted(const std::vector<std::optional<Tensor>>& lora) {  // its last two
    if (lora.empty()) return;
    table = (const int64_t*)lora[lora.size() - 2]->const_data_ptr();
    gates = (const float*)lora.back()->const_data_ptr();
  }

  int64_t groups(int64_t rows) const {
    if (!table) return 0;
    return table[0] >= 0 ? table[0] : -table[0] == rows ? rows : 0;
  }
  int64_t per() const { return table[1]; }
  template <typename... Parts>
  void check(int64_t rows, const char* kernel, const Parts&... parts) const {
    if (table && table[0] < 0 && -table[0] != rows) (check_empty(rows, kernel, parts), ...);
    if (!groups(rows)) return;
    STD_TORCH_CHECK(rows % groups(rows) == 0, kernel, ": adapters for ", groups(rows), " rows in a call of ", rows);
    STD_TORCH_CHECK(per() <= MOST_ADAPTERS, kernel, ": ", per(), " adapters for a row, and ", MOST_ADAPTERS, " are possible");
  }
  template <typename Parts>
  void check_empty(int64_t rows, const char* kernel, const Parts& parts) const {
    for (const auto& p : parts)
      for (int64_t i = 0; p.low.a && i < -table[0] * per(); i++)
        STD_TORCH_CHECK(table[2 + i] < 0 || !p.low.rank(table[2 + i]), kernel, ": a router decided for ", -table[0],
                        " tokens, and adapters of a layer met ", rows);
  }
  // Calls `body(first, end, i, slot)` for stretches of rows that share their i-th slot.
  template <typename Body>
  void stretches(int64_t R, Body body) const {
    const int64_t n = groups(R), k = per(), size = n ? R / n : 0;
    for (int64_t i = 0; i < k; i++)
      for (int64_t g = 0; g < n;) {
        const int64_t slot = table[2 + g * k + i], first = g;
        while (++g < n && table[2 + g * k + i] == slot) {}
        if (slot >= 0) body(first * size, g * size, i, slot);
      }
  }
  float gate(int64_t r, int64_t R, int64_t i) const { return gates[2 + r * groups(R) / R * per() + i]; }
};

// x times the first matrices of what each row wants, times gate and scale: what `expand` goes on from. Called by every
// thread of a team, with the same x; `bridge` is theirs in common. True, behind a barrier, if there is anything.
template <typename T, typename Parts>
bool shrink(const float* x, int64_t R, int64_t K, const Parts& parts, const Wanted& wanted, float* bridge) {
  if (!wanted.groups(R)) return false;
  constexpr int64_t UNIT = 4;  // rows of a first matrix that a task takes
  const auto each = [&](auto body) {
    int64_t task = 0;
    wanted.stretches(R, [&](int64_t first, int64_t end, int64_t i, int64_t slot) {  // whose matrices lie together
      for (const auto& p : parts)
        if (p.low.a && p.low.own)
          for (int64_t j = 0, rank = p.low.rank(slot); j < rank; j += UNIT) body(task++, p.low, first, end, i, slot, j);
    });
    return task;
  };
  const int64_t total = each([](auto...) {});
  if (!total) return false;
  const int64_t id = omp_get_thread_num(), of = omp_get_num_threads(), begin = total * id / of, stop = total * (id + 1) / of;
  std::vector<float> sums(R * BLOCK);
  each([&](int64_t task, const Low<T>& low, int64_t first, int64_t end, int64_t i, int64_t slot, int64_t j) {
    if (task < begin || task >= stop) return;
    const int64_t count = std::min(UNIT, low.rank(slot) - j), rows = end - first;
    const T* a = low.first(slot) + j * K;
    if (count == UNIT)
      block<T, UNIT>(x + first * K, rows, K, a, K, sums.data());
    else
      for (int64_t n = 0; n < count; n++) block<T, 1>(x + first * K, rows, K, a + n * K, K, sums.data() + n);
    for (int64_t r = 0; r < rows; r++) {
      const float factor = wanted.gate(first + r, R, i) * low.scales[slot];
      float* to = bridge + low.at(first + r, i) + j;
      for (int64_t n = 0; n < count; n++) to[n] = factor * sums[r * BLOCK + n];
    }
  });
#pragma omp barrier
  return true;
}

// sums[r * BLOCK + n] += the second matrices times `bridge`, for `count` outputs of a part from `row` on.
template <typename T>
void expand(const Low<T>& low, int64_t R, int64_t row, int64_t count, const Wanted& wanted, const float* bridge, float* sums) {
  row += low.row;
  wanted.stretches(R, [&](int64_t first, int64_t end, int64_t i, int64_t slot) {
    const int64_t rank = low.rank(slot);
    if (!rank) return;
    const T* b = low.second(slot);
    const auto add = [&](const auto* at, int64_t step) {  // `BLOCK` outputs, of which one more rank lies `step` further
      for (int64_t r = first; r < end; r++) {
        const float* c = bridge + low.at(r, i);
        vec even = load(sums + r * BLOCK), odd = {};
        int64_t j = 0;
        for (; j + 2 <= rank; j += 2) {
          even += load(at + j * step) * c[j];
          odd += load(at + (j + 1) * step) * c[j + 1];
        }
        if (j < rank) even += load(at + j * step) * c[j];
        store(sums + r * BLOCK, even + odd);
      }
    };
    if (low.packed && count == BLOCK && row % BLOCK == 0) {
      const T* at = b + row / PACK * PACK * rank + row % PACK;
      for (int64_t n = 0; n < rank * PACK * int64_t(sizeof(T)); n += 64) fetch((const char*)at + AHEAD / 2 + n);
      return add(at, PACK);
    }
    if (!low.packed && count == BLOCK) {
      std::vector<float> turned(rank * BLOCK);
      for (int64_t n = 0; n < BLOCK; n++)
        for (int64_t j = 0; j < rank; j++) turned[j * BLOCK + n] = widen(b[(row + n) * rank + j]);
      return add(turned.data(), BLOCK);
    }
    for (int64_t n = 0; n < count; n++) {
      const int64_t o = row + n, step = low.packed ? PACK : 1;
      const T* at = low.packed ? b + o / PACK * PACK * rank + o % PACK : b + o * rank;
      for (int64_t r = first; r < end; r++) {
        const float* c = bridge + low.at(r, i);
        float total = 0;
        for (int64_t j = 0; j < rank; j++) total += widen(at[j * step]) * c[j];
        sums[r * BLOCK + n] += total;
      }
    }
  });
}

}  // namespace skipc
