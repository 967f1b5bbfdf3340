// Ways to read weights, of which a table chooses for each size. Semantics: kernels/products.py.
#include "products.h"

#include <memory>
#include <mutex>

#include "tiles.h"

namespace skipc {

// Sizes from `low` to `high`: bits of the dtype, rows of x, columns and rows of the weights; and how these are read.
struct Way {
  static constexpr int64_t SIZES = 4, NUMBERS = 2 * SIZES + 2;
  int64_t low[SIZES], high[SIZES], ahead, together;

  explicit Way(const int64_t* numbers) : ahead(numbers[2 * SIZES]), together(numbers[2 * SIZES + 1]) {
    for (int64_t i = 0; i < SIZES; i++) {
      low[i] = numbers[2 * i];
      high[i] = numbers[2 * i + 1];
    }
  }
  bool holds(const int64_t* sizes) const {
    for (int64_t i = 0; i < SIZES; i++)
      if (sizes[i] < low[i] || sizes[i] > high[i]) return false;
    return true;
  }
};

// Kernels may be made while the table is replaced: each sees one table or the other.
static std::mutex mutex;
static std::shared_ptr<const std::vector<Way>> ways = std::make_shared<std::vector<Way>>();

template <typename T, int64_t FAR, int TOGETHER>
void one(const float* x, int64_t, int64_t K, const T* w, int64_t stride, float* out) {
  block_of_one<T, BLOCK, FAR, TOGETHER>(x, K, w, stride, out);
}

template <typename T, int64_t FAR>
Product<T> reading(bool alone, int64_t together) {
  if (!alone) return together == 2 ? block_of_several<T, BLOCK, FAR, 2> : block_of_several<T, BLOCK, FAR, 4>;
  return together == 1 ? one<T, FAR, 1> : together == 2 ? one<T, FAR, 2> : one<T, FAR, 4>;
}

template <typename T>
Product<T> reading(bool alone, int64_t ahead, int64_t together) {
  switch (ahead) {
    case 0: return reading<T, 0>(alone, together);
    case 4096: return reading<T, 4096>(alone, together);
    case 16384: return reading<T, 16384>(alone, together);
    default: return reading<T, AHEAD>(alone, together);
  }
}

template <typename T>
Product<T> product_for(int64_t R, int64_t K, int64_t N) {
  std::shared_ptr<const std::vector<Way>> now;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    now = ways;
  }
  const int64_t sizes[Way::SIZES] = {8 * int64_t(sizeof(T)), R, K, N};
  for (const Way& way : *now)
    if (way.holds(sizes)) return reading<T>(R == 1, way.ahead, way.together);
  return reading<T>(R == 1, AHEAD, R == 1 ? PAIR : HALF);
}

template Product<float> product_for<float>(int64_t, int64_t, int64_t);
template Product<bf16> product_for<bf16>(int64_t, int64_t, int64_t);

void tune_products(std::vector<int64_t> rows) {
  STD_TORCH_CHECK(rows.size() % Way::NUMBERS == 0, "tune_products: ", rows.size(), " numbers are no rows of ", Way::NUMBERS);
  auto made = std::make_shared<std::vector<Way>>();
  for (size_t i = 0; i < rows.size(); i += Way::NUMBERS) {
    const Way& way = made->emplace_back(rows.data() + i);
    const bool known = way.ahead == 0 || way.ahead == 4096 || way.ahead == 8192 || way.ahead == 16384;
    STD_TORCH_CHECK(known, "tune_products: weights cannot be called ", way.ahead, " bytes ahead");
    const bool several = way.high[1] > 1;
    STD_TORCH_CHECK(way.together == 2 || way.together == 4 || (way.together == 1 && !several), "tune_products: ",
                    way.together, " rows of weights cannot go together with ", several ? "several rows" : "one row");
  }
  const std::lock_guard<std::mutex> lock(mutex);
  ways = std::move(made);
}

void use_tiles(bool wanted) { tiles_wanted = wanted; }

bool tiles() { return tiles_used(); }

STABLE_TORCH_LIBRARY_IMPL(skipc, CompositeExplicitAutograd, m) {
  m.impl("tune_products", TORCH_BOX(&tune_products));
  m.impl("use_tiles", TORCH_BOX(&use_tiles));
  m.impl("tiles", TORCH_BOX(&tiles));
}

}  // namespace skipc
