// What stands between the projections of an event-driven model; reference.py says the same in torch.
//
// scan_token: the step of the selective scan and the gate,
//   S = exp(dt A) S + dt x B^T,  y = (S C + D x) SiLU(gate)        (Dao & Gu, arXiv 2405.21060)
// with sums of y's squares, a piece for every block, for the norm that follows. A block has PART channels of one head,
// a warp ROWS of them; a lane holds VEC neighbouring states at a time.
//   STATE F32 or BF16; HEAD_DIM, STATE_SIZE; PART; WARPS
//
// embed_token: the residual stream's first value, and the sum of its squares.
#include "arithmetic.cuh"
#define CLUSTER 1
#include "threads.cuh"

#define ROWS (PART / WARPS)
#define SPLITS (HEAD_DIM / PART)
#define VEC (STATE_SIZE % 4 == 0 && STATE_SIZE >= 128 ? 4 : STATE_SIZE % 2 == 0 && STATE_SIZE >= 64 ? 2 : 1)
#define STEPS ((STATE_SIZE + 32 * VEC - 1) / (32 * VEC))
#define EMBED_WARPS 8

#define SCAN_PARAMETERS                                                                             \
  const float *projected, const float *dt_bias, const float *A_log, const float *D, void *states,   \
      float *y, float *squares, i64 width, int heads, int groups, float low, float high
#define EMBED_PARAMETERS const i64 *tokens, const float *table, float *x, float *squares, i64 size

DEV float silu(float x) { return div(x, add(1.0f, expf(-x))); }
DEV float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

struct alignas(VEC * sizeof(STATE::Bits)) States {
  STATE::Bits bits[VEC];
};

struct Pieces {
  float of_warp[EMBED_WARPS];
};

// The sum over a block of a value that is the same in all lanes of a warp; for its first thread.
DEV float block_sum(Pieces& pieces, float of_warp, int warps) {
  if (threadIdx.x % 32 == 0) pieces.of_warp[threadIdx.x / 32] = of_warp;
  block_sync();
  float sum = 0.0f;
  if (threadIdx.x == 0)
    for (int w = 0; w < warps; ++w) sum = add(sum, pieces.of_warp[w]);
  return sum;
}

// The sums of ROWS values over a warp, the i-th in lane i. Of a power of two lanes halve what they have step by step.
DEV float warp_sums(float (&x)[ROWS], int lane) {
#if ROWS & (ROWS - 1)
  float own = 0.0f;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const float sum = warp_sum(x[i]);
    if (lane == i) own = sum;
  }
  return own;
#else
#pragma unroll
  for (int half = ROWS / 2; half; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = lane & half;
      const float other = from_lane(upper ? x[i] : x[i + half], half);
      x[i] = add(upper ? x[i + half] : x[i], other);
    }
#pragma unroll
  for (int other = ROWS; other < 32; other *= 2) x[0] = add(x[0], from_lane(x[0], other));
  return x[0];
#endif
}

// The states of a warp's channels.
struct Own {
  States of[STEPS][ROWS];
};

DEV int state_number(int step, int lane) { return (step * 32 + lane) * VEC; }

DEV void load_states(Own& own, const STATE::Bits* state, int lane) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int n = state_number(step, lane);
      if (n < STATE_SIZE) own.of[step][i] = load_once(reinterpret_cast<const States*>(state + (i64)i * STATE_SIZE + n));
    }
}

// What of B and C belongs to a lane's states.
struct Weights {
  float B[STEPS][VEC], C[STEPS][VEC];
};

DEV void load_weights(Weights& to, const float* B, const float* C, int lane) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int n = state_number(step, lane);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      to.B[step][v] = n < STATE_SIZE ? B[n + v] : 0.0f;
      to.C[step][v] = n < STATE_SIZE ? C[n + v] : 0.0f;
    }
  }
}

// Moves them on; what a lane's parts of them add to the outputs.
DEV void move_on(float (&out)[ROWS], const float (&input)[ROWS], const Weights& weights, float decay, Own& own,
                 STATE::Bits* state, int lane) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int n = state_number(step, lane);
    if (n < STATE_SIZE) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const float b = weights.B[step][v], c = weights.C[step][v];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          STATE::Bits& bits = own.of[step][i].bits[v];
          const float moved = add(mul(STATE::decode(bits), decay), mul(input[i], b));
          bits = STATE::encode(moved);
          out[i] = fmaf(moved, c, out[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        *reinterpret_cast<States*>(state + (i64)i * STATE_SIZE + n) = own.of[step][i];
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) scan_token(SCAN_PARAMETERS) {
  SHARED(Pieces, pieces);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head = blockIdx.x / SPLITS, row = blockIdx.y;
  const int channel = head * HEAD_DIM + blockIdx.x % SPLITS * PART + warp * ROWS;  // a warp's first
  const i64 inner = (i64)heads * HEAD_DIM;
  STATE::Bits* state = reinterpret_cast<STATE::Bits*>(states) + (row * inner + channel) * STATE_SIZE;
  let_next_begin();
  Own own;                                                        // of the token before, behind embed_token
  load_states(own, state, lane);
  const float rate = -expf(A_log[head]), shift = dt_bias[head], skip = D[head];
  wait_for_previous();
  const float* gate = projected + row * width;
  const float* xs = gate + inner;
  const float* B = xs + inner + (i64)(head * groups / heads) * STATE_SIZE;
  const float* C = B + (i64)groups * STATE_SIZE;
  Weights weights;
  load_weights(weights, B, C, lane);                              // all at once, as what follows
  const float opening = lane < ROWS ? gate[channel + lane] : 0.0f, x = lane < ROWS ? xs[channel + lane] : 0.0f;
  const float dt = fminf(fmaxf(softplus(add(gate[width - heads + head], shift)), low), high);
  const float decay = expf(mul(dt, rate));
  float input[ROWS], out[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    input[i] = mul(dt, xs[channel + i]);
    out[i] = 0.0f;
  }
  move_on(out, input, weights, decay, own, state, lane);
  float y_own = warp_sums(out, lane);
  y_own = lane < ROWS ? mul(add(y_own, mul(skip, x)), silu(opening)) : 0.0f;
  if (lane < ROWS) y[row * inner + channel + lane] = y_own;
  const float all = block_sum(pieces, warp_sum(mul(y_own, y_own)), WARPS);
  if (threadIdx.x == 0) squares[row * (i64)gridDim.x + blockIdx.x] = all;
}

extern "C" __global__ void __launch_bounds__(32 * EMBED_WARPS) embed_token(EMBED_PARAMETERS) {
  SHARED(Pieces, pieces);
  const i64 row = blockIdx.x;
  let_next_begin();
  wait_for_previous();
  const float* from = table + tokens[row] * size;
  float sum = 0.0f;
  for (i64 i = threadIdx.x; i < size; i += 32 * EMBED_WARPS) {
    x[row * size + i] = from[i];
    sum = add(sum, mul(from[i], from[i]));
  }
  sum = block_sum(pieces, warp_sum(sum), EMBED_WARPS);
  if (threadIdx.x == 0) squares[row] = sum;
}
