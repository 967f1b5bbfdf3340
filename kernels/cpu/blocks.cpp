// Whole sublayers as one kernel each, and chains of them in one parallel region. Semantics: kernels/blocks.py.
#include <memory>
#include <mutex>
#include <variant>

#include "attention.h"
#include "gates.h"
#include "linear.h"

namespace skipc {

using Maybe = std::optional<Tensor>;

// Rotations of each token: cos and sin, [batch or 1, tokens or 1, width], of either dtype.
struct Rotary {
  const char *cos = nullptr, *sin = nullptr;
  int64_t width = 0, stride[2] = {}, sin_stride[2] = {};
  bool wide = true;

  Rotary(const Maybe& c, const Maybe& s) {
    if (!c.has_value()) return;
    cos = (const char*)c->const_data_ptr();
    sin = (const char*)s->const_data_ptr();
    width = c->size(2);
    wide = c->scalar_type() == ScalarType::Float;
    for (int64_t i = 0; i < 2; i++) {
      stride[i] = c->size(i) == 1 ? 0 : c->stride(i);
      sin_stride[i] = s->size(i) == 1 ? 0 : s->stride(i);
    }
  }
  static float read(const char* from, int64_t i, bool wide) {
    return wide ? ((const float*)from)[i] : widen(((const bf16*)from)[i]);
  }
  // The halves of x turned against each other (Su et al., arXiv 2104.09864, in the form of GPT-NeoX).
  void apply(const float* x, int64_t D, int64_t b, int64_t i, float* out) const {
    const int64_t half = width / 2, c0 = b * stride[0] + i * stride[1], s0 = b * sin_stride[0] + i * sin_stride[1];
    for (int64_t d = 0; d < width; d++) {
      const float other = d < half ? -x[d + half] : x[d - half];
      out[d] = x[d] * read(cos, c0 + d, wide) + other * read(sin, s0 + d, wide);
    }
    for (int64_t d = width; d < D; d++) out[d] = x[d];
  }
};

// Where tokens lie in a cache: each place is given, or that of the first one.
struct Places {
  const int64_t* data;
  bool first;

  explicit Places(const Tensor& t) : data((const int64_t*)t.const_data_ptr()), first(t.dim() == 0) {}
  int64_t at(int64_t i) const { return first ? *data + i : data[i]; }
  void check(int64_t tokens, int64_t length, const char* kernel) const {
    for (int64_t i = 0; i < tokens; i++)
      STD_TORCH_CHECK(at(i) >= 0 && at(i) < length, kernel, ": index out of bounds: position ", at(i), " of a cache of ",
                      length);
  }
};

// How many heads weights make: the output reads those of queries. A cache may have room for more of keys.
inline Shape heads_of(int64_t B, int64_t Q, int64_t total, const Tensor& keys, const Tensor& values, const Maybe& out) {
  const int64_t D = keys.size(3), Dv = values.size(3), H = out.has_value() ? out->size(1) / Dv : 0;
  const int64_t Hkv = (total - H * D) / (D + Dv);
  STD_TORCH_CHECK(Hkv >= 1 && Hkv <= keys.size(1) && Hkv <= values.size(1) && H % Hkv == 0, "attention_block: ", Hkv,
                  " heads of keys for a cache of ", keys.size(1));
  return {B, H, Q, D, Hkv, keys.size(2), Dv};
}

// An attention sublayer: norm, projections, rotation, cache, attention, output, residual. Without `out`, it ends with the
// cache, and the projections make no queries.
template <typename T>
struct AttentionBlock {
  int64_t B, Q, K, N;
  const T *norm, *q_norm, *k_norm;
  double eps, head_eps;
  std::vector<Part<T>> projections, output;
  int64_t total;  // rows of the projections: queries, keys, values
  Rotary rotary;
  Cache<T> keys, values;
  Places places;
  Attention<T> attention;
  Wanted wanted;
  int64_t bridge;

  AttentionBlock(int64_t B, int64_t Q, const Maybe& norm, double eps, const std::vector<Tensor>& projections,
                 const std::vector<Maybe>& biases, const Maybe& q_norm, const Maybe& k_norm, double head_eps,
                 const Maybe& cos, const Maybe& sin, const Tensor& keys, const Tensor& values, const Tensor& position,
                 const Maybe& mask, const Maybe& live, bool causal, double scale, double softcap, const Maybe& out,
                 const Maybe& out_bias, const std::vector<Maybe>& lora)
      : B(B), Q(Q), K(projections[0].size(1)), N(out.has_value() ? out->size(0) : 0), norm(pointer<T>(norm)),
        q_norm(pointer<T>(q_norm)), k_norm(pointer<T>(k_norm)), eps(eps), head_eps(head_eps),
        projections(parts_of<T>(projections, biases, lora)), output(output_of(out, out_bias, lora, projections.size())),
        total(this->projections.back().first + this->projections.back().count), rotary(cos, sin),
        keys(keys), values(values), places(position),
        attention(heads_of(B, Q, total, keys, values, out), {causal, float(scale), float(softcap)}, keys, values, mask, live),
        wanted(lora) {
    tune(this->projections, B * Q, K);
    if (out.has_value()) tune(this->output, B * Q, out->size(1));
    bridge = std::max(place_bridges(this->projections, B * Q), place_bridges(this->output, B * Q));
  }

  static std::vector<Part<T>> output_of(const Maybe& out, const Maybe& bias, const std::vector<Maybe>& lora, int64_t at) {
    return out.has_value() ? parts_of<T>({*out}, {bias}, lora, at) : std::vector<Part<T>>();
  }
  void check() const {
    places.check(Q, attention.s.L, "attention_block");
    wanted.check(B * Q, "attention_block", projections, output);
  }
  int64_t scratch() const {
    const Shape& s = attention.s;
    return bridge + B * Q * (total + s.H * s.D + s.H * s.Dv) + attention.scratch();
  }
  int64_t work() const { return total * K; }

  void head(const float* x, int64_t D, const T* weight, int64_t b, int64_t i, float* out) const {
    std::vector<float> normed;
    if (weight) {
      normed.resize(D);
      float squares = 0;
      for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
      const float factor = 1.0f / std::sqrt(squares / D + float(head_eps));
      for (int64_t d = 0; d < D; d++) normed[d] = x[d] * factor * widen(weight[d]);
      x = normed.data();
    }
    rotary.apply(x, D, b, i, out);
  }

  // Called by every thread of a team; `scratch` is theirs in common. Ends without a barrier.
  void run(const T* x, const T* residual, T* out, float* scratch) const {
    const Shape& s = attention.s;
    const int64_t R = B * Q, width = s.H * s.Dv, heads = s.H + 2 * s.Hkv;
    float *projected = scratch + bridge, *queries = projected + R * total, *mixed = queries + R * s.H * s.D,
          *partial = mixed + R * width;
    linears<T>(prepare(x, R, K, norm, eps).data(), R, K, projections, (const T*)nullptr, projected,
               wanted, scratch);
#pragma omp barrier
    std::vector<float> key(s.D);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < R * heads; task++) {
      const int64_t r = task / heads, h = task % heads, b = r / Q, i = r % Q;
      const float* row = projected + r * total;
      if (h < s.H) {
        head(row + h * s.D, s.D, q_norm, b, i, queries + ((b * s.H + h) * Q + i) * s.D);
      } else if (h < s.H + s.Hkv) {
        head(row + h * s.D, s.D, k_norm, b, i, key.data());
        T* to = keys.at(b, h - s.H, places.at(i));
        for (int64_t d = 0; d < s.D; d++) narrow(key[d], to + d);
      } else {
        const int64_t g = h - s.H - s.Hkv;
        const float* from = row + (s.H + s.Hkv) * s.D + g * s.Dv;
        T* to = values.at(b, g, places.at(i));
        for (int64_t d = 0; d < s.Dv; d++) narrow(from[d], to + d);
      }
    }
    if (output.empty()) return;
    attention.run(queries, partial, [&](int64_t b, int64_t h, int64_t i, const float* from) {
      for (int64_t d = 0; d < s.Dv; d++)
        mixed[(b * Q + i) * width + spread_index<T>(h * s.Dv + d, width)] = from[d];
    });
    linears<T>(mixed, R, width, output, residual, out, wanted, scratch);
  }
};

Tensor attention_block(const Tensor& x, const Maybe& norm, double eps, const std::vector<Tensor>& projections,
                       const std::vector<Maybe>& biases, const Maybe& q_norm, const Maybe& k_norm, double head_eps,
                       const Maybe& cos, const Maybe& sin, const Tensor& keys, const Tensor& values,
                       const Tensor& position, const Maybe& mask, const Maybe& live, bool causal, double scale,
                       double softcap, const Tensor& out, const Maybe& out_bias, const Maybe& residual,
                       const std::vector<Maybe>& lora) {
  STD_TORCH_CHECK(x.is_contiguous(), "attention_block: x must be contiguous");
  STD_TORCH_CHECK(!residual.has_value() || residual->is_contiguous(), "attention_block: residual must be contiguous");
  Tensor made = empty(sizes_like(x, out.size(0)), x.scalar_type());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const AttentionBlock<T> block(x.size(0), x.size(1), norm, eps, projections, biases, q_norm, k_norm, head_eps, cos,
                                  sin, keys, values, position, mask, live, causal, scale, softcap, out, out_bias,
                                  lora);
    block.check();
    const T *in = (const T*)x.const_data_ptr(), *add = pointer<T>(residual);
    T* to = (T*)made.mutable_data_ptr();
    const std::unique_ptr<float[]> scratch(new float[block.scratch()]);
#pragma omp parallel num_threads(threads_for(block.work()))
    block.run(in, add, to, scratch.get());
  };
  x.scalar_type() == ScalarType::Float ? run(float()) : run(bf16());
  return made;
}

void cache_block(const Tensor& x, const Maybe& norm, double eps, const std::vector<Tensor>& projections,
                 const std::vector<Maybe>& biases, const Maybe& k_norm, double head_eps, const Maybe& cos,
                 const Maybe& sin, const Tensor& keys, const Tensor& values, const Tensor& position,
                 const std::vector<Maybe>& lora) {
  STD_TORCH_CHECK(x.is_contiguous(), "cache_block: x must be contiguous");
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const AttentionBlock<T> block(x.size(0), x.size(1), norm, eps, projections, biases, {}, k_norm, head_eps, cos, sin,
                                  keys, values, position, {}, {}, false, 0, 0, {}, {}, lora);
    block.check();
    const T* in = (const T*)x.const_data_ptr();
    const std::unique_ptr<float[]> scratch(new float[block.scratch()]);
#pragma omp parallel num_threads(threads_for(block.work()))
    block.run(in, nullptr, nullptr, scratch.get());
  };
  x.scalar_type() == ScalarType::Float ? run(float()) : run(bf16());
}

// What a skipped attention keeps under kv="copy": what another cache has at the same places. Caches may be of another
// dtype than the stream, so elements are bytes here.
struct CopyRows {
  struct Rows {
    char* data;
    int64_t stride[3], bytes;  // of rows of the batch, heads, tokens; of what is copied
    explicit Rows(const Tensor& t) : data((char*)t.const_data_ptr()) {
      const int64_t size = t.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(bf16);
      for (int64_t i = 0; i < 3; i++) stride[i] = t.stride(i) * size;
      bytes = t.size(3) * size;
    }
    char* at(int64_t b, int64_t h, int64_t l) const { return data + b * stride[0] + h * stride[1] + l * stride[2]; }
  };
  int64_t B, H, L, tokens;
  Rows from_keys, from_values, keys, values;
  Places places;

  CopyRows(const Tensor& from_keys, const Tensor& from_values, const Tensor& keys, const Tensor& values,
           const Tensor& position, int64_t tokens)
      : B(keys.size(0)), H(keys.size(1)),
        L(std::min(std::min(from_keys.size(2), from_values.size(2)), std::min(keys.size(2), values.size(2)))),
        tokens(tokens), from_keys(from_keys), from_values(from_values), keys(keys), values(values), places(position) {}

  void check() const { places.check(tokens, L, "copy_rows"); }
  // Called by every thread of a team. Ends without a barrier.
  void run() const {
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < B * H * tokens; task++) {
      const int64_t b = task / (H * tokens), h = task / tokens % H, l = places.at(task % tokens);
      std::memcpy(keys.at(b, h, l), from_keys.at(b, h, l), keys.bytes);
      std::memcpy(values.at(b, h, l), from_values.at(b, h, l), values.bytes);
    }
  }
};

void copy_rows(const Tensor& from_keys, const Tensor& from_values, const Tensor& keys, const Tensor& values,
               const Tensor& position, int64_t tokens) {
  const CopyRows rows(from_keys, from_values, keys, values, position, tokens);
  rows.check();
  rows.run();
}

// Sublayers one after the other in one parallel region: what lies between two calls is one meeting of the threads.
// `code` holds for each link its kind, whose output it reads and adds (-1: the entry; -2: nothing), and its own numbers.
template <typename T>
struct Chain {
  enum Kind { ATTENTION, MLP, COUNT, CACHE, LINEAR, WHEN, PASS, MEASURE, COPY };
  // Small, and its kernel elsewhere: links that are passed over come out of memory, too, as all the caches hold weights.
  struct Link {
    Kind kind;
    int64_t x = 0, residual = 0, out = 0;  // indices of streams
    int64_t site = -1, skipped = 0;        // the link runs if the site is skipped, or is not
    int64_t* counter = nullptr;
    int64_t amount = 0;
    std::unique_ptr<AttentionBlock<T>> attention;
    std::unique_ptr<GatedMLP<T>> mlp;
    std::unique_ptr<Linears<T>> linear;
    std::unique_ptr<CopyRows> copy;
  };
  std::vector<Link> links;
  std::vector<std::unique_ptr<T[]>> results;
  std::vector<T*> streams{nullptr};  // the entry, then the results, of which the last is the caller's
  std::vector<int64_t> before;           // the stream before each site that is measured
  std::unique_ptr<float[]> scratch;
  int64_t work = 0, width = 0;

  Chain(const Tensor& x, const std::vector<Maybe>& tensors, const std::vector<int64_t>& code,
        const std::vector<double>& numbers) {
    const int64_t R = rows_of(x), B = x.size(0), Q = R / B;  // Q counts for attention, whose x is [B, Q, K]
    auto tensor = tensors.begin();
    auto number = numbers.begin();
    auto at = code.begin();
    int64_t room = 0;
    const auto several = [&](int64_t count) {
      std::vector<Tensor> weights;
      for (int64_t i = 0; i < count; i++) weights.push_back(**tensor++);
      return weights;
    };
    const auto several_or_none = [&](int64_t count) {
      tensor += count;
      return std::vector<Maybe>(tensor - count, tensor);
    };
    const auto sized = [&](const auto& kernel) {
      room = std::max(room, kernel.scratch());
      work = std::max(work, kernel.work());
      if (kernel.N) width = kernel.N;  // else it has no result
    };
    while (at != code.end()) {
      Link& link = links.emplace_back();
      if (*at == WHEN) {
        link.site = at[1];
        link.skipped = at[2];
        at += 3;
      }
      const int64_t kind = *at++;
      link.kind = Kind(kind);
      if (kind == COUNT) {
        link.counter = (int64_t*)(*tensor++)->mutable_data_ptr();
        link.amount = *at++;
        continue;
      }
      if (kind == COPY) {
        link.copy = std::make_unique<CopyRows>(*tensor[0], *tensor[1], *tensor[2], *tensor[3], *tensor[4], *at++);
        tensor += 5;
        continue;
      }
      if (kind == PASS || kind == MEASURE) {
        link.x = *at++ + 1;
        link.out = *at++ + 1;
        if (kind == MEASURE) {
          before.resize(std::max<int64_t>(before.size(), link.site + 1), 0);
          before[link.site] = link.x;
        }
        continue;
      }
      link.x = *at++ + 1;
      link.residual = kind == CACHE ? -1 : *at++ + 1;
      const int64_t adapters = *at++;  // operands of adapters, behind the others
      if (kind == MLP) {
        const auto own = tensor;
        tensor += 4;
        link.mlp = std::make_unique<GatedMLP<T>>(R, own[0], number[0], *own[1], own[2], *own[3], *at++,
                                                 several_or_none(adapters));
        number += 1;
        sized(*link.mlp);
      } else if (kind == LINEAR) {
        const int64_t parts = *at++;
        const Maybe& norm = *tensor++;
        const auto weights = several(parts);
        const auto biases = several_or_none(parts);
        link.linear = std::make_unique<Linears<T>>(R, norm, *number++, weights, biases, several_or_none(adapters));
        sized(*link.linear);
      } else {
        const bool whole = kind == ATTENTION;
        const int64_t parts = *at++;
        const bool causal = whole && *at++;
        const Maybe& norm = *tensor++;
        const auto weights = several(parts);
        const auto biases = several_or_none(parts);
        const Maybe none, &q_norm = whole ? *tensor++ : none;
        const auto own = tensor;
        tensor += whole ? 10 : 6;
        link.attention = std::make_unique<AttentionBlock<T>>(
            B, Q, norm, number[0], weights, biases, q_norm, own[0], number[1], own[1], own[2], *own[3], *own[4], *own[5],
            whole ? own[6] : none, whole ? own[7] : none, causal, whole ? number[2] : 0, whole ? number[3] : 0,
            whole ? own[8] : none, whole ? own[9] : none, several_or_none(adapters));
        number += whole ? 4 : 2;
        sized(*link.attention);
      }
      if (kind == CACHE) continue;
      results.emplace_back(new T[R * width]);
      link.out = streams.size();
      streams.push_back(results.back().get());
    }
    scratch.reset(new float[room]);
  }

  Tensor run(const Tensor& x, Gates gates) {
    Tensor result = empty(sizes_like(x, width), x.scalar_type());
    T* const to = (T*)result.mutable_data_ptr();
    streams.front() = (T*)x.const_data_ptr();
    streams.back() = to;  // nobody in the chain reads the last one
    for (const Link& link : links) {
      if (link.attention) link.attention->check();
      if (link.mlp) link.mlp->check();
      if (link.linear) link.linear->check();
      if (link.copy) link.copy->check();
    }
    const int64_t entry_width = x.size(x.dim() - 1), rows = rows_of(x);
    std::vector<uint8_t> skipped(gates.sites);  // as the call leaves it: the first thread's
#pragma omp parallel num_threads(threads_for(work))
    walk(gates, to, entry_width, rows, skipped);
    std::copy(skipped.begin(), skipped.end(), gates.skipped);
    return result;
  }

  // What each thread does. All of them draw the same conclusions from the same similarities.
  void walk(const Gates& gates, T* result, int64_t entry_width, int64_t rows, std::vector<uint8_t>& skipped_after) {
    const bool first = omp_get_thread_num() == 0;
    std::vector<T*> own;
    std::vector<uint8_t> skipped(gates.skipped, gates.skipped + gates.sites);
    std::vector<float> found(gates.sites ? 3 * rows : 0);
    if (gates.sites) own = streams;
    T** const stream = gates.sites ? own.data() : streams.data();
    for (const Link& link : links) {
      if (link.site >= 0 && skipped[link.site] != link.skipped) continue;
      if (link.counter) {
        if (first) *link.counter += link.amount;
        continue;  // nothing later in the chain reads it
      }
      if (link.kind == MEASURE) {
        if (gates.decides(link.site)) decide(gates, link, stream, entry_width, rows, found.data(), skipped);
        continue;  // the others are measured at the end, where no thread waits for another
      }
      if (link.kind == PASS) {
        const float scale = gates.scale[link.site];
        if (scale == 1) {
          stream[link.out] = stream[link.x];
          continue;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * entry_width; i++) narrow(widen(stream[link.x][i]) * scale, stream[link.out] + i);
        continue;
      }
      const T *in = stream[link.x], *add = link.residual < 0 ? nullptr : stream[link.residual];
      T* to = link.out ? stream[link.out] : nullptr;
      if (link.copy)
        link.copy->run();
      else if (link.attention)
        link.attention->run(in, add, to, scratch.get());
      else if (link.mlp)
        link.mlp->run(in, add, to, scratch.get());
      else
        link.linear->run(in, add, to, scratch.get());
#pragma omp barrier
    }
    if (!gates.sites) return;
    for (const Link& link : links)
      if (link.kind == MEASURE && gates.measures && !gates.decides(link.site) && !skipped[link.site] &&
          omp_get_thread_num() == link.site % omp_get_num_threads())
        measure(gates, link, stream, entry_width, rows, gates.moments + link.site * rows * 3);
    if (first) {
      skipped_after = skipped;
      if (T* const last = own.back(); last != result) std::memcpy(result, last, rows * entry_width * sizeof(T));
    }
  }

  void measure(const Gates& gates, const Link& link, T* const* stream, int64_t width, int64_t rows, float* out) const {
    const T *x = stream[before[gates.since[link.site]]], *y = stream[link.out];
    for (int64_t r = 0; r < rows; r++) moments_of(x + r * width, y + r * width, width, out + 3 * r);
  }

  // Every thread measures for itself, which takes less time than telling the others.
  void decide(const Gates& gates, const Link& link, T* const* stream, int64_t width, int64_t rows, float* found,
              std::vector<uint8_t>& skipped) const {
    measure(gates, link, stream, width, rows, found);
    if (omp_get_thread_num() == 0) std::copy_n(found, 3 * rows, gates.moments + link.site * rows * 3);
    if (!gates.reached(link.site, found)) return;
    const uint8_t* closes = gates.closes + link.site * gates.sites;
    for (int64_t s = link.site + 1; s < gates.sites; s++) skipped[s] |= closes[s];
  }
};

void check_entry(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() >= 2, "chain: x must be contiguous, with two dimensions or more");
}

Tensor chain(const Tensor& x, const std::vector<Maybe>& tensors, std::vector<int64_t> code,
             std::vector<double> numbers, const std::vector<Tensor>& gates, int64_t rule) {
  check_entry(x);
  if (x.scalar_type() == ScalarType::Float) return Chain<float>(x, tensors, code, numbers).run(x, Gates(gates, rule));
  return Chain<bf16>(x, tensors, code, numbers).run(x, Gates(gates, rule));
}

// Where a tensor lies and how, as kernels read it off. (No operand has more dimensions; `make` sees to it.)
struct Layout {
  const void* data = nullptr;
  int64_t dim = 0, sizes[5] = {}, strides[5] = {};

  Layout() = default;
  explicit Layout(const Tensor& t) : data(t.const_data_ptr()), dim(t.dim()) {
    const auto n = t.sizes(), s = t.strides();
    std::copy_n(n.begin(), std::min<int64_t>(dim, 5), sizes);
    std::copy_n(s.begin(), std::min<int64_t>(dim, 5), strides);
  }
  bool operator==(const Layout& o) const {
    return data == o.data && dim == o.dim && std::equal(sizes, sizes + 5, o.sizes) &&
           std::equal(strides, strides + 5, o.strides);
  }
};

// A chain with its weights in place, since handing over hundreds of tensors takes longer than a layer. What changes from
// call to call is handed over at each call, and not kept. What was read off the tensors is kept as long as it is true.
struct Bound {
  std::vector<Maybe> tensors;
  std::vector<int64_t> changing, given, code;  // tensors[changing[i]] is the call's tensor given[i]
  std::vector<double> numbers;
  std::mutex mutex;
  int64_t rows = 0, batch = 0;  // of the entry
  std::vector<Layout> layouts;
  std::variant<std::monostate, Chain<float>, Chain<bf16>> made;

  Tensor call(const Tensor& x, const std::vector<Tensor>& tensors_of_call, bool trusted, const Gates& gates) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < changing.size(); i++) tensors[changing[i]] = tensors_of_call[given[i]];
    if (!as_before(x, trusted)) make(x);
    for (int64_t i : changing) tensors[i].reset();
    if (auto* wide = std::get_if<Chain<float>>(&made)) return wide->run(x, gates);
    return std::get<Chain<bf16>>(made).run(x, gates);
  }

  // Looking at a tensor means waiting for memory some five times, so the threads share them.
  bool as_before(const Tensor& x, bool trusted) {
    const bool wide = x.scalar_type() == ScalarType::Float;
    if (made.index() != (wide ? 1 : 2) || rows_of(x) != rows || x.size(0) != batch) return false;
    int changed = 0;
    for (int64_t i : changing) changed += !(Layout(*tensors[i]) == layouts[i]);
    if (trusted || changed) return !changed;
#pragma omp parallel for schedule(static) reduction(+ : changed)
    for (size_t i = 0; i < tensors.size(); i++)
      if (tensors[i].has_value()) changed += !(Layout(*tensors[i]) == layouts[i]);
    return !changed;
  }

  void make(const Tensor& x) {
    made = std::monostate();
    rows = rows_of(x);
    batch = x.size(0);
    layouts.assign(tensors.size(), Layout());
    for (size_t i = 0; i < tensors.size(); i++) {
      if (!tensors[i].has_value()) continue;
      layouts[i] = Layout(*tensors[i]);
      STD_TORCH_CHECK(layouts[i].dim <= 5, "chain: operands have at most 5 dimensions");
    }
    if (x.scalar_type() == ScalarType::Float)
      made.emplace<Chain<float>>(x, tensors, code, numbers);
    else
      made.emplace<Chain<bf16>>(x, tensors, code, numbers);
  }
};

int64_t bind_chain(std::vector<Maybe> tensors, std::vector<int64_t> changing, std::vector<int64_t> given,
                   std::vector<int64_t> code, std::vector<double> numbers) {
  Bound* bound = new Bound();
  bound->tensors = std::move(tensors);
  bound->changing = std::move(changing);
  bound->given = std::move(given);
  bound->code = std::move(code);
  bound->numbers = std::move(numbers);
  return (int64_t)bound;
}

void free_chain(int64_t handle) { delete (Bound*)handle; }

Tensor call_chain(int64_t handle, const Tensor& x, const std::vector<Tensor>& given, bool trusted,
                  const std::vector<Tensor>& gates, int64_t rule) {
  check_entry(x);
  return ((Bound*)handle)->call(x, given, trusted, Gates(gates, rule));
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CPU, m) {
  m.impl("attention_block", TORCH_BOX(&attention_block));
  m.impl("cache_block", TORCH_BOX(&cache_block));
  m.impl("copy_rows", TORCH_BOX(&copy_rows));
  m.impl("chain", TORCH_BOX(&chain));
  m.impl("bind_chain", TORCH_BOX(&bind_chain));
  m.impl("call_chain", TORCH_BOX(&call_chain));
}

STABLE_TORCH_LIBRARY_IMPL(skipc, CompositeExplicitAutograd, m) { m.impl("free_chain", TORCH_BOX(&free_chain)); }

}  // namespace skipc
