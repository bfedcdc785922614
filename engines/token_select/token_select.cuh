// infoprune::TokenSelect: the greedy choice of visual tokens, whole, with one thread block for each image.
//
// One source for two compilers. A CUDA compiler makes the kernels token_select_f32, _f16 and _bf16 of it, any other C++
// compiler, where TOKEN_SELECT_HOST is defined, the function token_select_host. That runs the same phases one thread
// after the other: what a phase does must not depend on the order of its threads, so the host can prove the answers.
//
// Per image, of which `count` tokens are its own:
//   q = softmax(a / temperature)^exponent; the pool holds the tokens of highest prior a, ties go to the lowest position
//   z = sqrt(q) x, scaled by the largest |z|; pivoted Cholesky of z z^T takes the largest residual, pivot by pivot
//   it stops at epsilon times the largest squared norm, or after D pivots; the order of the prior fills the rest
// NaN and infinity count as zero. A row of the Gram matrix is made when its pivot is, so no matrix of M x M is held.
#pragma once

#ifdef __CUDACC__
#define TOKEN_SELECT_INLINE __device__ __forceinline__
#define TOKEN_SELECT_BOTH __host__ __device__ inline
#define TOKEN_SELECT_UNROLL _Pragma("unroll 8")
#else
#include <math.h>
#include <string.h>
#define TOKEN_SELECT_INLINE inline
#define TOKEN_SELECT_BOTH inline
#define TOKEN_SELECT_UNROLL
#endif

namespace infoprune {

constexpr int kLanes = 32;         // threads that share a token's product
constexpr int kPitch = kLanes + 1; // of their partial sums, so that a column of them meets every memory bank
constexpr int kMaxThreads = 512;
constexpr float kLargest = 3.402823466e38f;
constexpr float kSmallest = 1.175494351e-38f;

struct Settings {
  int tokens, width, keep; // N, D, T
  int numerator, denominator;
  float pool_factor, temperature, exponent, epsilon;
};

// ── One block ────────────────────────────────────────────────────────────────

struct Block {
  int threads;    // a multiple of kLanes
  bool backwards; // host only: the order in which it takes a phase's threads
};

// Run `body` for every thread of the block; nothing behind it starts before all are through.
template <class Body> TOKEN_SELECT_INLINE void phase(const Block& block, Body body) {
#ifdef __CUDACC__
  body(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int turn = 0; turn < block.threads; ++turn) body(block.backwards ? block.threads - 1 - turn : turn);
#endif
}

// Merge what every thread left in its slot into slot 0; `merge(into, from)` takes two slots.
template <class Merge> TOKEN_SELECT_INLINE void fold(const Block& block, Merge merge) {
  for (int width = block.threads; width > 1;) {
    const int half = (width + 1) / 2;
    phase(block, [&](int tid) {
      if (tid + half < width) merge(tid, tid + half);
    });
    width = half;
  }
}

// ── Numbers ──────────────────────────────────────────────────────────────────
// The runtime compiler's packages have no cuda_fp16.h, so 16-bit floats are widened here.

struct Half {
  unsigned short bits;
};
struct BFloat {
  unsigned short bits;
};

TOKEN_SELECT_INLINE float float_of(unsigned bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

TOKEN_SELECT_INLINE float widen(float x) { return x; }
TOKEN_SELECT_INLINE float widen(BFloat x) { return float_of(static_cast<unsigned>(x.bits) << 16); }
TOKEN_SELECT_INLINE float widen(Half x) {
#ifdef __CUDACC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float value = exponent ? ldexpf(1024.0f + fraction, exponent - 25) : ldexpf(fraction, -24);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return x.bits >> 15 ? -value : value;
#endif
}

TOKEN_SELECT_INLINE float finite(float x) { return fabsf(x) <= kLargest ? x : 0.0f; }
TOKEN_SELECT_INLINE float minus_infinity() { return float_of(0xff800000u); }

// ── Sizes ────────────────────────────────────────────────────────────────────

TOKEN_SELECT_BOTH int least(int a, int b) { return a < b ? a : b; }

// ceil(count * numerator / denominator)
TOKEN_SELECT_BOTH int keep_count(int count, const Settings& s) {
  return static_cast<int>((static_cast<long long>(count) * s.numerator + s.denominator - 1) / s.denominator);
}

// min(count, ceil(alpha * keep)); the product is rounded to fp32, as it is in an ONNX graph.
TOKEN_SELECT_BOTH int pool_count(int count, int keep, const Settings& s) {
  const float wanted = ceilf(s.pool_factor * static_cast<float>(keep));
  return wanted < static_cast<float>(count) ? static_cast<int>(wanted) : count;
}

// What one image needs of `work`, in floats: the factor, and three values for each of the pool, and the choice.
TOKEN_SELECT_BOTH long long work_floats(const Settings& s) {
  const long long size = pool_count(s.tokens, s.keep, s);
  return (least(s.keep, s.width) + 3) * size + s.keep;
}

// What a block needs of shared memory, in floats.
TOKEN_SELECT_BOTH long long shared_floats(const Settings& s, int threads) {
  return static_cast<long long>(s.width) + least(s.keep, s.width) + 2 + 2 * kPitch * (threads / kLanes);
}

// ── One image ────────────────────────────────────────────────────────────────
// `shared` has shared_floats, `work` has work_floats; an image of fewer tokens uses less of it.

template <class Feature>
TOKEN_SELECT_INLINE void select_image(const Feature* __restrict__ features, const float* __restrict__ prior,
                                      int own, const Settings& s, int* __restrict__ kept, float* work,
                                      float* shared, const Block& block) {
  const int count = own < 0 ? 0 : least(own, s.tokens);
  const int keep = keep_count(count, s), size = pool_count(count, keep, s), steps = least(keep, s.width);
  const int threads = block.threads, groups = threads / kLanes;

  float* direction = shared;                       // the pivot's z [D]
  float* known = direction + s.width;              // the pivot's column of the factor
  float* result = known + least(s.keep, s.width);  // what the whole block reads: a value and a place
  float* slots = result + 2;                       // a value and a place of every thread, or two rounds of partial sums
  int* places = reinterpret_cast<int*>(slots) + threads;
  int* result_place = reinterpret_cast<int*>(result) + 1;

  float* factor = work;                                     // [steps, M], a row for every pivot
  float* residual = factor + static_cast<long long>(steps) * size;
  float* weight = residual + size;                          // sqrt(q)
  int* pool = reinterpret_cast<int*>(weight + size);        // positions by descending prior
  int* chosen = pool + size;                                // [keep]

  const auto larger = [&](int into, int from) { slots[into] = fmaxf(slots[into], slots[from]); };
  const auto sum = [&](int into, int from) { slots[into] += slots[from]; };
  const auto better = [&](int into, int from) {
    if (slots[from] > slots[into] || (slots[from] == slots[into] && places[from] < places[into])) {
      slots[into] = slots[from];
      places[into] = places[from];
    }
  };
  // Slot 0 for all; without its own slot a thread could overwrite it before another has read it.
  const auto broadcast = [&]() {
    phase(block, [&](int tid) {
      if (tid == 0) {
        result[0] = slots[0];
        result_place[0] = places[0];
      }
    });
    return result[0];
  };

  phase(block, [&](int tid) {
    for (int slot = tid; slot < s.keep; slot += threads) kept[slot] = -1;
  });
  if (count == 0) return;

  // ── Weights and pool ──
  phase(block, [&](int tid) {
    float top = minus_infinity();
    for (int i = tid; i < count; i += threads) top = fmaxf(top, finite(prior[i]));
    slots[tid] = top;
  });
  fold(block, larger);
  const float top = broadcast();
  phase(block, [&](int tid) {
    float total = 0.0f;
    for (int i = tid; i < count; i += threads) total += expf((finite(prior[i]) - top) / s.temperature);
    slots[tid] = total;
  });
  fold(block, sum);
  const float total = broadcast();
  phase(block, [&](int tid) {
    for (int i = tid; i < count; i += threads) {
      const float a = finite(prior[i]);
      int rank = 0;
      for (int j = 0; j < count; ++j) {
        const float other = finite(prior[j]);
        rank += other > a || (other == a && j < i);
      }
      if (rank < size) {
        pool[rank] = i;
        weight[rank] = sqrtf(powf(expf((a - top) / s.temperature) / total, s.exponent));
      }
    }
  });

  // ── Scale ──
  const auto weighted = [&](int row, int d) {
    return finite(widen(features[static_cast<long long>(pool[row]) * s.width + d])) * weight[row];
  };
  phase(block, [&](int tid) {
    float largest = 0.0f;
    for (int row = tid / kLanes; row < size; row += groups)
      for (int d = tid % kLanes; d < s.width; d += kLanes) largest = fmaxf(largest, fabsf(weighted(row, d)));
    slots[tid] = largest;
  });
  fold(block, larger);
  const float scale = 1.0f / fmaxf(broadcast(), kSmallest);

  // ── Products of all open rows with `direction`, or of each row with itself ──
  // A residual only falls, so a row at the threshold is never picked any more and needs no products.
  float threshold = minus_infinity();
  const auto products = [&](bool squares, float* into) {
    const auto open = [&](int row) { return row >= 0 && row < size && (squares || residual[row] > threshold); };
    // The partial sums of a round are added up while the next round makes its own.
    for (int base = 0, turn = 0; base < size + groups; base += groups, turn ^= 1) {
      phase(block, [&](int tid) {
        const int done = base - groups + tid, row = base + tid / kLanes;
        if (tid < groups && open(done)) {
          const float* partial = slots + ((turn ^ 1) * groups + tid) * kPitch;
          float value = 0.0f;
          for (int lane = 0; lane < kLanes; ++lane) value += partial[lane];
          into[done] = value;
        }
        if (open(row)) {
          const Feature* x = features + static_cast<long long>(pool[row]) * s.width;
          const float own_weight = weight[row];
          float value = 0.0f;
          TOKEN_SELECT_UNROLL
          for (int d = tid % kLanes; d < s.width; d += kLanes) {
            const float z = finite(widen(x[d])) * own_weight * scale;
            value += z * (squares ? z : direction[d]);
          }
          slots[(turn * groups + tid / kLanes) * kPitch + tid % kLanes] = value;
        }
      });
    }
  };

  // ── Greedy choice ──
  products(true, residual);
  phase(block, [&](int tid) {
    slots[tid] = minus_infinity();
    places[tid] = size;
    for (int row = tid; row < size; row += threads) {
      if (residual[row] > slots[tid]) {
        slots[tid] = residual[row];
        places[tid] = row;
      }
    }
  });
  int taken = 0;
  for (; taken < steps; ++taken) {
    fold(block, better);
    const float best = broadcast();
    const int pivot = result_place[0];
    if (taken == 0) threshold = s.epsilon * best;
    if (best <= threshold) break;
    phase(block, [&](int tid) {
      for (int d = tid; d < s.width; d += threads) direction[d] = weighted(pivot, d) * scale;
      for (int k = tid; k < taken; k += threads) known[k] = factor[static_cast<long long>(k) * size + pivot];
      if (tid == 0) {
        residual[pivot] = minus_infinity();
        chosen[taken] = pivot;
      }
    });
    float* column = factor + static_cast<long long>(taken) * size;
    products(false, column);
    const float inverse = 1.0f / sqrtf(best);
    phase(block, [&](int tid) {
      float most = minus_infinity();
      int place = size;
      for (int row = tid; row < size; row += threads) {
        if (residual[row] > threshold) {
          float value = column[row];
          const float* earlier = factor + row;
          TOKEN_SELECT_UNROLL
          for (int k = 0; k < taken; ++k, earlier += size) value -= known[k] * *earlier;
          value *= inverse;
          column[row] = value;
          residual[row] -= value * value;
          if (residual[row] > most) {
            most = residual[row];
            place = row;
          }
        }
      }
      slots[tid] = most;
      places[tid] = place;
    });
  }

  // ── Fill and order ──
  phase(block, [&](int tid) {
    for (int row = tid; row < size; row += threads) {
      int open_before = row;
      bool open = true;
      for (int k = 0; k < taken; ++k) {
        open_before -= chosen[k] < row;
        open = open && chosen[k] != row;
      }
      if (open && open_before < keep - taken) chosen[taken + open_before] = row;
    }
  });
  phase(block, [&](int tid) {
    for (int slot = tid; slot < keep; slot += threads) chosen[slot] = pool[chosen[slot]];
  });
  phase(block, [&](int tid) {
    for (int slot = tid; slot < keep; slot += threads) {
      int rank = 0;
      for (int other = 0; other < keep; ++other) rank += chosen[other] < chosen[slot];
      kept[rank] = chosen[slot];
    }
  });
}

// ── Entry points ─────────────────────────────────────────────────────────────
// Scalars come as 32-bit integers, floats as their bits: that is all an ahead-of-time plugin can pass. `stride` is the
// extent of `work` for one image.

#define TOKEN_SELECT_SCALARS                                                                                       \
  int tokens, int width, int keep, int stride, int numerator, int denominator, int pool_factor, int temperature,   \
      int exponent, int epsilon
#define TOKEN_SELECT_SETTINGS                                                                                      \
  {                                                                                                                \
    tokens, width, keep, numerator, denominator, infoprune::float_of(pool_factor), infoprune::float_of(temperature), \
        infoprune::float_of(exponent), infoprune::float_of(epsilon)                                                \
  }

template <class Feature>
TOKEN_SELECT_INLINE void select_of_batch(int image, const Feature* features, const float* prior, const int* counts,
                                         const Settings& s, int stride, int* kept, float* work, float* shared,
                                         const Block& block) {
  const long long row = image;
  select_image(features + row * s.tokens * s.width, prior + row * s.tokens, counts[row], s, kept + row * s.keep,
               work + row * stride, shared, block);
}

} // namespace infoprune

#ifdef __CUDACC__
#define TOKEN_SELECT_KERNEL(NAME, FEATURE)                                                                         \
  extern "C" __global__ void __launch_bounds__(infoprune::kMaxThreads, 1)                                          \
      NAME(const FEATURE* features, const float* prior, const int* counts, TOKEN_SELECT_SCALARS, int* kept,        \
           float* work) {                                                                                          \
    extern __shared__ float shared[];                                                                              \
    const infoprune::Settings settings = TOKEN_SELECT_SETTINGS;                                                    \
    infoprune::select_of_batch(blockIdx.x, features, prior, counts, settings, stride, kept, work, shared,          \
                               {static_cast<int>(blockDim.x), false});                                             \
  }
TOKEN_SELECT_KERNEL(token_select_f32, float)
TOKEN_SELECT_KERNEL(token_select_f16, infoprune::Half)
TOKEN_SELECT_KERNEL(token_select_bf16, infoprune::BFloat)
#elif defined(TOKEN_SELECT_HOST)
// The same for all images of a batch, and what `work` needs for each; `kind` is 0 for fp32, 1 for fp16, 2 for bf16
// features, and `shared` is what a block has of shared memory on the device.
extern "C" long long token_select_host(int kind, int batch, int threads, int backwards, const void* features,
                                       const float* prior, const int* counts, TOKEN_SELECT_SCALARS, int* kept,
                                       float* work, float* shared) {
  using namespace infoprune;
  const Settings settings = TOKEN_SELECT_SETTINGS;
  const Block block = {threads, backwards != 0};
  const auto run = [&](auto* typed) {
    for (int image = 0; image < batch; ++image)
      select_of_batch(image, typed, prior, counts, settings, stride, kept, work, shared, block);
  };
  if (kind == 0) run(static_cast<const float*>(features));
  if (kind == 1) run(static_cast<const Half*>(features));
  if (kind == 2) run(static_cast<const BFloat*>(features));
  return work_floats(settings);
}
#endif
