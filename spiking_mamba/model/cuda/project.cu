// A projection of an event-driven model with what stands before and behind it; reference.py says the same in torch.
//
//   before:  NORMED 1: u = x * rms * weight, the root mean square of each of GROUPS parts of a row from sums of squares
//            that the kernel before left in `parts` pieces. 0: u = SiLU(x[:K]) * x[K:], an MLP's gate.
//            SHIFTED 1: u - shift is what the neuron gets
//            FLOATS 0: spikes, sign(u) min(most, ceil(|u| - 1/2)), 0 where |u| <= silent. 1: u rounded to int8, a
//            factor for every 32
//   behind:  y = sum * factor + bias. AFTER PLAIN: stored. CONVOLVE: columns [from, upto) also pass the causal
//            convolution of TAPS taps, whose last inputs move on in place, and SiLU. RESIDUAL: added to y, the residual
//            stream, and the squares of what it is then are summed up, in pieces of some columns
//
// The other options are those of neurons/cupy/event_linear/gather.cuh; all sums have an order of their own, so that a
// token comes out the same every time.
#include "arithmetic.cuh"
#include "threads.cuh"
#include "event_linear/gather.cuh"

#define PLAIN 0
#define CONVOLVE 1
#define RESIDUAL 2

#define PIECE (OWN < 32 ? OWN : 32)                               // columns whose squares are summed up together
#define PIECES (SLAB / PIECE)                                     // of them in a cluster

#define PROJECT_PARAMETERS                                                                                \
  const float *x, const float *weight, const float *shift, const float *squares, const u1 *W,             \
      const u1 *scale,                                                                                    \
      const float *factor, const float *bias, float *y, float *squares_out, float *conv_state,            \
      const float *conv_weight, const float *conv_bias, i1 *kept_inputs, Sum *kept_sums, i64 N, i64 row,  \
      int inputs, int rows, int parts, int from, int upto, float eps, float most, float silent

DEV float silu(float x) { return div(x, add(1.0f, expf(-x))); }

// 1 / sqrt(mean of squares + eps) of a part of row b, by a whole warp.
DEV float inverse_rms(const float* squares, int b, int group, int parts, int size, float eps, int lane) {
  const float* own = squares + ((i64)b * GROUPS + group) * parts;
  float sum = 0.0f;
#pragma unroll 4
  for (int i = lane; i < parts; i += 32) sum = add(sum, own[i]);
  return div(1.0f, root(add(div(warp_sum(sum), (float)size), eps)));
}

struct Norms {                                                    // of all parts of a row
  float inverse[BATCH][GROUPS];
};

// By one warp of the block each, where a run of inputs may lie in several parts.
DEV void find_norms(Norms& norms, const float* squares, const Thread& t, int rows, int parts, int size, float eps) {
#pragma unroll 1
  for (int i = t.warp; i < rows * GROUPS; i += WARPS) {
    const float found = inverse_rms(squares, i / GROUPS, i % GROUPS, parts, size, eps, t.lane);
    if (t.lane == 0) norms.inverse[i / GROUPS][i % GROUPS] = found;
  }
  block_sync();
}

DEV int spike(float u, float most, float silent) {
  const float count = fabsf(u) > silent ? fminf(ceilf(sub(fabsf(u), 0.5f)), most) : 0.0f;
  return (int)(u > 0.0f ? count : -count);
}

// What a warp's lane has of a run, before the neuron: x and, behind a norm, its weight; of an MLP, gate and upper half;
// and its level.
struct Raw {
  float x[BATCH];
  float other[NORMED ? 1 : BATCH];
#if SHIFTED
  float shift;
#endif
};

DEV void load_constants(Raw& raw, const float* weight, const float* shift, int k, int inputs) {
#if NORMED
  raw.other[0] = k < inputs ? weight[k] : 0.0f;
#endif
#if SHIFTED
  raw.shift = k < inputs ? shift[k] : 0.0f;
#endif
}

DEV void load_inputs(Raw& raw, const float* x, int k, int inputs, int rows) {
#pragma unroll
  for (int b = 0; b < BATCH; ++b) {
    const bool exists = b < rows && k < inputs;
#if NORMED
    raw.x[b] = exists ? x[(i64)b * inputs + k] : 0.0f;
#else
    raw.x[b] = exists ? x[(i64)b * 2 * inputs + k] : 0.0f;
    raw.other[b] = exists ? x[((i64)b * 2 + 1) * inputs + k] : 0.0f;
#endif
  }
}

// What stands behind the product, and of one of its columns what has been loaded.
struct Behind {
  const float *factor, *bias;
  float *y, *conv_state;
  const float *conv_weight, *conv_bias;
  i64 N, first;                                                   // columns of the matrix, and the block's first
  int rows, from, upto;
};

struct Column {
  bool exists;
  float factor, bias, residual;
#if AFTER == CONVOLVE
  float last[TAPS], weight[TAPS], conv_bias;
#endif
};

// A block's i-th of BATCH * OWN: its row of spikes and its column.
DEV int row_of(int i) { return i / OWN; }
DEV i64 column_of(const Behind& to, int i) { return to.first + i % OWN; }
DEV bool convolves(const Behind& to, i64 n) { return AFTER == CONVOLVE && n >= to.from && n < to.upto; }
DEV float* state_of(const Behind& to, int b, i64 n) {
  return to.conv_state + (b * (i64)(to.upto - to.from) + n - to.from) * TAPS;
}

DEV Column load_column(const Behind& to, int i) {
  Column own = {};
  const int b = row_of(i);
  const i64 n = column_of(to, i);
  own.exists = i < BATCH * OWN && n < to.N && b < to.rows;
  if (!own.exists) return own;
  own.factor = to.factor[n];
  own.bias = to.bias ? to.bias[n] : 0.0f;
#if AFTER == RESIDUAL
  own.residual = to.y[b * to.N + n];
#elif AFTER == CONVOLVE
  if (convolves(to, n)) {
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
      own.last[tap] = state_of(to, b, n)[tap];
      own.weight[tap] = to.conv_weight[(n - to.from) * TAPS + tap];
    }
    own.conv_bias = to.conv_bias ? to.conv_bias[n - to.from] : 0.0f;
  }
#endif
  return own;
}

#if AFTER == CONVOLVE
// The last inputs of a channel's convolution move on by y; SiLU of what comes out.
DEV float convolved(const Column& own, float y, float* state, bool biased) {
  float sum = 0.0f;
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) {
    const float input = tap + 1 < TAPS ? own.last[tap + 1] : y;
    state[tap] = input;
    sum = add(sum, mul(input, own.weight[tap]));
  }
  return silu(biased ? add(sum, own.conv_bias) : sum);
}
#endif

// What comes of a column's sum; stored, and returned.
DEV float finish(const Behind& to, int i, const Column& own, Sum total) {
  const int b = row_of(i);
  const i64 n = column_of(to, i);
  float one = mul((float)total, own.factor);
  if (to.bias) one = add(one, own.bias);
#if AFTER == CONVOLVE
  if (convolves(to, n)) one = convolved(own, one, state_of(to, b, n), to.conv_bias != nullptr);
#elif AFTER == RESIDUAL
  one = add(own.residual, one);
#endif
  to.y[b * to.N + n] = one;
  return one;
}

// No least number of blocks is named: with one, the compiler gives out_proj so many registers that none fits beside it.
extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER_DIMS project(PROJECT_PARAMETERS) {
  SHARED(Shared, shared);
#if NORMED && GROUPS > 1
  SHARED(Norms, norms);
#endif
  const Matrix m = {W, scale, N, row, inputs};
  const Thread t = thread_of(m);
  const i64 own_first = (i64)blockIdx.x * SLAB + t.rank * OWN;
  const Behind to = {factor, bias, y, conv_state, conv_weight, conv_bias, N, own_first, rows, from, upto};
  const int first = first_run(t);
  // no launch writes it
  Raw raw = {};
  load_constants(raw, weight, shift, first + t.lane, inputs);
  begin_sums(shared);
  wait_for_previous();
  load_inputs(raw, x, first + t.lane, inputs, rows);
#if NORMED && GROUPS > 1
  find_norms(norms, squares, t, rows, parts, inputs / GROUPS, eps);
#elif NORMED
  float inverse[BATCH] = {};
  for (int b = 0; b < BATCH && b < rows; ++b) inverse[b] = inverse_rms(squares, b, 0, parts, inputs, eps, t.lane);
#endif
  Sum sum[BATCH][COLUMNS] = {};
#pragma unroll 1
  for (int k0 = first; k0 < inputs; k0 += RUN_STEP) {
    const int k = k0 + t.lane;
    if (k0 > first) {
      load_constants(raw, weight, shift, k, inputs);
      load_inputs(raw, x, k, inputs, rows);
    }
    int value[BATCH];
    float run_factor[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      float u = 0.0f;
      if (b < rows && k < inputs) {
#if NORMED
#if GROUPS > 1
        const float own_inverse = norms.inverse[b][k / (inputs / GROUPS)];
#else
        const float own_inverse = inverse[b];
#endif
        u = mul(mul(raw.x[b], own_inverse), raw.other[0]);
#else
        u = mul(silu(raw.x[b]), raw.other[b]);
#endif
#if SHIFTED
        u = sub(u, raw.shift);
#endif
      }
#if FLOATS
      run_factor[b] = div(warp_max(fabsf(u)), 127.0f);
      value[b] = (int)rintf(div(u, run_factor[b] > 0.0f ? run_factor[b] : 1.0f));
#else
      run_factor[b] = 1.0f;
      value[b] = spike(u, most, silent);
#endif
      if (kept_inputs && blockIdx.x == 0 && b < rows && k < inputs) kept_inputs[(i64)b * inputs + k] = (i1)value[b];
    }
    gather_run(sum, shared, m, t, k0, value, run_factor);
  }
  let_next_begin();                                               // not before: its threads would be in the way
  keep_sums(shared, t, sum);
  Column own = load_column(to, threadIdx.x);                      // on its way while the sums are added up
  add_up(shared, t);
#pragma unroll 1
  for (int i = threadIdx.x; i < (BATCH * OWN + 31) / 32 * 32; i += THREADS) {  // whole warps
    if (i >= THREADS) own = load_column(to, i);
    float one = 0.0f;
    if (own.exists) {
      const Sum total = read_total(shared, row_of(i), i % OWN);
      if (kept_sums) kept_sums[row_of(i) * N + column_of(to, i)] = total;
      one = finish(to, i, own, total);
    }
#if AFTER == RESIDUAL
    float square = mul(one, one);
#pragma unroll
    for (int other = 1; other < PIECE; other *= 2) square = add(square, from_lane(square, other));
    if (i < rows * OWN && i % PIECE == 0)
      squares_out[row_of(i) * (i64)gridDim.x * PIECES + (i64)blockIdx.x * PIECES + (t.rank * OWN + i % OWN) / PIECE] =
          square;
#endif
  }
}
