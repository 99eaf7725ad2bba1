// sum over inputs k that fire of s[b, k] * W[k, n], by clusters of blocks that share some columns and divide the inputs.
//
//   BITS     8: W is int8 [K, N]. 4: two columns a byte, plus 8, [K, ceil(N / 2)], and a scale, uint8
//            [ceil(K / 32), N], for every 32 rows of a column
//   BATCH    rows of spikes; a row of weights is fetched if an input fires in any of them
//   VEC      bytes of a row of weights that a lane owns, 1, 4, 8 or 16; it divides `row`
//   LANES    lanes that read a row together, 8, 16 or 32; a warp reads 32 / LANES rows at a time
//   WARPS    of a block
//   CLUSTER  blocks of a cluster, one beside another along the grid's second axis
//   FLOATS   1: what every 32 inputs add has a factor of its own, and sums are float32
//
// A warp takes runs of 32 inputs, one a lane, and moves those that fire to the front; all rows that these ask for are
// under way at once, and a silent input costs nothing. No atomics: a warp's sums go to shared memory, a block's to that
// block of the cluster which finishes their columns and waits for them.

typedef unsigned char u1;

#define WORDS (VEC < 4 ? 1 : VEC / 4)
#define COLUMNS (BITS == 8 ? VEC : 2 * VEC)                       // that a lane owns
#define SLAB (LANES * COLUMNS)                                    // columns of a cluster
#define SUBS (32 / LANES)                                         // parts of a warp, a row each
#define FIRST_FLIGHT (8 / SUBS)                                   // groups of four rows that each of them has
#define FLIGHT_LIMIT (BATCH * COLUMNS > 32 ? 2 : 4)               // by the registers that there are
#define FLIGHT (FIRST_FLIGHT < FLIGHT_LIMIT ? FIRST_FLIGHT : FLIGHT_LIMIT)
#define OWN (SLAB / CLUSTER)                                      // columns that a block finishes
#define THREADS (32 * WARPS)
#define RUN_STEP (32 * CLUSTER * WARPS)                           // inputs from one run of a warp to its next

#if FLOATS
typedef float Sum;
#else
typedef int Sum;
#endif

struct alignas(VEC) Piece {                                       // of a row of weights
#if VEC >= 4
  unsigned word[WORDS];
#else
  u1 word[1];
#endif
};

struct Shared {
  unsigned spike[WARPS][BATCH][8];                                // of a run, four a word, those that fire first
  unsigned row[WARPS][8];                                         // and where in the run they are
  Sum part[WARPS][BATCH][COLUMNS][LANES];
  Sum total[CLUSTER][BATCH][OWN];                                 // of the columns that this block finishes, block by block
  Arrivals arrivals;                                              // of totals
};

struct Matrix {
  const u1* W;
  const u1* scale;                                                // of 4-bit weights
  i64 N, row;                                                     // columns, bytes from one row to the next
  int inputs;
};

struct Thread {
  int lane, warp, rank, sub, place;
  i64 byte;                                                       // its first one in a row
  bool owns;
};

DEV int first_run(const Thread& t) { return (t.rank * WARPS + t.warp) * 32; }

DEV Thread thread_of(const Matrix& m) {
  Thread t;
  t.lane = threadIdx.x % 32;
  t.warp = threadIdx.x / 32;
  t.rank = blockIdx.y;
  t.sub = t.lane / LANES;
  t.place = t.lane % LANES;
  t.byte = ((i64)blockIdx.x * LANES + t.place) * VEC;
  t.owns = t.byte * 8 / BITS < m.N;
  return t;
}

DEV void fetch(unsigned (&to)[WORDS], const u1* from, bool fires) {
  Piece piece = {};
  if (fires) piece = load_once(reinterpret_cast<const Piece*>(from));
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

// What four rows of fetched words add to a lane's columns, 4 * WORDS of them or, of 4 bits, 8 * WORDS.
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

// The rows of a run whose inputs stand at the front of `shared`, `count` of them.
DEV void rows_of_run(int (&sum)[BATCH][COLUMNS], int (&all)[BATCH], const Shared& shared, const Matrix& m,
                     const Thread& t, int k0, int count) {
  const u1* from = m.W + (i64)k0 * m.row + t.byte;
#pragma unroll
  for (int first = 0; first < FIRST_FLIGHT; first += FLIGHT) {
    if (4 * SUBS * first >= count) break;                         // so for the whole warp
    unsigned q[FLIGHT][4][WORDS];
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int group = t.sub + SUBS * (first + i);
      const unsigned rows = shared.row[t.warp][group];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        fetch(q[i][r], from + (i64)(rows >> 8 * r & 255u) * m.row, t.owns && 4 * group + r < count);
    }
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      unsigned spikes[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        spikes[b] = shared.spike[t.warp][b][t.sub + SUBS * (first + i)];
        if (BITS == 4) all[b] = dot4(0x01010101u, spikes[b], all[b]);
      }
      add_rows(sum, q[i], spikes);
    }
  }
}

// One run: every lane brings what its input k0 + lane is, and the run's factors.
DEV void gather_run(Sum (&sum)[BATCH][COLUMNS], Shared& shared, const Matrix& m, const Thread& t, int k0,
                    const int (&value)[BATCH], const float (&factor)[BATCH]) {
  bool fires = false;
#pragma unroll
  for (int b = 0; b < BATCH; ++b) fires |= value[b] != 0;
  const unsigned mask = ballot(fires);
  const int count = ones(mask), before = ones(mask & ((1u << t.lane) - 1));
  const int at = fires ? before : count + t.lane - before;        // those that are silent bring zeros
  warp_sync();                                                    // the run before has been read
  reinterpret_cast<u1*>(shared.row[t.warp])[at] = (u1)t.lane;
#pragma unroll
  for (int b = 0; b < BATCH; ++b) reinterpret_cast<i1*>(shared.spike[t.warp][b])[at] = (i1)value[b];
  warp_sync();
#if BITS == 8 && !FLOATS
  int all[BATCH];
  rows_of_run(sum, all, shared, m, t, k0, count);
#else
  int own[BATCH][COLUMNS], all[BATCH];
#pragma unroll
  for (int b = 0; b < BATCH; ++b) {
    all[b] = 0;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) own[b][c] = 0;
  }
  rows_of_run(own, all, shared, m, t, k0, count);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    int scale = 1;
    if (BITS == 4) {
      const i64 n = 2 * t.byte + c;
      scale = n < m.N ? m.scale[(i64)(k0 / 32) * m.N + n] : 0;
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int one = BITS == 4 ? scale * (own[b][c] - 8 * all[b]) : own[b][c];
#if FLOATS
      sum[b][c] = add(sum[b][c], mul(factor[b], (float)one));
#else
      sum[b][c] += one;
#endif
    }
  }
#endif
}

// A block's first step: others may send it their sums from now on.
DEV void begin_sums(Shared& shared) {
  if (threadIdx.x == 0) expect_arrivals(shared.arrivals, sizeof(shared.total));
  cluster_arrive();
}

// A lane's sums to the block's; a barrier of the block has to follow.
DEV void keep_sums(Shared& shared, const Thread& t, Sum (&sum)[BATCH][COLUMNS]) {
#pragma unroll
  for (int b = 0; b < BATCH; ++b)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
      for (int other = LANES; other < 32; other *= 2) sum[b][c] += from_lane(sum[b][c], other);
      if (t.sub == 0) shared.part[t.warp][b][c][t.place] = sum[b][c];
    }
}

// All warps' sums of a block, to the blocks that finish their columns; then read_total() gives the block's own, whole.
DEV void add_up(Shared& shared, const Thread& t) {
  block_sync();
  cluster_wait();                                                 // all blocks have begun
#pragma unroll 1
  for (int i = threadIdx.x; i < BATCH * SLAB; i += THREADS) {
    Sum sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += (&shared.part[w][0][0][0])[i];
    const int column = i % LANES * COLUMNS + i / LANES % COLUMNS;
    to_rank(&shared.total[t.rank][i / SLAB][column % OWN], column / OWN, sum, shared.arrivals);
  }
  wait_for_arrivals(shared.arrivals);
}

// Of a row of spikes and one of the columns that this block finishes.
DEV Sum read_total(const Shared& shared, int b, int own) {
  Sum sum = 0;
#pragma unroll
  for (int rank = 0; rank < CLUSTER; ++rank) sum += shared.total[rank][b][own];
  return sum;
}
