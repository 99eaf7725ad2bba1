// neurons/cupy/si_lif/kernel.cu on the CPU: its kernels use neither barriers nor shared memory, so running their
// threads one after the other is running them. Compiled and driven by tests/helpers/host_kernel.py.
#include "host_arithmetic.h"

struct Index {
  unsigned x;
};
static Index blockIdx, threadIdx, gridDim;

#define ALL_KERNELS  // the one asked for and all others
#include "kernel.cu"

extern "C" void run_forward(int family, int grid, int block, FORWARD_PARAMETERS) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < (unsigned)block; ++threadIdx.x)
      (family == 0 ? forward_single : family == 1 ? forward_wide : forward_tall)(
          x, v0, spike, v_out, v_seq, mask, T, N, beta, v_th, max_count, window, aligned);
}

extern "C" void run_backward(int family, int grid, int block, BACKWARD_PARAMETERS) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < (unsigned)block; ++threadIdx.x)
      (family == 0 ? backward_single : family == 1 ? backward_wide : backward_tall)(
          grad_spike, grad_v, grad_v_seq, mask, grad_x, grad_v0, T, N, beta, v_th, alpha, detach_reset, aligned);
}

extern "C" void run_forward_compensated(int grid, int block, FORWARD_COMPENSATED_PARAMETERS) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < (unsigned)block; ++threadIdx.x)
      forward_compensated(x, spike, mixed, T, N, max_count, lam, aligned);
}

extern "C" void run_backward_compensated(int grid, int block, BACKWARD_COMPENSATED_PARAMETERS) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < (unsigned)grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < (unsigned)block; ++threadIdx.x)
      backward_compensated(x, grad_spike, grad_mixed, grad_x, T, N, max_count, window, alpha, lam, aligned);
}
