// Similarities of points of a stream, and the gates that they close.
#pragma once

#include "common.h"

namespace skipc {

// Scalar product and squares of two rows, in fp32.
template <typename T>
void moments_of(const T* x, const T* y, int64_t width, float* out) {
  vec sums_of[3] = {};
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    const vec a = load(x + i), b = load(y + i);
    sums_of[0] += a * b;
    sums_of[1] += a * a;
    sums_of[2] += b * b;
  }
  sums<3>(sums_of, out);
  for (; i < width; i++) {
    const float a = widen(x[i]), b = widen(y[i]);
    out[0] += a * b;
    out[1] += a * a;
    out[2] += b * b;
  }
}

// Whether rows with these moments, [rows, 3], taken together, are similar enough: all of them (rule 0), more than half
// (1), or their mean (2); without a row they are not.
inline bool similar_enough(const float* moments, int64_t rows, const uint8_t* valid, float threshold, int64_t rule) {
  int64_t count = 0, above = 0;
  double total = 0;
  for (int64_t r = 0; r < rows; r++) {
    if (valid && !valid[r]) continue;
    const float* m = moments + 3 * r;
    const double cosine = m[0] / std::max(std::sqrt(double(m[1])) * std::sqrt(double(m[2])), 1e-8);
    count++;
    above += float(cosine) >= threshold;
    total += cosine;
  }
  if (count == 0) return false;
  if (rule == 0) return above == count;
  return rule == 1 ? 2 * above > count : float(total / count) >= threshold;
}

// The gates of one call: which sites are skipped, and when a similarity skips more. Semantics: kernels/chain.py, Gates.
struct Gates {
  int64_t sites = 0, rows = 0, rule = 0;
  uint8_t* skipped = nullptr;         // [sites], both given and returned
  const float* threshold = nullptr;   // [sites]
  const uint8_t* closes = nullptr;    // [sites, sites]
  const float* scale = nullptr;       // [sites]
  const int64_t* since = nullptr;     // [sites]
  float* moments = nullptr;           // [sites, rows, 3]
  const uint8_t* valid = nullptr;     // [rows]; nullptr: all
  bool measures = false;              // sites that decide nothing too

  Gates(const std::vector<Tensor>& given, int64_t rule) : rule(rule % 4), measures(rule >= 4) {
    if (given.empty()) return;
    sites = given[0].size(0);
    rows = given[5].size(1);
    skipped = (uint8_t*)given[0].mutable_data_ptr();
    threshold = (const float*)given[1].const_data_ptr();
    closes = (const uint8_t*)given[2].const_data_ptr();
    scale = (const float*)given[3].const_data_ptr();
    since = (const int64_t*)given[4].const_data_ptr();
    moments = (float*)given[5].mutable_data_ptr();
    if (given.size() > 6) valid = (const uint8_t*)given[6].const_data_ptr();
  }

  bool decides(int64_t site) const { return std::isfinite(threshold[site]); }
  bool reached(int64_t site, const float* of_rows) const {
    return similar_enough(of_rows, rows, valid, threshold[site], rule);
  }
};

}  // namespace skipc
