"""The GPU's way to count against torch's, by Triton's interpreter, which needs no GPU."""

import subprocess
import sys

SCRIPT = """
import itertools
import torch
from spiking_mamba.spikes.kernel import accumulate
from spiking_mamba.spikes.counting import Layout
from spiking_mamba.spikes.counts import _SUMS, ProjectionSpikes

draw = torch.Generator().manual_seed(0)
shapes = [(3, 50, 300), (1, 1, 16), (0, 5, 7)]
cases = itertools.product(shapes, *[[False, True]] * 3)
for case, (shape, padded, levels, turned) in enumerate(cases):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[case % 3]
    batch, length, channels = shape
    spike = torch.randint(-4, 5, shape, generator=draw).to(dtype)
    if turned:  # membrane: sequence
        spike = spike.transpose(0, 1).contiguous().transpose(0, 1)
    layout = None
    if padded:
        mask = torch.randint(0, 2, (batch, length + 3), generator=draw)
        mask[:, -1] = 1
        layout = Layout.of(mask, length)
    one, two = (ProjectionSpikes(channels, 3, 4, levels) for _ in range(2))
    for _ in range(2):  # it adds
        one.add(spike, layout)
        two._make_room(spike.device, length if layout is None else len(layout.tokens))
        where = (None, None) if layout is None else (layout.padding, layout.position)
        accumulate(spike, *where, tuple(getattr(two, name) for name in _SUMS), 4, levels)
    assert one.total > 0 or batch == 0
    for name in _SUMS[:-1]:
        assert torch.equal(getattr(one, name), getattr(two, name)), (shape, dtype, padded, name)
    assert not levels or torch.equal(one.histogram, two.histogram)
print("equal")
"""


def test_the_kernel_adds_what_torch_adds(triton_interpreter):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=triton_interpreter, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
