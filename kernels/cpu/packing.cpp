// Adapters copied to where kernels read them. Semantics: kernels/lora.py.
#include "lora.h"

namespace skipc {

template <typename From, typename To>
void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) narrow(widen(from[i]), to + i);
}

// Outputs `first` to `end` of a second matrix of N rows; what lies behind the last is zero.
template <typename From, typename To>
void pack_block(const From* b, int64_t N, int64_t rank, int64_t first, To* to) {
  for (int64_t o = 0; o < PACK; o++)
    for (int64_t j = 0; j < rank; j++) narrow(first + o < N ? widen(b[(first + o) * rank + j]) : 0.0f, to + j * PACK + o);
}

template <typename From, typename To>
void pack_one(const Tensor& a, const Tensor& b, To* memory, int64_t at_a, int64_t at_b) {
  const From *first = (const From*)a.const_data_ptr(), *second = (const From*)b.const_data_ptr();
  const int64_t rank = a.size(0), K = a.size(1), N = b.size(0);
#pragma omp for schedule(static) nowait
  for (int64_t j = 0; j < rank; j++) convert(first + j * K, memory + at_a + j * K, K);
#pragma omp for schedule(static) nowait
  for (int64_t o = 0; o < N; o += PACK) pack_block(second, N, rank, o, memory + at_b + o * rank);
}

template <typename To>
void pack_all(const std::vector<Tensor>& a, const std::vector<Tensor>& b, To* memory, const std::vector<int64_t>& places) {
#pragma omp parallel
  for (size_t i = 0; i < a.size(); i++)
    if (a[i].scalar_type() == ScalarType::Float)
      pack_one<float>(a[i], b[i], memory, places[2 * i], places[2 * i + 1]);
    else
      pack_one<bf16>(a[i], b[i], memory, places[2 * i], places[2 * i + 1]);
}

void pack_lora(const std::vector<Tensor>& a, const std::vector<Tensor>& b, Tensor memory, std::vector<int64_t> places) {
  for (const auto* list : {&a, &b})
    for (const Tensor& t : *list) {
      STD_TORCH_CHECK(t.is_contiguous(), "pack_lora: matrices must be contiguous");
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                      "pack_lora: matrices must be fp32 or bf16");
    }
  if (memory.scalar_type() == ScalarType::Float) return pack_all(a, b, (float*)memory.mutable_data_ptr(), places);
  STD_TORCH_CHECK(memory.scalar_type() == ScalarType::BFloat16, "pack_lora: memory must be fp32 or bf16");
  pack_all(a, b, (bf16*)memory.mutable_data_ptr(), places);
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) { m.impl("pack_lora", TORCH_BOX(&pack_lora)); }

}  // namespace skipc
