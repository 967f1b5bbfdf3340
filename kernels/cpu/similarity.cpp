// Similarities of points of a stream. Semantics: kernels/similarity.py.
#include "gates.h"

namespace skipc {

Tensor stream_moments(const Tensor& before, const Tensor& after) {
  STD_TORCH_CHECK(before.is_contiguous() && after.is_contiguous(), "stream_moments: streams must be contiguous");
  const int64_t width = before.size(before.dim() - 1), rows = rows_of(before);
  Tensor made = empty(sizes_like(before, 3), ScalarType::Float);
  float* const to = (float*)made.mutable_data_ptr();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T *x = (const T*)before.const_data_ptr(), *y = (const T*)after.const_data_ptr();
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width))
    for (int64_t r = 0; r < rows; r++) moments_of(x + r * width, y + r * width, width, to + 3 * r);
  };
  before.scalar_type() == ScalarType::Float ? run(float()) : run(bf16());
  return made;
}

bool reached(const Tensor& moments, double threshold, int64_t rule, const std::optional<Tensor>& valid) {
  STD_TORCH_CHECK(moments.is_contiguous() && moments.scalar_type() == ScalarType::Float, "reached: moments are fp32");
  STD_TORCH_CHECK(!valid.has_value() || (valid->is_contiguous() && valid->numel() * 3 == moments.numel()),
                  "reached: valid needs a place for each row");
  const uint8_t* const there = valid.has_value() ? (const uint8_t*)valid->const_data_ptr() : nullptr;
  return similar_enough((const float*)moments.const_data_ptr(), moments.numel() / 3, there, float(threshold), rule);
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) {
  m.impl("stream_moments", TORCH_BOX(&stream_moments));
  m.impl("reached", TORCH_BOX(&reached));
}

}  // namespace skipc
