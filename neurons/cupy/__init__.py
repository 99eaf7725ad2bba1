"""The CuPy backend: a folder for each kernel, one launcher and one way to torch's operators for all.

A kernel is a folder ``<kernel>/`` of two files: ``kernel.cu``, which may include ``arithmetic.cuh``,
``vectors.cuh`` and ``threads.cuh``, and ``ops.py``, which declares it by
:func:`neurons.cupy.operators.operator` and runs it by :func:`neurons.cupy.launcher.launch`. Inside this
package ``import cupy`` is the real CuPy: imports are absolute.
"""

from .si_lif.ops import si_lif_multi_step, signed_spike_count

__all__ = ["si_lif_multi_step", "signed_spike_count"]
