"""Run a script under accelerate's FSDP plugin on CPUs, where accelerate would ignore it."""

import os
import runpy
import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

make = AcceleratorState.__init__


def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
    make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and getattr(self, "fsdp_plugin", None) is None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = with_plugin
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
