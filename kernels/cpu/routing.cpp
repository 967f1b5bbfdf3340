// One decision for each token which adapters it wants. Semantics: kernels/routing.py.
#include <cmath>

#include "lora.h"

namespace skipc {

template <typename T>
float dot(const T* x, const float* w, int64_t width) {
  vec even = {}, odd = {};
  int64_t k = 0;
  float row[W];
  for (; k + W <= width; k += W) {
    for (int i = 0; i < W; i++) row[i] = widen(x[k + i]);
    (k / W % 2 ? odd : even) += load(row) * load(w + k);
  }
  float total = sum(even + odd);
  for (; k < width; k++) total += widen(x[k]) * w[k];
  return total;
}

template <typename T>
void route(const T* x, int64_t rows, const float* router, int64_t* table, float* gates) {
  const int64_t experts = router[0], width = router[1], most = router[2];
  const bool whole = router[3] != 0;
  const float *slots = router + 4, *bias = slots + experts, *weight = bias + experts;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * experts * width * sizeof(T)))
  for (int64_t r = 0; r < rows; r++) {
    std::vector<float> logits(experts);
    for (int64_t e = 0; e < experts; e++) logits[e] = bias[e] + dot(x + r * width, weight + e * width, width);
    const float top = *std::max_element(logits.begin(), logits.end());
    std::vector<bool> taken(experts);
    float all = 0, chosen = 0;
    for (float l : logits) all += std::exp(l - top);
    for (int64_t i = 0; i < most; i++) {
      int64_t best = -1;
      for (int64_t e = 0; e < experts; e++)
        if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
      taken[best] = true;
      table[2 + r * most + i] = slots[best];
      chosen += gates[2 + r * most + i] = std::exp(logits[best] - top);
    }
    for (int64_t i = 0; i < most; i++) gates[2 + r * most + i] /= whole ? chosen : all;
  }
  table[0] = -rows;
  table[1] = most;
}

void route_tokens(const Tensor& x, const Tensor& router, Tensor table, Tensor gates) {
  const float* given = (const float*)router.const_data_ptr();
  const int64_t experts = given[0], width = given[1], most = given[2];
  if (!experts) return;
  STD_TORCH_CHECK(x.size(x.dim() - 1) == width, "a router for tokens of width ", width, " met some of ", x.size(x.dim() - 1));
  STD_TORCH_CHECK(x.is_contiguous(), "route_tokens: x must be contiguous");
  const int64_t rows = rows_of(x), room = table.numel() - 2;
  STD_TORCH_CHECK(rows * most <= room, rows, " tokens that want ", most, " adapters each are more than ", room);
  int64_t* slots = (int64_t*)table.mutable_data_ptr();
  float* amounts = (float*)gates.mutable_data_ptr();
  if (x.scalar_type() == ScalarType::Float) return route((const float*)x.const_data_ptr(), rows, given, slots, amounts);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "route_tokens: x must be fp32 or bf16");
  route((const bf16*)x.const_data_ptr(), rows, given, slots, amounts);
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) { m.impl("route_tokens", TORCH_BOX(&route_tokens)); }

}  // namespace skipc
