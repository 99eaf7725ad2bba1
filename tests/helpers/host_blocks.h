// Blocks of threads on the CPU: each thread is a fiber that runs until it waits for others, at a barrier of its warp,
// block or cluster. The source of a kernel stays what it is; shared memory begins as garbage, and a barrier at which
// some thread never arrives aborts. Compiled and driven by tests/helpers/host_kernel.py.
#pragma once
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#include "host_arithmetic.h"

namespace host {

struct Index {
  unsigned x, y, z;
};

struct Barrier {
  int arrived = 0;
  unsigned turn = 0;
};

struct Warp {
  Barrier barrier;
  unsigned value[32];
};

struct Block {
  Index index;
  int threads;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared;
};

struct Fiber {
  Index index;
  Block* block;
  ucontext_t first;
  jmp_buf rest;
  bool started = false, done = false;
};

static const size_t SHARED_BYTES = 1 << 18, STACK_BYTES = 1 << 17;
static std::vector<Fiber> fibers;
static std::vector<Block> cluster;
static Barrier cluster_barrier;
static Index grid;
static int current, left, idle, direction;
static jmp_buf finished;
static std::function<void()> body;

inline Fiber& me() { return fibers[current]; }

inline void enter(Fiber& fiber) {
  if (fiber.started) _longjmp(fiber.rest, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

inline void next() {
  if (!left) _longjmp(finished, 1);
  if (++idle > 4 * (int)fibers.size()) {
    std::fprintf(stderr, "a barrier waits for a thread that never comes\n");
    std::abort();
  }
  do current = (current + direction + (int)fibers.size()) % (int)fibers.size();
  while (me().done);
  enter(me());
}

inline void yield() {
  if (!_setjmp(me().rest)) next();
}

inline void wait(Barrier& barrier, int members) {
  const unsigned turn = barrier.turn;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.turn;
    idle = 0;
  } else {
    while (*(volatile unsigned*)&barrier.turn == turn) yield();
  }
}

inline void run_fiber() {
  body();
  me().done = true;
  --left;
  idle = 0;
  next();
}

// The blocks (x, 0 .. blocks - 1) together, `threads` of each.
inline void run_cluster(unsigned x, unsigned y, int blocks, int threads) {
  static std::unique_ptr<unsigned char[]> shared, stacks;
  static size_t stacks_for = 0;
  if (!shared) shared.reset(new unsigned char[8 * SHARED_BYTES + 128]);
  const size_t count = (size_t)blocks * threads;
  if (stacks_for < count) {
    stacks.reset(new unsigned char[count * STACK_BYTES]);
    stacks_for = count;
  }
  std::memset(shared.get(), 0xcd, blocks * SHARED_BYTES);
  unsigned char* aligned = shared.get() + 128 - (size_t)shared.get() % 128;
  cluster.assign(blocks, Block());
  fibers.assign(count, Fiber());
  cluster_barrier = Barrier();
  for (int b = 0; b < blocks; ++b) {
    cluster[b].index = {x, y + b, 0};
    cluster[b].threads = threads;
    cluster[b].warps.assign((threads + 31) / 32, Warp());
    cluster[b].shared = aligned + b * SHARED_BYTES;
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.index = {(unsigned)t, 0, 0};
      fiber.block = &cluster[b];
      getcontext(&fiber.first);
      fiber.first.uc_stack.ss_sp = stacks.get() + (b * threads + t) * STACK_BYTES;
      fiber.first.uc_stack.ss_size = STACK_BYTES;
      fiber.first.uc_link = nullptr;
      makecontext(&fiber.first, run_fiber, 0);
    }
  }
  left = (int)count;
  idle = 0;
  direction = (x + y) % 2 ? -1 : 1;
  if (!_setjmp(finished)) {
    current = 0;
    enter(me());
  }
}

// A launch of `grid_x` by `grid_y` blocks, clusters of `cluster_y` along the second axis.
inline void launch(int grid_x, int grid_y, int threads, int cluster_y, std::function<void()> kernel) {
  if (threads % 32 || grid_y % cluster_y || cluster_y > 8) {
    std::fprintf(stderr, "no such launch\n");
    std::abort();
  }
  grid = {(unsigned)grid_x, (unsigned)grid_y, 1};
  body = kernel;
  for (int x = 0; x < grid_x; ++x)
    for (int y = 0; y < grid_y; y += cluster_y) run_cluster(x, y, cluster_y, threads);
}

template <class T, class F>
inline T with_warp(T own, F of) {
  Warp& warp = me().block->warps[me().index.x / 32];
  std::memcpy(&warp.value[me().index.x % 32], &own, 4);
  wait(warp.barrier, 32);
  const T found = of(warp.value);
  wait(warp.barrier, 32);
  return found;
}

}  // namespace host

#define threadIdx (host::me().index)
#define blockIdx (host::me().block->index)
#define gridDim (host::grid)
#define SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(host::me().block->shared)
#define CLUSTER_DIMS

// ---- neurons/cupy/threads.cuh ----
DEV void block_sync() { host::wait(host::me().block->barrier, host::me().block->threads); }
DEV void warp_sync() { host::with_warp(0u, [](unsigned*) { return 0u; }); }
DEV unsigned ballot(bool p) {
  return host::with_warp((unsigned)p, [](unsigned* all) {
    unsigned found = 0;
    for (int i = 0; i < 32; ++i) found |= (all[i] & 1u) << i;
    return found;
  });
}
template <class T>
DEV T from_lane(T own, int other) {  // of the lane whose number differs in these bits
  const int lane = threadIdx.x % 32;
  return host::with_warp(own, [&](unsigned* all) {
    T found;
    std::memcpy(&found, &all[lane ^ other], 4);
    return found;
  });
}
DEV void cluster_arrive() {}
DEV void cluster_wait() { host::wait(host::cluster_barrier, (int)host::fibers.size()); }
template <class T>
DEV T from_rank(const T* shared, unsigned rank) {
  const size_t offset = (const unsigned char*)shared - host::me().block->shared;
  return *reinterpret_cast<const T*>(host::cluster[rank].shared + offset);
}
DEV int ones(unsigned mask) { return __builtin_popcount(mask); }
DEV void wait_for_previous() {}
DEV void let_next_begin() {}
DEV float root(float x) { return std::sqrt(x); }
typedef signed char i1;
DEV int dot4(unsigned a, unsigned b, int sum) {
  for (int i = 0; i < 4; ++i) sum += (int)(i1)(a >> 8 * i) * (i1)(b >> 8 * i);
  return sum;
}
DEV unsigned permute(unsigned a, unsigned b, unsigned how) {
  const unsigned long long both = a | (unsigned long long)b << 32;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= (unsigned)(both >> 8 * (how >> 4 * i & 7) & 255) << 8 * i;
  return found;
}
