// Blocks of threads on the CPU: each thread is a fiber that runs until it waits for others, at a barrier of its warp,
// block or cluster. The source of a kernel stays what it is; shared memory begins as garbage, and a barrier at which
// some thread never arrives aborts. Compiled and driven by tests/helpers/host_kernel.py.
#pragma once
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
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
  Warp warps[32];
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
static const int LARGEST_CLUSTER = 8;
static Fiber* fibers;
static Block cluster[LARGEST_CLUSTER];
static Barrier cluster_barrier;
static Index grid;
static unsigned char *shared, *stacks;
static int room, count, current, left, idle, direction;
static jmp_buf finished;
static void (*body)(const void*);
static const void* body_of;

inline Fiber& me() { return fibers[current]; }

inline void enter(Fiber& fiber) {
  if (fiber.started) _longjmp(fiber.rest, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

inline void next() {
  if (!left) _longjmp(finished, 1);
  if (++idle > 4 * count) {
    fprintf(stderr, "a barrier waits for a thread that never comes\n");
    abort();
  }
  do current = (current + direction + count) % count;
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
  body(body_of);
  me().done = true;
  --left;
  idle = 0;
  next();
}

// The blocks (x, 0 .. blocks - 1) together, `threads` of each.
inline void run_cluster(unsigned x, unsigned y, int blocks, int threads) {
  if (!shared) shared = (unsigned char*)aligned_alloc(128, LARGEST_CLUSTER * SHARED_BYTES);
  count = blocks * threads;
  if (room < count) {
    free(fibers);
    free(stacks);
    fibers = (Fiber*)malloc(count * sizeof(Fiber));
    stacks = (unsigned char*)malloc(count * STACK_BYTES);
    room = count;
  }
  memset(shared, 0xcd, blocks * SHARED_BYTES);
  memset(cluster, 0, sizeof(cluster));
  cluster_barrier = Barrier();
  for (int b = 0; b < blocks; ++b) {
    cluster[b].index = {x, y + b, 0};
    cluster[b].threads = threads;
    cluster[b].shared = shared + b * SHARED_BYTES;
    for (int t = 0; t < threads; ++t) {
      const int own = b * threads + t;
      Fiber& fiber = fibers[own];
      fiber.index = {(unsigned)t, 0, 0};
      fiber.block = &cluster[b];
      fiber.started = fiber.done = false;
      getcontext(&fiber.first);
      fiber.first.uc_stack.ss_sp = stacks + own * STACK_BYTES;
      fiber.first.uc_stack.ss_size = STACK_BYTES;
      fiber.first.uc_link = nullptr;
      makecontext(&fiber.first, run_fiber, 0);
    }
  }
  left = count;
  idle = 0;
  direction = (x + y) % 2 ? -1 : 1;
  if (!_setjmp(finished)) {
    current = 0;
    enter(me());
  }
}

// A launch of `grid_x` by `grid_y` blocks, clusters of `cluster_y` along the second axis.
template <class Kernel>
inline void launch(int grid_x, int grid_y, int threads, int cluster_y, Kernel kernel) {
  if (threads % 32 || threads > 1024 || grid_y % cluster_y || cluster_y > LARGEST_CLUSTER) {
    fprintf(stderr, "no such launch\n");
    abort();
  }
  grid = {(unsigned)grid_x, (unsigned)grid_y, 1};
  body = [](const void* of) { (*(const Kernel*)of)(); };
  body_of = &kernel;
  for (int x = 0; x < grid_x; ++x)
    for (int y = 0; y < grid_y; y += cluster_y) run_cluster(x, y, cluster_y, threads);
}

template <size_t BYTES>
inline size_t room_of(int number) {
  static_assert(BYTES <= SHARED_BYTES / 4, "no room for so much shared memory");
  if (number >= 4) abort();
  return number * (SHARED_BYTES / 4);
}

template <class T, class F>
inline T with_warp(T own, F of) {
  Warp& warp = me().block->warps[me().index.x / 32];
  memcpy(&warp.value[me().index.x % 32], &own, 4);
  wait(warp.barrier, 32);
  const T found = of(warp.value);
  wait(warp.barrier, 32);
  return found;
}

}  // namespace host

#define threadIdx (host::me().index)
#define blockIdx (host::me().block->index)
#define gridDim (host::grid)
// Of each SHARED in a source memory of its own.
#define SHARED(Type, name) \
  Type& name = *reinterpret_cast<Type*>(host::me().block->shared + host::room_of<sizeof(Type)>(__COUNTER__))
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
    memcpy(&found, &all[lane ^ other], 4);
    return found;
  });
}
DEV void cluster_arrive() {}
DEV void cluster_wait() { host::wait(host::cluster_barrier, host::count); }
struct Arrivals {
  int bytes;  // that have not come yet
};
DEV void expect_arrivals(Arrivals& to, unsigned bytes) { to.bytes = (int)bytes; }
template <class T>
DEV void to_rank(T* shared, unsigned rank, T value, Arrivals& to) {
  auto there = [&](void* own) { return host::cluster[rank].shared + ((unsigned char*)own - host::me().block->shared); };
  *reinterpret_cast<T*>(there(shared)) = value;
  reinterpret_cast<Arrivals*>(there(&to))->bytes -= (int)sizeof(T);
  host::idle = 0;
}
DEV void wait_for_arrivals(Arrivals& to) {
  while (*(volatile int*)&to.bytes > 0) host::yield();
}
DEV int ones(unsigned mask) { return __builtin_popcount(mask); }
DEV void wait_for_previous() {}
DEV void let_next_begin() {}
template <class T>
DEV T load_once(const T* from) {
  return *from;
}
DEV float root(float x) { return sqrtf(x); }
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
