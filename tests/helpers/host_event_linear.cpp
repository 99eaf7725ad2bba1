// neurons/cupy/event_linear/kernel.cu on the CPU. Compiled and driven by tests/helpers/host_kernel.py.
#include "host_blocks.h"

#include "kernel.cu"

extern "C" void run_event_linear(int grid_x, int grid_y, int block, EVENT_LINEAR_PARAMETERS) {
  host::launch(grid_x, grid_y, block, CLUSTER,
               [=] { event_linear(s, W, scale, factor, bias, residual, y, N, row, inputs, rows); });
}
