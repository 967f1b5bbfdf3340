// Adapters folded into weights. Semantics: kernels/merging.py.
#include "lora.h"

namespace skipc {

inline void put(float* to, vec v) { store(to, v); }
inline void put(bf16* to, vec v) {  // to nearest, ties to even; weights are finite
  uvec bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const hvec half = __builtin_convertvector(bits, hvec);
  std::memcpy(to, &half, sizeof(half));
}

// One weight: its rows are outputs and its columns inputs, or the other way round.
template <typename T>
struct Merge {
  const T* weight;
  T* merged;
  int64_t rows, columns;
  Low<T> low;
  bool transposed;
  const Tensor &slots, &factors;

  const T* second(int64_t slot, int64_t output, int64_t j) const {  // outputs of a block lie together
    return low.second(slot) + output / PACK * PACK * low.rank(slot) + j * PACK + output % PACK;
  }

  // Called by every thread of a team.
  void run() const {
    constexpr int RB = 4;
    std::vector<float> amounts;  // for each rank of what is merged, of RB rows
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < rows; first += RB) {
      const int64_t count = std::min<int64_t>(RB, rows - first);
      amounts.clear();
      each([&](int64_t slot, float factor, int64_t j) {
        for (int64_t r = first; r < first + RB; r++) {
          const int64_t row = std::min(r, rows - 1);
          amounts.push_back(factor * widen(transposed ? low.first(slot)[j * rows + row] : *second(slot, row, j)));
        }
      });
      int64_t c = 0;
      for (; c + W <= columns && count == RB; c += W) {
        const T* at = weight + first * columns + c;
        vec sum[RB] = {};
        const float* amount = amounts.data();
        each([&](int64_t slot, float, int64_t j) {
          const vec other = load(transposed ? second(slot, c, j) : low.first(slot) + j * columns + c);
          for (int r = 0; r < RB; r++) sum[r] += other * *amount++;
        });
        for (int r = 0; r < RB; r++) put(merged + (first + r) * columns + c, sum[r] + load(at + r * columns));
      }
      for (; c < columns; c++) {
        float sum[RB] = {};
        const float* amount = amounts.data();
        each([&](int64_t slot, float, int64_t j) {
          const float other = widen(transposed ? *second(slot, c, j) : low.first(slot)[j * columns + c]);
          for (int r = 0; r < RB; r++) sum[r] += other * *amount++;
        });
        for (int r = 0; r < count; r++) {
          const int64_t at = (first + r) * columns + c;
          narrow(sum[r] + widen(weight[at]), merged + at);
        }
      }
    }
  }

  template <typename Body>
  void each(Body body) const {
    for (int64_t i = 0; i < slots.numel(); i++) {
      const int64_t slot = ((const int64_t*)slots.const_data_ptr())[i];
      const float factor = ((const float*)factors.const_data_ptr())[i] * low.scales[slot];
      for (int64_t j = 0, rank = low.rank(slot); j < rank; j++) body(slot, factor, j);
    }
  }
};

template <typename T>
void merge_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& merged,
               const std::vector<std::optional<Tensor>>& lora, const std::vector<bool>& transposed, const Tensor& slots,
               const Tensor& factors) {
  std::vector<Merge<T>> all;
  for (size_t i = 0; i < weights.size(); i++) {
    const Tensor& w = weights[i];
    STD_TORCH_CHECK(w.is_contiguous() && merged[i].is_contiguous(), "merge_lora: weights must be contiguous");
    STD_TORCH_CHECK(merged[i].numel() == w.numel() && merged[i].scalar_type() == w.scalar_type() &&
                        lora[4 * i]->scalar_type() == w.scalar_type() && w.scalar_type() == weights[0].scalar_type(),
                    "merge_lora: weights, merged and adapters must be of one dtype, and as many");
    all.push_back({(const T*)w.const_data_ptr(), (T*)merged[i].mutable_data_ptr(), w.size(0), w.size(1),
                   low_of<T>(lora, i), transposed[i], slots, factors});
  }
#pragma omp parallel
  for (const Merge<T>& one : all) one.run();
}

void merge_lora(const std::vector<Tensor>& weights, const std::vector<Tensor>& merged,
                const std::vector<std::optional<Tensor>>& lora, const std::vector<bool>& transposed, const Tensor& slots,
                const Tensor& factors) {
  if (weights.empty()) return;
  if (weights[0].scalar_type() == ScalarType::Float)
    return merge_all<float>(weights, merged, lora, transposed, slots, factors);
  STD_TORCH_CHECK(weights[0].scalar_type() == ScalarType::BFloat16, "merge_lora: weights must be fp32 or bf16");
  merge_all<bf16>(weights, merged, lora, transposed, slots, factors);
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) { m.impl("merge_lora", TORCH_BOX(&merge_lora)); }

}  // namespace skipc
