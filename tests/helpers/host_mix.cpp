// spiking_mamba/model/cuda/mix.cu on the CPU. Compiled and driven by tests/helpers/host_kernel.py.
#include "host_blocks.h"

#include "mix.cu"

extern "C" void run_scan_token(int grid_x, int grid_y, int block, SCAN_PARAMETERS) {
  host::launch(grid_x, grid_y, block, 1, [=] {
    scan_token(projected, dt_bias, A_log, D, states, y, squares, width, heads, groups, low, high);
  });
}

extern "C" void run_embed_token(int grid_x, int grid_y, int block, EMBED_PARAMETERS) {
  host::launch(grid_x, grid_y, block, 1, [=] { embed_token(tokens, table, x, squares, size); });
}
