#!/bin/sh
# Add the GPU kernels to the current environment without touching its torch: mamba-ssm's Triton kernels,
# which need no compiler, and causal-conv1d where nvcc is at hand. The versions are the lock's.
set -eu
PYTHON=${PYTHON:-python}
lock=$(dirname "$0")/../constraints.txt
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none found")'
# The CUDA extension of mamba-ssm serves Mamba-1 alone; causal-conv1d is built for the torch that is here.
export MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
install() { "$PYTHON" -m pip install --quiet -c "$lock" "$@"; }
install ninja packaging setuptools wheel einops
install --no-deps --no-build-isolation mamba-ssm
echo "mamba-ssm: its Triton kernels are installed"
if command -v nvcc >/dev/null 2>&1 && "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  if install --no-deps --no-build-isolation causal-conv1d; then
    echo "causal-conv1d: built"
  else
    echo "causal-conv1d: did not build; the convolution runs on torch"
  fi
else
  echo "causal-conv1d: left out, it needs nvcc and a GPU; the convolution runs on torch"
fi
