// Attention of a few queries over a long cache, heads grouped, dead parts unread. Semantics: kernels/attention.py.
#include "attention.h"

namespace skipc {

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& live, bool causal, double scale, double softcap) {
  const Shape s{q.size(0), q.size(1), q.size(2), q.size(3), k.size(1), k.size(2), v.size(3)};
  const Options o{causal, float(scale), float(softcap)};
  Tensor out = empty({s.B, s.H, s.Q, s.Dv}, {s.Q * s.H * s.Dv, s.Dv, s.H * s.Dv, 1}, q.scalar_type());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Attention<T> attention(s, o, k, v, mask, live);
    std::vector<float> queries(s.B * s.H * s.Q * s.D), partial(attention.scratch());
    const T* from = (const T*)q.const_data_ptr();
    T* to = (T*)out.mutable_data_ptr();
    const int64_t batch = q.stride(0), head = q.stride(1), query = q.stride(2);
    for (int64_t b = 0; b < s.B; b++)
      for (int64_t h = 0; h < s.H; h++)
        for (int64_t i = 0; i < s.Q; i++)
          for (int64_t d = 0; d < s.D; d++)
            queries[((b * s.H + h) * s.Q + i) * s.D + d] = widen(from[b * batch + h * head + i * query + d]);
    const int64_t tasks = s.B * s.Hkv * (s.L / CHUNK + 1);
#pragma omp parallel num_threads(int(std::min<int64_t>(omp_get_max_threads(), tasks)))
    attention.run(queries.data(), partial.data(), [&](int64_t b, int64_t h, int64_t i, const float* values) {
      for (int64_t d = 0; d < s.Dv; d++) narrow(values[d], to + ((b * s.Q + i) * s.H + h) * s.Dv + d);
    });
  };
  q.scalar_type() == ScalarType::Float ? run(float()) : run(bf16());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention)); }

}  // namespace skipc
