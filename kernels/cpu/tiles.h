// Products of a few rows with bf16 weights in tile registers (Intel AMX), where the CPU has them.
//
// A tile holds 16 weight rows as they lie in memory, and multiplies up to 16 rows of x in the time of one, so products take
// the time of reading the weights however many rows there are. Elements are added one after the other in fp32: other bits
// than those of vectors (see `tile` in products.h), but again the same for a row in any company. Rows of x are rounded to
// bf16 before, as torch does between layers.
#pragma once

#include <atomic>
#include <cstdlib>

#include "common.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__)
#define SKIPC_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace skipc {

// Whether products with bf16 weights are to use tiles where they can: see kernels/native.py.
inline std::atomic<bool> tiles_wanted = std::getenv("SKIPC_TILES") == nullptr || std::strcmp(std::getenv("SKIPC_TILES"), "0");

#ifdef SKIPC_TILES

// Whether the system lets this process use tile registers. (Linux wants to be asked, once: it makes room for them.)
inline bool tiles_permitted() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and its feature, from Linux 5.16 on
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return permitted;
}
inline bool tiles_used() { return tiles_wanted && tiles_permitted(); }

// Rows of x, packed for tiles. While it lives, the thread's tile registers are its own.
class Tiles {
  static constexpr int64_t SIDE = 16, DEEP = 32;  // rows of a tile; elements of a weight row in it

  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
  };

  const float* x;
  const int64_t R, K, deep;  // `deep`: elements of a row in tiles; vectors do the others
  std::vector<bf16> packed;
  int64_t weights = 0, columns = 0;  // for so many the registers are configured

 public:
  // `x`: fp32 [R, K], see `spread` in products.h.
  Tiles(const float* x, int64_t R, int64_t K) : x(x), R(R), K(K), deep(K / DEEP * DEEP), packed(R * deep) {
    for (int64_t first = 0; first < R; first += SIDE) {
      const int64_t cols = std::min(SIDE, R - first);
      for (int64_t r = 0; r < cols; r++) pack(x + (first + r) * K, packed.data() + first * deep + 2 * r, cols);
    }
  }
  ~Tiles() {
    if (weights) _tile_release();
  }
  Tiles(const Tiles&) = delete;

  // out[r * SIDE + n]: `count` weight rows, at most 16, times all rows of x.
  void multiply(const bf16* w, int64_t stride, int64_t count, float* out) {
    for (int64_t first = 0; first < R; first += SIDE) {
      const int64_t cols = std::min(SIDE, R - first);
      alignas(64) float sums[SIDE * SIDE];
      configure(count, cols);
      product(packed.data() + first * deep, cols, w, stride, count, sums);
      for (int64_t r = 0; r < cols; r++)
        for (int64_t n = 0; n < count; n++) {
          float s = sums[n * cols + r];
          for (int64_t k = deep; k < K; k++) s += widen(w[n * stride + k]) * x[(first + r) * K + k];
          out[(first + r) * SIDE + n] = s;
        }
    }
  }

 private:
  // Pairs of neighbours, so that those of one pair of columns lie together for all rows: [deep / 2, cols, 2].
  void pack(const float* row, bf16* to, int64_t cols) const {
    for (int64_t k = 0; k < deep; k += DEEP, to += DEEP * cols) {
      const uvec pairs = rounded(load(row + k)) >> 16 | (rounded(load(row + k + W)) & 0xffff0000u);
      uint32_t each[W];
      std::memcpy(each, &pairs, sizeof(each));
      for (int i = 0; i < W; i++) std::memcpy(to + 2 * i * cols, each + i, sizeof(uint32_t));
    }
  }

  void configure(int64_t count, int64_t cols) {
    if (count == weights && cols == columns) return;
    Config c;
    const auto set = [&](int tile, int64_t rows, int64_t wide) {
      c.rows[tile] = rows;
      c.bytes[tile] = wide * sizeof(float);
    };
    set(0, count, cols);  // sums
    set(1, count, SIDE);  // weights
    set(2, SIDE, cols);   // rows of x
    _tile_loadconfig(&c);
    weights = count;
    columns = cols;
  }

  // (Registers are numbered by literals, since gcc pastes them into names.)
  void product(const bf16* from, int64_t cols, const bf16* w, int64_t stride, int64_t count, float* sums) const {
    const int64_t next = SIDE * stride;  // the block after this one: the same place in it is called into the cache
    _tile_zero(0);
    for (int64_t k = 0; k < deep; k += DEEP) {
      for (int64_t n = 0; n < count; n++) fetch(w + next + n * stride + k);
      _tile_loadd(1, w + k, stride * sizeof(bf16));
      _tile_loadd(2, from + k * cols, cols * sizeof(float));
      _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, sums, cols * sizeof(float));
  }
};

#else

inline bool tiles_used() { return false; }

struct Tiles {
  Tiles(const float*, int64_t, int64_t) {}
  void multiply(const bf16*, int64_t, int64_t, float*) {}
};

#endif

}  // namespace skipc
