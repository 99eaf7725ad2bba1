// spiking_mamba/model/cuda/project.cu on the CPU. Compiled and driven by tests/helpers/host_kernel.py.
#include "host_blocks.h"

#include "project.cu"

extern "C" void run_project(int grid_x, int grid_y, int block, PROJECT_PARAMETERS) {
  host::launch(grid_x, grid_y, block, CLUSTER, [=] {
    project(x, weight, shift, squares, W, scale, factor, bias, y, squares_out, conv_state, conv_weight, conv_bias,
            kept_inputs, kept_sums, N, row, inputs, rows, parts, from, upto, eps, most, silent);
  });
}
