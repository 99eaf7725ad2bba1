// A projection of an event-driven model with what stands before and behind it; reference.py says the same in torch.
//
//   before:  NORMED 1: u = x * rms * weight, the root mean square of each of GROUPS parts of a row from sums of squares
//            that the kernel before left in `parts` pieces. 0: u = SiLU(x[:K]) * x[K:], an MLP's gate.
//            FLOATS 0: spikes, sign(u) min(most, ceil(|u| - 1/2)). 1: u rounded to int8, a factor for every 32
//   behind:  y = sum * factor + bias. AFTER PLAIN: stored. CONVOLVE: columns [from, to) also pass the causal
//            convolution of TAPS taps, whose last inputs move on in place, and SiLU. RESIDUAL: added to y, the residual
//            stream, and the squares of what it is then are summed up, a piece for every block
//
// The other options are those of neurons/cupy/event_linear/gather.cuh; all sums have an order of their own, so that a
// token comes out the same every time.
#include "arithmetic.cuh"
#include "threads.cuh"
#include "event_linear/gather.cuh"

#define PLAIN 0
#define CONVOLVE 1
#define RESIDUAL 2

#define PROJECT_PARAMETERS                                                                                \
  const float *x, const float *weight, const float *squares, const u1 *W, const u1 *scale,                \
      const float *factor, const float *bias, float *y, float *squares_out, float *conv_state,            \
      const float *conv_weight, const float *conv_bias, i1 *kept_inputs, Sum *kept_sums, i64 N, i64 row,  \
      int inputs, int rows, int parts, int from, int to, float eps, float most

DEV float silu(float x) { return div(x, add(1.0f, expf(-x))); }

// 1 / sqrt(mean of squares + eps) of a part of row b, by a whole warp or, of several parts, by every lane for itself.
DEV float inverse_rms(const float* squares, int b, int group, int parts, int size, float eps, int lane) {
  const float* own = squares + ((i64)b * GROUPS + group) * parts;
  float sum = 0.0f;
  if (GROUPS == 1) {
    for (int i = lane; i < parts; i += 32) sum = add(sum, own[i]);
    sum = warp_sum(sum);
  } else {
    for (int i = 0; i < parts; ++i) sum = add(sum, own[i]);
  }
  return div(1.0f, root(add(div(sum, (float)size), eps)));
}

DEV int spike(float u, float most) {
  const float count = fmaxf(fminf(ceilf(sub(fabsf(u), 0.5f)), most), 0.0f);
  return (int)(u > 0.0f ? count : -count);
}

// The last inputs of a channel's convolution move on by y; SiLU of what comes out.
DEV float convolved(float y, float* state, const float* weight, const float* bias) {
  float sum = 0.0f;
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) {
    const float input = tap + 1 < TAPS ? state[tap + 1] : y;
    state[tap] = input;
    sum = add(sum, mul(input, weight[tap]));
  }
  return silu(bias ? add(sum, *bias) : sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER_DIMS project(PROJECT_PARAMETERS) {
  SHARED(Shared, shared);
  const Matrix m = {W, scale, N, row, inputs};
  const Thread t = thread_of(m);
  let_next_begin();
  wait_for_previous();
  float rms[BATCH] = {};
  if (NORMED && GROUPS == 1)
    for (int b = 0; b < BATCH && b < rows; ++b) rms[b] = inverse_rms(squares, b, 0, parts, inputs, eps, t.lane);
  Sum sum[BATCH][COLUMNS] = {};
  for (int k0 = (t.rank * WARPS + t.warp) * 32; k0 < inputs; k0 += CLUSTER * WARPS * 32) {
    const int k = k0 + t.lane;
    int value[BATCH];
    float run_factor[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      float u = 0.0f;
      if (b < rows && k < inputs) {
#if NORMED
        const int size = inputs / GROUPS;
        const float own = GROUPS == 1 ? rms[b] : inverse_rms(squares, b, k / size, parts, size, eps, t.lane);
        u = mul(mul(x[(i64)b * inputs + k], own), weight[k]);
#else
        u = mul(silu(x[(i64)b * 2 * inputs + k]), x[((i64)b * 2 + 1) * inputs + k]);
#endif
      }
#if FLOATS
      run_factor[b] = div(warp_max(fabsf(u)), 127.0f);
      value[b] = (int)rintf(div(u, run_factor[b] > 0.0f ? run_factor[b] : 1.0f));
#else
      run_factor[b] = 1.0f;
      value[b] = spike(u, most);
#endif
      if (kept_inputs && blockIdx.x == 0 && b < rows && k < inputs) kept_inputs[(i64)b * inputs + k] = (i1)value[b];
    }
    gather_run(sum, shared, m, t, k0, value, run_factor);
  }
  keep_sums(shared, t, sum);
  add_up(shared);
  float* own_squares = reinterpret_cast<float*>(&shared.part[0][0][0][0]);  // which nobody needs any more
  for (int i = threadIdx.x; i < BATCH * OWN; i += THREADS) {
    const int b = i / OWN, column = t.rank * OWN + i % OWN;
    const i64 n = (i64)blockIdx.x * SLAB + column;
    const Sum total = read_total(shared, b, column);
    float one = 0.0f;
    if (n < N && b < rows) {
      if (kept_sums) kept_sums[b * N + n] = total;
      one = mul((float)total, factor[n]);
      if (bias) one = add(one, bias[n]);
#if AFTER == CONVOLVE
      if (n >= from && n < to) {
        const i64 c = n - from;
        one = convolved(one, conv_state + (b * (i64)(to - from) + c) * TAPS, conv_weight + c * TAPS,
                        conv_bias ? conv_bias + c : nullptr);
      }
#elif AFTER == RESIDUAL
      one = add(y[b * N + n], one);
#endif
      y[b * N + n] = one;
    }
#if AFTER == RESIDUAL
    own_squares[i] = mul(one, one);
#endif
  }
  cluster_arrive();                                               // others may still read this block's sums
#if AFTER == RESIDUAL
  block_sync();
  for (int b = t.warp; b < rows; b += WARPS) {
    float all = 0.0f;
    for (int i = t.lane; i < OWN; i += 32) all = add(all, own_squares[b * OWN + i]);
    all = warp_sum(all);
    const i64 piece = (i64)blockIdx.x * CLUSTER + t.rank;
    if (t.lane == 0) squares_out[b * (i64)gridDim.x * CLUSTER + piece] = all;
  }
#endif
  cluster_wait();
}
