// neurons/cupy/event_linear/kernel.cu on the CPU: what stands before its barrier for all threads of a block, then what
// stands behind it. Compiled and driven by tests/helpers/host_kernel.py.
#define DEV inline
#define __restrict__

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
DEV void add_to(int* to, int value) { *to += value; }

#include "kernel.cu"

extern "C" void run_event_linear(int grid_x, int grid_y, int block, EVENT_LINEAR_PARAMETERS) {
  const Call call = {s, W, scale, y, N, row, padded};
  for (int by = 0; by < grid_y; ++by)
    for (int bx = 0; bx < grid_x; ++bx) {
      static Shared shared;
      for (int t = 0; t < block; ++t) gather(shared, call, thread_of(call, bx, by, t));
      for (int t = 0; t < block; ++t) add_up(shared, call, (i64)bx * 32 * VEC, t);
    }
}
