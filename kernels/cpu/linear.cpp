// Linear layers of a few rows at memory bandwidth. Semantics: kernels/linear.py.
#include "linear.h"

#include <memory>

namespace skipc {

Tensor skinny_linear(const Tensor& x, const std::vector<Tensor>& weights,
                     const std::vector<std::optional<Tensor>>& biases, const std::optional<Tensor>& norm, double eps,
                     const std::optional<Tensor>& residual, const std::vector<std::optional<Tensor>>& lora) {
  STD_TORCH_CHECK(x.is_contiguous(), "skinny_linear: x must be contiguous");
  STD_TORCH_CHECK(!residual.has_value() || residual->is_contiguous(), "skinny_linear: residual must be contiguous");
  for (const Tensor& w : weights)
    STD_TORCH_CHECK(w.size(1) == x.size(x.dim() - 1), "skinny_linear: a weight of ", w.size(1), " columns for rows of ",
                    x.size(x.dim() - 1));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Linears<T> layers(rows_of(x), norm, eps, weights, biases, lora);
    layers.check();
    Tensor out = empty(sizes_like(x, layers.N), x.scalar_type());
    const T *in = (const T*)x.const_data_ptr(), *add = pointer<T>(residual);
    T* to = (T*)out.mutable_data_ptr();
    const std::unique_ptr<float[]> scratch(new float[layers.scratch()]);
#pragma omp parallel num_threads(threads_for(layers.work()))
    layers.run(in, add, to, scratch.get());
    return out;
  };
  return x.scalar_type() == ScalarType::Float ? run(float()) : run(bf16());
}

Tensor gated_mlp(const Tensor& x, const std::optional<Tensor>& norm, double eps, const Tensor& gate,
                 const std::optional<Tensor>& up, const Tensor& down, int64_t activation,
                 const std::optional<Tensor>& residual, const std::vector<std::optional<Tensor>>& lora) {
  STD_TORCH_CHECK(x.is_contiguous(), "gated_mlp: x must be contiguous");
  STD_TORCH_CHECK(!residual.has_value() || residual->is_contiguous(), "gated_mlp: residual must be contiguous");
  STD_TORCH_CHECK(gate.size(1) == x.size(x.dim() - 1), "gated_mlp: a weight of ", gate.size(1), " columns for rows of ",
                  x.size(x.dim() - 1));
  Tensor out = empty(sizes_like(x, down.size(0)), x.scalar_type());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const GatedMLP<T> mlp(rows_of(x), norm, eps, gate, up, down, activation, lora);
    mlp.check();
    const T *in = (const T*)x.const_data_ptr(), *add = pointer<T>(residual);
    T* to = (T*)out.mutable_data_ptr();
    const std::unique_ptr<float[]> scratch(new float[mlp.scratch()]);
#pragma omp parallel num_threads(threads_for(mlp.work()))
    mlp.run(in, add, to, scratch.get());
  };
  x.scalar_type() == ScalarType::Float ? run(float()) : run(bf16());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) {
  m.impl("skinny_linear", TORCH_BOX(&skinny_linear));
  m.impl("gated_mlp", TORCH_BOX(&gated_mlp));
}

}  // namespace skipc
