// y[b, n] += sum over inputs k that fire of s[b, k] * W[k, n]   (neurons/functional.py: event_driven_linear)
//
// Compiled by NVRTC with the options that ops.py composes:
//   BITS     8: W is int8 [K, N]. 4: two columns a byte, plus 8, [K, ceil(N / 2)], and a scale, uint8
//            [ceil(K / 32), N], for every 32 rows of a column
//   BATCH    rows of spikes; a row of weights is fetched if an input fires in any of them
//   VEC      bytes of a row of weights that a thread owns, 1, 4, 8 or 16; it divides the row
//   WARPS    of a block, which lie over the inputs and are added up at its end
//   CHUNKS   runs of inputs that a warp takes one after the other, 16 or, for 4 bits, 32 of them each
//
// s is int8 [BATCH, padded], zeros behind K; `padded` is a multiple of 32. y is int32 [BATCH, N], zeros before.
// All loads of a run are under way at once, which is what the time of a few rows depends on: the spikes are the
// same for a whole warp, so that an input that is silent costs a predicate and no load.

#ifdef __CUDACC__
#define DEV __device__ __forceinline__
typedef signed char i1;
DEV int dot4(unsigned a, unsigned b, int sum) { return __dp4a((int)a, (int)b, sum); }
DEV unsigned permute(unsigned a, unsigned b, unsigned how) { return __byte_perm(a, b, how); }
DEV void add_to(int* to, int value) { atomicAdd(to, value); }
#endif
typedef long long i64;
typedef unsigned char u1;

#define WORDS (VEC < 4 ? 1 : VEC / 4)
#define COLUMNS (BITS == 8 ? VEC : 2 * VEC)                       // that a thread owns
#define RUN (BITS == 8 ? 16 : 32)                                 // inputs; for 4 bits those that share scales

struct alignas(VEC) Piece {                                       // of a row of weights
#if VEC >= 4
  unsigned word[WORDS];
#else
  u1 word[1];
#endif
};

struct Shared {
  int sum[WARPS][BATCH][COLUMNS][32];
};

struct Call {
  const i1* s;
  const u1* W;
  const u1* scale;
  int* y;
  i64 N, row;                                                     // columns, bytes of a row of W
  int padded;
};

struct Thread {
  int lane, warp;
  i64 byte;                                                       // its first one in a row
  int first;                                                      // input of its warp
  bool owns;
};

DEV void fetch(unsigned (&to)[WORDS], const u1* from, bool fires) {
  Piece piece = {};
  if (fires) piece = *reinterpret_cast<const Piece*>(from);
#pragma unroll
  for (int w = 0; w < WORDS; ++w) to[w] = piece.word[w];
}

// The bytes of four rows, column by column: a byte of each row in every word.
DEV void columns_of(unsigned (&to)[4], unsigned a, unsigned b, unsigned c, unsigned d) {
  const unsigned ab = permute(a, b, 0x5140), cd = permute(c, d, 0x5140);
  const unsigned ef = permute(a, b, 0x7362), gh = permute(c, d, 0x7362);
  to[0] = permute(ab, cd, 0x5410);
  to[1] = permute(ab, cd, 0x7632);
  to[2] = permute(ef, gh, 0x5410);
  to[3] = permute(ef, gh, 0x7632);
}

// What four rows of fetched words add to a thread's columns, 4 * WORDS of them or, of 4 bits, 8 * WORDS.
DEV void add_rows(int (&sum)[BATCH][COLUMNS], const unsigned (&q)[4][WORDS], const unsigned (&spikes)[BATCH]) {
#pragma unroll
  for (int w = 0; w < WORDS; ++w)
#pragma unroll
    for (int half = 0; half < 8 / BITS; ++half) {
      unsigned column[4], part[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) part[r] = BITS == 8 ? q[r][w] : q[r][w] >> 4 * half & 0x0f0f0f0fu;
      columns_of(column, part[0], part[1], part[2], part[3]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int own = BITS == 8 ? 4 * w + c : 2 * (4 * w + c) + half;
        if (own < COLUMNS) {
#pragma unroll
          for (int b = 0; b < BATCH; ++b) sum[b][own] = dot4(column[c], spikes[b], sum[b][own]);
        }
      }
    }
}

DEV void run_of_inputs(int (&sum)[BATCH][COLUMNS], const Call& call, const Thread& t, int k0) {
  unsigned spikes[RUN / 4][BATCH], any[RUN / 4];
#pragma unroll
  for (int g = 0; g < RUN / 4; ++g) {
    any[g] = 0;
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      spikes[g][b] = *reinterpret_cast<const unsigned*>(call.s + (i64)b * call.padded + k0 + 4 * g);
      any[g] |= spikes[g][b];
    }
  }
  const u1* from = call.W + (i64)k0 * call.row + t.byte;
  int own[BATCH][COLUMNS];
#pragma unroll
  for (int b = 0; b < BATCH; ++b)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) own[b][c] = 0;
#pragma unroll
  for (int part = 0; part < RUN / 16; ++part) {                   // 16 loads under way
    unsigned q[4][4][WORDS];
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int g = 4 * part + k / 4;
      fetch(q[k / 4][k % 4], from + (i64)(16 * part + k) * call.row, t.owns && (any[g] >> 8 * (k % 4) & 255u));
    }
#pragma unroll
    for (int g = 0; g < 4; ++g) add_rows(own, q[g], spikes[4 * part + g]);
  }
#pragma unroll
  for (int b = 0; b < BATCH; ++b) {
    int all = 0;
    if (BITS == 4)
#pragma unroll
      for (int g = 0; g < RUN / 4; ++g) all = dot4(0x01010101u, spikes[g][b], all);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      if (BITS == 8) {
        sum[b][c] += own[b][c];
      } else {
        const i64 n = 2 * t.byte + c;
        const int scale = t.owns && n < call.N ? call.scale[(i64)(k0 / 32) * call.N + n] : 0;
        sum[b][c] += scale * (own[b][c] - 8 * all);
      }
    }
  }
}

DEV void gather(Shared& shared, const Call& call, const Thread& t) {
  int sum[BATCH][COLUMNS];
#pragma unroll
  for (int b = 0; b < BATCH; ++b)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sum[b][c] = 0;
  for (int run = 0; run < CHUNKS; ++run) {
    const int k0 = t.first + run * RUN;
    if (k0 < call.padded) run_of_inputs(sum, call, t, k0);
  }
#pragma unroll
  for (int b = 0; b < BATCH; ++b)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) shared.sum[t.warp][b][c][t.lane] = sum[b][c];
}

DEV void add_up(const Shared& shared, const Call& call, i64 first_byte, int thread) {
  for (int i = thread; i < BATCH * COLUMNS * 32; i += WARPS * 32) {
    const int lane = i % 32, c = i / 32 % COLUMNS, b = i / (32 * COLUMNS);
    int sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += shared.sum[w][b][c][lane];
    const i64 n = (first_byte + lane * VEC) * (8 / BITS) + c;
    if (n < call.N && sum) add_to(call.y + b * call.N + n, sum);
  }
}

DEV Thread thread_of(const Call& call, unsigned block_x, unsigned block_y, unsigned thread) {
  Thread t;
  t.lane = thread % 32;
  t.warp = thread / 32;
  t.byte = ((i64)block_x * 32 + t.lane) * VEC;
  t.first = (block_y * WARPS + t.warp) * CHUNKS * RUN;
  t.owns = t.byte < call.row;
  return t;
}

#define EVENT_LINEAR_PARAMETERS const i1 *s, const u1 *W, const u1 *scale, int *y, i64 N, i64 row, int padded

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(WARPS * 32) event_linear(EVENT_LINEAR_PARAMETERS) {
  __shared__ Shared shared;
  const Call call = {s, W, scale, y, N, row, padded};
  gather(shared, call, thread_of(call, blockIdx.x, blockIdx.y, threadIdx.x));
  __syncthreads();
  add_up(shared, call, (i64)blockIdx.x * 32 * VEC, threadIdx.x);
}
#endif
