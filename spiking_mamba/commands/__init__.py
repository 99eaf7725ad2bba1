"""The console command: a module with a ``main`` each, and the configurations that come with the package."""

import logging

# what they say while they are imported: of kernels that they would fetch, of a CUDA toolkit without a GPU
for _name in ("bitsandbytes", "torch.utils.cpp_extension"):
    logging.getLogger(_name).setLevel(logging.ERROR)
