// SI-LIF over T steps of N neurons, forward and backward (equations: neurons/functional.py).
//
// Compiled by NVRTC with the options that kernel.py composes:
//   ONLY_<kernel>    the one kernel to compile (ALL_KERNELS: every one)
//   X, S             storage of the input and of the spikes: F32, F16 or BF16; all arithmetic is fp32
//   UNIT_THRESHOLD   1: v_threshold is 1, so neither divide nor multiply by it
//   V_SEQ            1: v_seq and its gradient are present, else those pointers are never looked at
//   GRAD_SPIKE       0: the spikes got no gradient (only the potential did)
//   MODE, SMOOTH     of the two compensated kernels: BLEND, GRADIENT, REPLACE; TANH, SCALED_TANH, CLIP, IDENTITY
//   VEC              neurons of one memory access, 4 or 8; a thread of a wide kernel owns 8 neurons
//   BLOCK, WIDE_RING, TALL_BLOCK, TALL_RING   tuning: threads a block, steps loaded ahead
//
// Tensors are contiguous: x, spike, v_seq and their gradients [T, N], v and its gradients [N]; a null
// pointer stands for one that is absent. The backward pass needs nothing of the forward pass but one bit
// an element, |u| <= window, and since only these kernels read it, each family has the layout it likes:
//   single, wide  a thread's 8 bits of step t at mask[t * (threads of the grid) + thread]
//   tall          a neuron's steps 8i..8i+7 at mask[i * N + neuron]
// "single" is "wide" with T = 1 known to the compiler; with v and v_out null it is the stateless op.

typedef long long i64;

// ---- Primitives. The tests give the host's version of them and run this file on the CPU. ----
#ifdef __CUDACC__
#define DEV __device__ __forceinline__
// PTX, not operators: CuPy compiles everything with -ftz=true, which flushes subnormal inputs, and a
// contracted beta * V + X tips spikes. These round once, to nearest, and keep subnormals.
DEV float add(float a, float b) { float r; asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEV float sub(float a, float b) { float r; asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEV float mul(float a, float b) { float r; asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEV float div(float a, float b) { float r; asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
DEV unsigned bits_of(float f) { return __float_as_uint(f); }
DEV float float_of(unsigned b) { return __uint_as_float(b); }
DEV float half_to_float(unsigned short b) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(b)); return r; }
DEV unsigned short float_to_half(float f) {
  unsigned short r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f));
  return r;
}
#endif

// ---- Storage types. CuPy ships no cuda_bf16.h and a bf16 is the upper half of a float anyway. ----
struct F32 {
  typedef unsigned Bits;
  static DEV float decode(Bits b) { return float_of(b); }
  static DEV Bits encode(float f) { return bits_of(f); }
};

struct F16 {
  typedef unsigned short Bits;
  static DEV float decode(Bits b) { return half_to_float(b); }
  static DEV Bits encode(float f) { return float_to_half(f); }
  static DEV unsigned encode2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return encode(low) | (unsigned)encode(high) << 16;
#endif
  }
};

struct BF16 {
  typedef unsigned short Bits;
  static DEV float decode(Bits b) { return float_of((unsigned)b << 16); }
  static DEV Bits encode(float f) {
    const unsigned b = bits_of(f);
    if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;          // NaN, or rounding could make it infinite
    return (Bits)((b + 0x7fffu + (b >> 16 & 1u)) >> 16);         // to nearest, ties to even
  }
  static DEV unsigned encode2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return encode(low) | (unsigned)encode(high) << 16;
#endif
  }
};

// ---- One element, one step; each function rounds where neurons/functional.py and its autograd do. ----
DEV float charge(float v, float x, float beta) { return add(mul(beta, v), x); }

DEV float normalise(float h, float v_th) { return UNIT_THRESHOLD ? h : div(h, v_th); }

DEV float spike_count(float u, float max_count) {
  float count = ceilf(sub(float_of(bits_of(u) & 0x7fffffffu), 0.5f));
  count = count > max_count ? max_count : count;                 // not fminf: NaN stays NaN
  return float_of((bits_of(count) & 0x7fffffffu) | (bits_of(u) & ~0x7fffffffu));  // copysign
}

// |u| <= window on the bits: the order of non-negative floats, NaN above them all.
DEV unsigned inside(float u, float window) { return (bits_of(u) & 0x7fffffffu) <= bits_of(window); }

DEV float reset(float h, float spike, float v_th) { return sub(h, UNIT_THRESHOLD ? spike : mul(v_th, spike)); }

// dL/dH = gV + (gS - V_th * gV) * (alpha * inside) / V_th, the middle term only if the reset is not detached.
// slope is alpha or 0; multiplying, not selecting, keeps an infinite or NaN gradient as visible as torch does.
DEV float grad_charge(float grad_spike, float grad_v, float slope, float v_th, int detach_reset) {
  float g = detach_reset ? grad_spike : sub(grad_spike, UNIT_THRESHOLD ? grad_v : mul(v_th, grad_v));
  g = mul(g, slope);
  return add(grad_v, UNIT_THRESHOLD ? g : div(g, v_th));
}

// ---- Wide kernels: 8 neurons a thread, all of their steps in a row. ----
// A block owns 8 * BLOCK neighbouring neurons as GROUPS runs of BLOCK * VEC, so that every access of a
// warp is one dense piece of memory.
#define GROUPS (8 / VEC)

template <class T>
struct alignas(sizeof(typename T::Bits) * VEC < 16 ? sizeof(typename T::Bits) * VEC : 16) Vec {
  typedef typename T::Bits Bits;
  static const int PER_WORD = 4 / sizeof(Bits);
  unsigned word[VEC / PER_WORD];

  DEV float get(int i) const { return T::decode((Bits)(word[i / PER_WORD] >> (i % PER_WORD) * 16)); }
};

template <class T>
struct Pack {                                                     // floats -> words, by the width of T
  static DEV void put(Vec<T>& to, const float* from) {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) to.word[i] = T::encode2(from[2 * i], from[2 * i + 1]);
  }
};
template <>
struct Pack<F32> {
  static DEV void put(Vec<F32>& to, const float* from) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) to.word[i] = bits_of(from[i]);
  }
};

// FULL: all VEC elements exist and the address is aligned; otherwise one by one, the first `count` of them.
template <class T, bool FULL>
DEV void load(Vec<T>& to, const typename T::Bits* from, int count) {
  if (FULL) {
    to = *reinterpret_cast<const Vec<T>*>(from);
  } else {
    const int per_word = Vec<T>::PER_WORD;
#pragma unroll
    for (int i = 0; i < VEC / per_word; ++i) to.word[i] = 0;
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (i < count) to.word[i / per_word] |= (unsigned)from[i] << (i % per_word) * 16;
  }
}

template <class T, bool FULL>
DEV void store(typename T::Bits* to, const float* from, int count) {
  if (FULL) {
    Vec<T> packed;
    Pack<T>::put(packed, from);
    *reinterpret_cast<Vec<T>*>(to) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (i < count) to[i] = T::encode(from[i]);
  }
}

template <bool FULL>
DEV void load_floats(float* to, const float* from, int count) {
  Vec<F32> packed;
  load<F32, FULL>(packed, reinterpret_cast<const unsigned*>(from), count);
#pragma unroll
  for (int i = 0; i < VEC; ++i) to[i] = packed.get(i);
}

template <bool FULL>
DEV void store_floats(float* to, const float* from, int count) {
  store<F32, FULL>(reinterpret_cast<unsigned*>(to), from, count);
}

struct Place {                                                    // what a thread of a wide kernel owns
  i64 byte, bytes;                                                // its byte in a row of the mask, bytes of a row
  i64 n[GROUPS];                                                  // first neuron of each run
  int count[GROUPS];                                              // how many of its VEC exist

  DEV Place(i64 N) {
    byte = (i64)blockIdx.x * BLOCK + threadIdx.x;
    bytes = (i64)gridDim.x * BLOCK;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      n[g] = ((i64)blockIdx.x * GROUPS + g) * (BLOCK * VEC) + threadIdx.x * VEC;
      const i64 left = N - n[g];
      count[g] = left <= 0 ? 0 : left < VEC ? (int)left : VEC;
    }
  }
};

// Every thread of a block takes the same side: 16-byte accesses need aligned rows and no ragged end.
DEV bool block_is_full(i64 N, int aligned) { return aligned && ((i64)blockIdx.x + 1) * (BLOCK * 8) <= N; }

template <int RING, bool FULL>
DEV void forward_rows(const X::Bits* __restrict__ x, const float* __restrict__ v0, S::Bits* __restrict__ spike,
                      float* __restrict__ v_out, float* __restrict__ v_seq, unsigned char* __restrict__ mask, int T,
                      i64 N, float beta, float v_th, float max_count, float window) {
  const Place at(N);
  Vec<X> ring[RING][GROUPS];                                      // inputs of the next RING steps
  float v[8];
#pragma unroll
  for (int k = 0; k < RING; ++k)
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
      if (k < T) load<X, FULL>(ring[k][g], x + k * N + at.n[g], at.count[g]);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = -0.0f;                       // beta * -0 + x is x, its sign included
  if (v0) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) load_floats<FULL>(v + g * VEC, v0 + at.n[g], at.count[g]);
  }
#pragma unroll 1
  for (int t0 = 0; t0 < T; t0 += RING) {
#pragma unroll
    for (int k = 0; k < RING; ++k) {
      const int t = t0 + k;
      if (t >= T) break;
      unsigned bits = 0;
      float h[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) h[i] = charge(v[i], ring[k][i / VEC].get(i % VEC), beta);
      if (t + RING < T) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) load<X, FULL>(ring[k][g], x + (t + RING) * N + at.n[g], at.count[g]);
      }
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        float s[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const int i = g * VEC + j;
          const float u = normalise(h[i], v_th);
          s[j] = spike_count(u, max_count);
          bits |= inside(u, window) << i;
          v[i] = reset(h[i], s[j], v_th);
        }
        store<S, FULL>(spike + t * N + at.n[g], s, at.count[g]);
        if (V_SEQ) store_floats<FULL>(v_seq + t * N + at.n[g], v + g * VEC, at.count[g]);
      }
      if (mask) mask[t * at.bytes + at.byte] = (unsigned char)bits;
    }
  }
  if (v_out) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) store_floats<FULL>(v_out + at.n[g], v + g * VEC, at.count[g]);
  }
}

template <int RING, bool FULL>
DEV void backward_rows(const S::Bits* __restrict__ grad_spike, const float* __restrict__ grad_v,
                       const float* __restrict__ grad_v_seq, const unsigned char* __restrict__ mask,
                       X::Bits* __restrict__ grad_x, float* __restrict__ grad_v0, int T, i64 N, float beta, float v_th,
                       float alpha, int detach_reset) {
  const Place at(N);
  Vec<S> ring[RING][GROUPS];                                      // gradients of the next RING steps, backwards
  unsigned bits[RING] = {};
  float gv[8];
#pragma unroll
  for (int k = 0; k < RING; ++k) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      load<S, false>(ring[k][g], nullptr, 0);                     // zeros, for an absent grad_spike
      if (GRAD_SPIKE && k < T) load<S, FULL>(ring[k][g], grad_spike + (T - 1 - k) * N + at.n[g], at.count[g]);
    }
    if (k < T) bits[k] = mask[(T - 1 - k) * at.bytes + at.byte];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) gv[i] = 0.0f;
  if (grad_v) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) load_floats<FULL>(gv + g * VEC, grad_v + at.n[g], at.count[g]);
  }
#pragma unroll 1
  for (int j0 = 0; j0 < T; j0 += RING) {
#pragma unroll
    for (int k = 0; k < RING; ++k) {
      const int t = T - 1 - (j0 + k);
      if (t < 0) break;
      const unsigned now = bits[k];
      float gs[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) gs[i] = ring[k][i / VEC].get(i % VEC);
      if (t >= RING) {
        bits[k] = mask[(t - RING) * at.bytes + at.byte];
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
          if (GRAD_SPIKE) load<S, FULL>(ring[k][g], grad_spike + (t - RING) * N + at.n[g], at.count[g]);
      }
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (V_SEQ) {
          float more[VEC];
          load_floats<FULL>(more, grad_v_seq + t * N + at.n[g], at.count[g]);
#pragma unroll
          for (int j = 0; j < VEC; ++j) gv[g * VEC + j] = add(gv[g * VEC + j], more[j]);
        }
        float gh[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const int i = g * VEC + j;
          gh[j] = grad_charge(gs[i], gv[i], now >> i & 1u ? alpha : 0.0f, v_th, detach_reset);
          gv[i] = mul(beta, gh[j]);
        }
        store<X, FULL>(grad_x + t * N + at.n[g], gh, at.count[g]);
      }
    }
  }
  if (grad_v0) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) store_floats<FULL>(grad_v0 + at.n[g], gv + g * VEC, at.count[g]);
  }
}

// ---- Tall kernels: few neurons, many steps. One neuron a thread; TALL_RING loads are always in flight. ----
#define FORWARD_PARAMETERS                                                                                    \
  const X::Bits *__restrict__ x, const float *__restrict__ v0, S::Bits *__restrict__ spike,                   \
      float *__restrict__ v_out, float *__restrict__ v_seq, unsigned char *__restrict__ mask, int T, i64 N,   \
      float beta, float v_th, float max_count, float window, int aligned
#define BACKWARD_PARAMETERS                                                                                   \
  const S::Bits *__restrict__ grad_spike, const float *__restrict__ grad_v,                                   \
      const float *__restrict__ grad_v_seq, const unsigned char *__restrict__ mask,                           \
      X::Bits *__restrict__ grad_x, float *__restrict__ grad_v0, int T, i64 N, float beta, float v_th,        \
      float alpha, int detach_reset, int aligned

#if defined(ONLY_forward_tall) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(TALL_BLOCK) forward_tall(FORWARD_PARAMETERS) {
  const i64 n = (i64)blockIdx.x * TALL_BLOCK + threadIdx.x;
  if (n >= N) return;
  // Pointers walk down their columns: an addition a step, where an index would cost a multiplication.
  const X::Bits* ahead = x + n;
  S::Bits* out = spike + n;
  float* seq = v_seq + n;
  unsigned char* byte = mask + n;
  X::Bits ring[TALL_RING];
  float v = v0 ? v0[n] : -0.0f;
#pragma unroll
  for (int k = 0; k < TALL_RING; ++k, ahead += N)
    if (k < T) ring[k] = *ahead;

  // `left` steps are to be done. `guarded` is a constant at both calls, so that the long run tests nothing;
  // the guards select, since 32 branches out of one chunk take seconds to compile.
  auto chunk = [&](const int left, const bool guarded) {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < TALL_RING; ++k) {
      const bool real = !guarded || k < left;
      const float h = charge(v, X::decode(ring[k]), beta);
      if (!guarded || k + TALL_RING < left) ring[k] = *ahead;
      ahead += N;
      const float u = normalise(h, v_th);
      const float s = spike_count(u, max_count);
      bits |= real ? inside(u, window) << k % 8 : 0;
      v = real ? reset(h, s, v_th) : v;
      if (real) *out = S::encode(s);
      out += N;
      if (V_SEQ) {
        if (real) *seq = v;
        seq += N;
      }
      if (k % 8 == 7) {
        if (mask && (!guarded || k - 7 < left)) *byte = (unsigned char)bits;
        byte += N;
        bits = 0;
      }
    }
  };
  int left = T;
#pragma unroll 1
  for (; left >= 2 * TALL_RING; left -= TALL_RING) chunk(left, false);
#pragma unroll 1
  for (; left > 0; left -= TALL_RING) chunk(left, true);
  if (v_out) v_out[n] = v;
}
#endif

#if defined(ONLY_backward_tall) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(TALL_BLOCK) backward_tall(BACKWARD_PARAMETERS) {
  const i64 n = (i64)blockIdx.x * TALL_BLOCK + threadIdx.x;
  if (n >= N) return;
  const int ragged = (T - 1) % TALL_RING + 1;                     // steps of the last chunk; the others are whole
  const i64 end = T - ragged + TALL_RING - 1;                     // as if the last chunk were whole too
  const S::Bits* ahead = grad_spike + end * N + n;
  const float* seq = grad_v_seq + end * N + n;
  const unsigned char* byte = mask + end / 8 * N + n;
  X::Bits* out = grad_x + end * N + n;
  S::Bits ring[TALL_RING];
  unsigned bits[TALL_RING / 8];
  float gv = grad_v ? grad_v[n] : 0.0f;
#pragma unroll
  for (int k = TALL_RING - 1; k >= 0; --k, ahead -= N) {
    ring[k] = 0;
    if (GRAD_SPIKE && k < ragged) ring[k] = *ahead;
    if (k % 8 == 0) {
      bits[k / 8] = 0;
      if (k < ragged) bits[k / 8] = *byte;
      byte -= N;
    }
  }

  // The first `steps` of a chunk exist; `more`: another chunk follows, load it.
  auto chunk = [&](const int steps, const bool more) {
#pragma unroll
    for (int k = TALL_RING - 1; k >= 0; --k) {
      const bool real = k < steps;
      const float slope = bits[k / 8] >> k % 8 & 1u ? alpha : 0.0f;
      const float gs = S::decode(ring[k]);
      if (GRAD_SPIKE && more) ring[k] = *ahead;
      ahead -= N;
      if (k % 8 == 0) {
        if (more) bits[k / 8] = *byte;
        byte -= N;
      }
      if (V_SEQ) {
        if (real) gv = add(gv, *seq);
        seq -= N;
      }
      const float gh = grad_charge(gs, gv, slope, v_th, detach_reset);
      if (real) *out = X::encode(gh);
      out -= N;
      gv = real ? mul(beta, gh) : gv;
    }
  };
  int left = T - ragged;
  chunk(ragged, left > 0);
#pragma unroll 1
  for (; left > 0; left -= TALL_RING) chunk(TALL_RING, left > TALL_RING);
  if (grad_v0) grad_v0[n] = gv;
}
#endif

// ---- Entry points of the wide family. ----
#define FORWARD_ROWS(ring, full, steps)                                                                       \
  forward_rows<ring, full>(x, v0, spike, v_out, v_seq, mask, steps, N, beta, v_th, max_count, window)
#define BACKWARD_ROWS(ring, full, steps)                                                                      \
  backward_rows<ring, full>(grad_spike, grad_v, grad_v_seq, mask, grad_x, grad_v0, steps, N, beta, v_th,      \
                            alpha, detach_reset)

#if defined(ONLY_forward_single) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) forward_single(FORWARD_PARAMETERS) {
  if (block_is_full(N, aligned)) FORWARD_ROWS(1, true, 1);
  else FORWARD_ROWS(1, false, 1);
}
#endif

#if defined(ONLY_forward_wide) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) forward_wide(FORWARD_PARAMETERS) {
  if (block_is_full(N, aligned)) FORWARD_ROWS(WIDE_RING, true, T);
  else FORWARD_ROWS(1, false, T);
}
#endif

#if defined(ONLY_backward_single) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) backward_single(BACKWARD_PARAMETERS) {
  if (block_is_full(N, aligned)) BACKWARD_ROWS(1, true, 1);
  else BACKWARD_ROWS(1, false, 1);
}
#endif

#if defined(ONLY_backward_wide) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) backward_wide(BACKWARD_PARAMETERS) {
  if (block_is_full(N, aligned)) BACKWARD_ROWS(WIDE_RING, true, T);
  else BACKWARD_ROWS(1, false, T);
}
#endif

// ---- Compensated: spikes of fresh neurons at unit threshold, and a smooth path mixed into them. ----
// Equations: neurons/compensation.py. No mask is kept: the slope of f needs u, which is there anyway, and
// with u goes the window. Only the spikes are exact to the bit; the smooth path is fp32, rounded once.
#if defined(ONLY_forward_compensated) || defined(ONLY_backward_compensated) || defined(ALL_KERNELS)
enum { BLEND, GRADIENT, REPLACE };
enum { TANH, SCALED_TANH, CLIP, IDENTITY };

DEV float smooth(float u, float d) {
  if (SMOOTH == TANH) return d * tanhf(u);
  if (SMOOTH == SCALED_TANH) return d * tanhf(u / d);
  if (SMOOTH == CLIP) return u > d ? d : u < -d ? -d : u;         // NaN stays NaN
  return u;
}

DEV float smooth_slope(float u, float d) {
  if (SMOOTH == CLIP) return inside(u, d) ? 1.0f : 0.0f;
  if (SMOOTH == IDENTITY) return 1.0f;
  const float t = tanhf(SMOOTH == TANH ? u : u / d);
  return (SMOOTH == TANH ? d : 1.0f) * (1.0f - t * t);
}

#define FORWARD_COMPENSATED_PARAMETERS                                                                        \
  const X::Bits *__restrict__ x, S::Bits *__restrict__ spike, S::Bits *__restrict__ mixed, int T, i64 N,      \
      float max_count, float lam, int aligned
#define BACKWARD_COMPENSATED_PARAMETERS                                                                       \
  const X::Bits *__restrict__ x, const S::Bits *__restrict__ grad_spike,                                      \
      const S::Bits *__restrict__ grad_mixed, X::Bits *__restrict__ grad_x, int T, i64 N, float max_count,    \
      float window, float alpha, float lam, int aligned

template <bool FULL>
DEV void forward_compensated_row(FORWARD_COMPENSATED_PARAMETERS) {
  const Place at(N);
  Vec<X> in[GROUPS];
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) load<X, FULL>(in[g], x + at.n[g], at.count[g]);
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    float s[VEC], a[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float u = in[g].get(j);
      s[j] = spike_count(u, max_count);
      a[j] = MODE == BLEND ? s[j] + lam * (smooth(u, max_count) - s[j]) : s[j];
    }
    store<S, FULL>(spike + at.n[g], s, at.count[g]);
    store<S, FULL>(mixed + at.n[g], a, at.count[g]);
  }
}

template <bool FULL>
DEV void backward_compensated_row(BACKWARD_COMPENSATED_PARAMETERS) {
  const Place at(N);
  Vec<X> in[GROUPS];
  Vec<S> gm[GROUPS], gs[GROUPS];
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    load<X, FULL>(in[g], x + at.n[g], at.count[g]);
    load<S, FULL>(gm[g], grad_mixed + at.n[g], at.count[g]);
    if (GRAD_SPIKE) load<S, FULL>(gs[g], grad_spike + at.n[g], at.count[g]);
  }
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    float gu[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float u = in[g].get(j), slope = inside(u, window) ? alpha : 0.0f;
      const float kept = MODE == GRADIENT ? slope : (1.0f - lam) * slope;
      gu[j] = gm[g].get(j) * (kept + lam * smooth_slope(u, max_count));
      if (GRAD_SPIKE) gu[j] += gs[g].get(j) * slope;
    }
    store<X, FULL>(grad_x + at.n[g], gu, at.count[g]);
  }
}
#endif

#if defined(ONLY_forward_compensated) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) forward_compensated(FORWARD_COMPENSATED_PARAMETERS) {
  if (block_is_full(N, aligned)) forward_compensated_row<true>(x, spike, mixed, T, N, max_count, lam, aligned);
  else forward_compensated_row<false>(x, spike, mixed, T, N, max_count, lam, aligned);
}
#endif

#if defined(ONLY_backward_compensated) || defined(ALL_KERNELS)
extern "C" __global__ void __launch_bounds__(BLOCK) backward_compensated(BACKWARD_COMPENSATED_PARAMETERS) {
  if (block_is_full(N, aligned))
    backward_compensated_row<true>(x, grad_spike, grad_mixed, grad_x, T, N, max_count, window, alpha, lam, aligned);
  else
    backward_compensated_row<false>(x, grad_spike, grad_mixed, grad_x, T, N, max_count, window, alpha, lam, aligned);
}
#endif
