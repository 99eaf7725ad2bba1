"""Time a forward pass with and without counting spikes.

python recipes/benchmark/spike_counting.py [--hidden_size 256 --layers 10 --batch 8 --length 256 --bf16]

The three ways run in turn in one process; figures are medians after warm-up, so read the ratios. A machine
that does other work at the same time spoils them.
"""

import argparse
import functools
import statistics
from contextlib import nullcontext

import torch
from sizes import add_sizes, config_of_sizes
from stopwatch import seconds_of

from neurons import set_backend
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.machine import keep_freed_memory
from spiking_mamba.common.progress import quiet
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.spikes.counting import count_spikes

NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}


@fail_clearly()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, batch=8, length=256, repeats=30)
    parser.add_argument("--backend", default="torch", choices=("torch", "cupy"), help="of the neurons")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--padded", action="store_true", help="pass an attention mask with padding")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    quiet()
    keep_freed_memory()
    torch.manual_seed(0)
    config = SpikingMambaConfig.from_dict(config_of_sizes(args).to_dict() | {"neuron": NEURON})
    model = SpikingMambaForCausalLM(config).to(args.device).eval()
    set_backend(model, args.backend)
    input_ids = torch.randint(0, args.vocab_size, (args.batch, args.length), device=args.device)
    mask = torch.ones_like(input_ids)
    mask[0, : args.length // 2] = 0
    inputs = {"input_ids": input_ids} | ({"attention_mask": mask} if args.padded else {})
    forward = functools.partial(seconds_of, functools.partial(model, **inputs, use_cache=False))
    ways = {
        "not counted": nullcontext,
        "counted": lambda: count_spikes(model, histogram=False),
        "counted, with histograms": lambda: count_spikes(model),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad(), torch.autocast(input_ids.device.type, torch.bfloat16, enabled=args.bf16):
        for repeat in range(3 + args.repeats):
            for name, way in ways.items():  # in turn, so that the machine's moods hit all alike
                with way():
                    forward()  # the sums come to the device
                    seconds = forward()
                if repeat >= 3:
                    times[name].append(seconds)
    plain = statistics.median(times["not counted"])
    rows = [
        [name, f"{1e3 * statistics.median(values):.2f}", f"{statistics.median(values) / plain - 1:+.1%}"]
        for name, values in times.items()
    ]
    print(markdown_table(["forward pass", "ms", "more"], rows))


if __name__ == "__main__":
    main()
