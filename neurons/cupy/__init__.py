"""The CuPy backend: one CUDA source, its launcher, its torch operators.

Inside this package ``import cupy`` is the real CuPy: imports are absolute.
"""

from .ops import si_lif_multi_step, signed_spike_count

__all__ = ["si_lif_multi_step", "signed_spike_count"]
