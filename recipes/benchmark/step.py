"""Time a training step: transformers' Mamba2, ours dense, ours spiking, with and without SGC.

python recipes/benchmark/step.py [--hidden_size 256 --layers 10 --batch 8 --length 256 --bf16]

All models have the same shapes and weights and run in turn in one process; figures are medians after
warm-up, so read the ratios. A machine that does other work at the same time spoils them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

# Beside this file lies neurons.py, called as the package is: "import neurons" must not find it.
HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

import torch  # noqa: E402
from transformers import Mamba2Config, Mamba2ForCausalLM  # noqa: E402

from neurons import set_backend  # noqa: E402
from spiking_mamba import SpikingMambaForCausalLM  # noqa: E402
from spiking_mamba.report import markdown_table  # noqa: E402
from spiking_mamba.training import keep_freed_memory, quiet  # noqa: E402

NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}


def models(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    config = Mamba2Config(
        hidden_size=args.hidden_size,
        head_dim=args.head_dim,
        num_heads=2 * args.hidden_size // args.head_dim,
        state_size=args.state_size,
        n_groups=1,
        num_hidden_layers=args.layers,
        vocab_size=args.vocab_size,
        chunk_size=args.chunk_size,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = Mamba2ForCausalLM(config).to(args.device).train()
    make = SpikingMambaForCausalLM.from_dense
    return {
        "transformers' Mamba2": theirs,
        "dense": make(theirs),
        "spiking, SGC off": make(theirs, neuron=NEURON),
        "spiking, SGC blend": make(theirs, neuron=NEURON, sgc={"mode": "blend", "schedule": "constant"}),
        "spiking, SGC replace": make(theirs, neuron=NEURON, sgc={"mode": "replace", "schedule": "constant"}),
    }


def step(model: torch.nn.Module, input_ids: torch.Tensor, bf16: bool) -> float:
    """Seconds of one forward and backward pass."""
    synchronize = torch.cuda.synchronize if input_ids.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=bf16):
        model(input_ids, labels=input_ids).loss.backward()
    synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"hidden_size": 256, "head_dim": 32, "state_size": 64, "layers": 10, "vocab_size": 4096}
    for name, default in (sizes | {"chunk_size": 64, "batch": 8, "length": 256, "repeats": 15}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", default="torch", choices=("torch", "cupy"), help="of the neurons")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    quiet()
    keep_freed_memory()
    torch.manual_seed(0)
    contenders = models(args)
    for model in contenders.values():
        set_backend(model, args.backend)
    input_ids = torch.randint(0, args.vocab_size, (args.batch, args.length), device=args.device)
    try:  # transformers picks its kernels at import for all devices, and may have picked some that fail
        step(contenders["transformers' Mamba2"], input_ids, args.bf16)
    except Exception as error:
        print(f"transformers' Mamba2 does not run here and is left out: {error}")
        del contenders["transformers' Mamba2"]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(3 + args.repeats):
        for name, model in contenders.items():  # in turn, so that the machine's moods hit all alike
            seconds = step(model, input_ids, args.bf16)
            if repeat >= 3:
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    theirs, dense = median.get("transformers' Mamba2", float("nan")), median["dense"]
    rows = [
        [
            name,
            f"{args.batch * args.length / seconds:.0f}",
            f"{seconds / theirs:.3f}",
            f"{seconds / dense:.3f}",
        ]
        for name, seconds in median.items()
    ]
    print(markdown_table(["training step", "tokens/s", "time / transformers", "time / dense"], rows))


if __name__ == "__main__":
    main()
