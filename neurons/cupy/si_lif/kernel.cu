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

#include "../arithmetic.cuh"
#include "../vectors.cuh"

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

// ---- What a thread of a wide kernel owns: 8 neurons, all of their steps in a row. ----
// A block owns 8 * BLOCK neighbouring neurons as GROUPS runs of BLOCK * VEC, so that every access of a
// warp is one dense piece of memory.
#define GROUPS (8 / VEC)

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

// ---- The kernels ----
#define FORWARD_PARAMETERS                                                                                    \
  const X::Bits *__restrict__ x, const float *__restrict__ v0, S::Bits *__restrict__ spike,                   \
      float *__restrict__ v_out, float *__restrict__ v_seq, unsigned char *__restrict__ mask, int T, i64 N,   \
      float beta, float v_th, float max_count, float window, int aligned
#define BACKWARD_PARAMETERS                                                                                   \
  const S::Bits *__restrict__ grad_spike, const float *__restrict__ grad_v,                                   \
      const float *__restrict__ grad_v_seq, const unsigned char *__restrict__ mask,                           \
      X::Bits *__restrict__ grad_x, float *__restrict__ grad_v0, int T, i64 N, float beta, float v_th,        \
      float alpha, int detach_reset, int aligned

#include "wide.cuh"
#include "tall.cuh"
#include "compensated.cuh"
