"""Time a training step, forward and backward: rivals' Mamba2, ours dense, ours spiking.

python recipes/benchmark/training_step.py [--bf16]  # 5M parameters: a CPU will do
python recipes/benchmark/training_step.py --size 130m --batch 16 --bf16 --compile  # beside mamba-ssm
python recipes/benchmark/training_step.py --size 130m --batch 16 --bf16 --compile --lengths 512 8192
torchrun --nproc-per-node 2 recipes/benchmark/training_step.py --size 130m --batch 16 --bf16 --compile

All models have the same shapes and run in turn in one process; figures are medians after warm-up, so read
the ratios. A machine that does other work at the same time spoils them. Ours take their next-token loss as
the recipes do, piece by piece from hidden states; transformers' and mamba-ssm's from whole logits. Under
torchrun every GPU has a batch of its own and DDP averages gradients; tokens/s are those of all GPUs.
"""

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Models of several makes in turn fragment the memory; an allocator that has to give blocks back costs time.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from sizes import add_sizes, config_of_sizes
from stopwatch import seconds_of
from torch.nn import functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM
from versions import about, line

from neurons import set_backend
from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.common.errors import RunError, fail_clearly
from spiking_mamba.common.interruption import interruptible, measured_so_far
from spiking_mamba.common.machine import device_name, keep_freed_memory
from spiking_mamba.common.progress import quiet
from spiking_mamba.model import scan as ssd
from spiking_mamba.model.state_spaces import published_config
from spiking_mamba.reports.document import markdown_table
from spiking_mamba.reports.figures import picture
from spiking_mamba.training.head_loss import head_loss

NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 4}}
SGC = {"mode": "blend", "schedule": "constant"}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by NVIDIA's data sheets

Step = Callable[[torch.Tensor], None]


def make_config(args: argparse.Namespace) -> SpikingMambaConfig:
    if args.size:
        return published_config(f"state-spaces/mamba2-{args.size}")
    return config_of_sizes(args)


class WithLoss(torch.nn.Module):
    """A model and its next-token loss, for DDP, which sees nothing but calls."""

    def __init__(self, model: SpikingMambaForCausalLM, compiles: bool) -> None:
        super().__init__()
        self.model, self.compiles = model, compiles

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.backbone(input_ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten()
        return head_loss(hidden, self.model.lm_head.weight, targets=targets, compiles=self.compiles)[0]


def ours(config: SpikingMambaConfig, args: argparse.Namespace, averages: bool = True, **spiking: Any) -> Step:
    torch.manual_seed(0)
    fields = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    with torch.device(args.device):
        model = SpikingMambaForCausalLM(SpikingMambaConfig(**fields | spiking)).train()
    model.to(args.device)
    set_backend(model, args.backend)
    model.compile_blocks(args.compile)

    module: torch.nn.Module = WithLoss(model, args.compile)
    if torch.distributed.is_initialized() and averages:
        module = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)

    def step(input_ids: torch.Tensor) -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = module(input_ids)
        loss.backward()
        model.zero_grad()

    return step


def transformers_own(config: SpikingMambaConfig, args: argparse.Namespace) -> Step:
    known = Mamba2Config().to_dict().keys() - {"model_type", "architectures"}
    model = Mamba2ForCausalLM(Mamba2Config(**{k: v for k, v in config.to_dict().items() if k in known}))
    model.to(args.device).train()

    def step(input_ids: torch.Tensor) -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        model.zero_grad()

    return step


def mamba_ssm(config: SpikingMambaConfig, args: argparse.Namespace) -> Step:
    """mamba-ssm's own model; without causal-conv1d it has no fused path."""
    ssd._triton_kernels()  # knows how to import a mamba-ssm that was built without CUDA
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    fused = importlib.util.find_spec("causal_conv1d") is not None
    layer = {"layer": "Mamba2", "use_mem_eff_path": fused, "d_state": config.state_size}
    model = MambaLMHeadModel(
        MambaConfig(
            d_model=config.hidden_size,
            n_layer=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            ssm_cfg=layer | {"headdim": config.head_dim, "chunk_size": config.chunk_size},
        ),
        device=args.device,
    ).train()

    def step(input_ids: torch.Tensor) -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits.float(), input_ids[:, 1:].flatten())
        loss.backward()
        model.zero_grad()

    return step


def contenders(config: SpikingMambaConfig, args: argparse.Namespace) -> dict[str, Callable[[], Step]]:
    made: dict[str, Callable[[], Step]] = {}
    if args.device == "cuda" and importlib.util.find_spec("mamba_ssm"):
        made["mamba-ssm"] = lambda: mamba_ssm(config, args)
    if not args.size:
        made["transformers' Mamba2"] = lambda: transformers_own(config, args)
    if torch.distributed.is_initialized():
        made["dense, gradients not averaged"] = lambda: ours(config, args, averages=False)
    made |= {
        "dense": lambda: ours(config, args),
        "spiking, SGC off": lambda: ours(config, args, neuron=NEURON),
        "spiking, SGC blend": lambda: ours(config, args, neuron=NEURON, sgc=SGC),
        "spiking, SGC replace": lambda: ours(config, args, neuron=NEURON, sgc=SGC | {"mode": "replace"}),
    }
    return {name: make for name, make in made.items() if not args.only or name in args.only}


def flops_per_token(config: SpikingMambaConfig) -> float:
    """Operations of a forward and a backward pass, as model-FLOPs utilisation counts them.

    6 per parameter that a token is multiplied with (the embedding as the head only), without the scan.
    """
    with torch.device("meta"):
        model = SpikingMambaForCausalLM(config)
    return 6.0 * sum(p.numel() for p in model.parameters())


def measure(
    config: SpikingMambaConfig, args: argparse.Namespace, batch: int, length: int
) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of each contender; one that fails is told of and left out."""
    torch.compiler.reset()  # or a second shape would be compiled for shapes that change, which a run's do not
    input_ids = torch.randint(0, config.vocab_size, (batch, length), device=args.device)
    cuda, steps, times, peak = args.device == "cuda", {}, {}, {}
    for name, make in contenders(config, args).items():
        try:
            step = make()
            for _ in range(3):
                seconds_of(step, input_ids)
            if cuda:
                held = torch.cuda.memory_allocated()  # by this one's weights, and by those before it
                torch.cuda.reset_peak_memory_stats()
                seconds_of(step, input_ids)
                peak[name] = float(torch.cuda.max_memory_allocated() - held)
            steps[name], times[name] = step, []
        except Exception as error:  # transformers, say, picks its kernels at import, for all devices
            print(f"{name} does not run here and is left out: {type(error).__name__}: {str(error)[:200]}")
    if not steps:
        raise RunError("Nothing runs here, for the reasons given above.")
    for _ in range(args.repeats):
        for name, step in steps.items():  # in turn, so that the machine's moods hit all alike
            times[name].append(seconds_of(step, input_ids))
    steps.clear()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return {
        name: {"seconds": statistics.median(found), "peak": peak.get(name, float("nan"))}
        for name, found in times.items()
    }


def table(
    measured: dict[str, dict[str, float]], tokens: int, flops: float, gpus: int, args: argparse.Namespace
) -> str:
    fastest_rival = next(iter(measured))
    header = ["training step", "tokens/s", f"time / {fastest_rival}", "time / dense"]
    card = torch.cuda.get_device_name() if args.device == "cuda" else ""
    peak_flops = next((rate for name, rate in PEAK.items() if name in card), None) if args.bf16 else None
    if args.device == "cuda":
        header += ["peak GiB of a step"] + (["model-FLOPs utilisation"] if peak_flops else [])
    rows = []
    for name, row in measured.items():
        rate = tokens / row["seconds"]
        cells = [name, f"{rate:.0f}", f"{row['seconds'] / measured[fastest_rival]['seconds']:.3f}"]
        dense = measured.get("dense", {"seconds": float("nan")})["seconds"]
        cells.append(f"{row['seconds'] / dense:.3f}")
        if args.device == "cuda":
            cells.append(f"{row['peak'] / 2**30:.1f}")
            if peak_flops:
                cells.append(f"{rate * flops / peak_flops / gpus:.0%}")
        rows.append(cells)
    return markdown_table(header, rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Throughput and memory against the tokens of a row, and against those of a step at one length."""
    runs = report["runs"]
    panels = [(key, [run for run in runs if run["sweep"] == key]) for key in ("length", "batch")]
    panels = [(key, chosen) for key, chosen in panels if chosen]
    grid = {"nrows": 2, "ncols": len(panels), "sharey": "row", "squeeze": False}
    with picture(path, 5.5 * len(panels), 6, dpi=110, **grid) as (figure, axes):
        for (key, chosen), (rate, memory) in zip(panels, axes.T, strict=True):
            fixed = chosen[0]["length"]
            if key == "batch":  # a point that the sweep over lengths went through
                chosen += [run for run in runs if run["sweep"] != key and run["length"] == fixed]
            chosen.sort(key=lambda run: run[key])
            for name in dict.fromkeys(name for run in chosen for name in run["found"]):
                mine = [run for run in chosen if name in run["found"]]
                at = [run[key] for run in mine]
                tokens = [run["batch"] * run["length"] / run["found"][name]["seconds"] for run in mine]
                style = {"marker": "o", "linestyle": "--" if name.startswith("spiking") else "-"}
                rate.plot(at, tokens, label=name, **style)
                memory.plot(at, [run["found"][name]["peak"] / 2**30 for run in mine], **style)
            for panel in (rate, memory):
                panel.set_xscale("log", base=2)
                panel.set_xticks([run[key] for run in chosen], [f"{run[key]:,}" for run in chosen])
            memory.set_xlabel(
                "tokens a row, about as many a step"
                if key == "length"
                else f"rows of {fixed:,} tokens a step"
            )
        for panel in axes[:, 0]:  # when all are drawn: the panels of a row share their axis
            panel.set_ylim(0, None)
        axes[0, 0].set_ylabel("tokens/s, forward and backward")
        axes[1, 0].set_ylabel("peak GiB of a step")
        axes[0, 0].legend()
        figure.suptitle(report["device"])


@fail_clearly()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, repeats=15)
    parser.add_argument("--size", help="a published one instead: 130m, 370m, 780m, 1.3b or 2.7b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, help="256, or 2048 with --size")
    parser.add_argument("--lengths", type=int, nargs="+", help="several, with as many tokens a step each")
    parser.add_argument("--batches", type=int, nargs="+", help="several, of --length each")
    parser.add_argument("--backend", default="torch", choices=("torch", "cupy"), help="of the neurons")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile our blocks and our loss")
    parser.add_argument("--only", nargs="+", help="of the table's rows, those with these names")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    quiet()
    keep_freed_memory()
    gpus = int(os.environ.get("WORLD_SIZE", 1))
    if gpus > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl")
    config = make_config(args)
    length = args.length or (2048 if args.size else 256)
    flops = flops_per_token(config)
    shapes = [("length", max(1, args.batch * length // each), each) for each in args.lengths or []]
    shapes += [("batch", batch, length) for batch in args.batches or []]
    report: dict[str, Any] = about() | {"arguments": sys.argv[1:], "runs": []}
    print(line(), flush=True)
    with interruptible(lambda: measured_so_far(report["runs"], args.out, "step.json")):
        for sweep, batch, each in shapes or [("batch", args.batch, length)]:
            measured = measure(config, args, batch, each)
            if int(os.environ.get("RANK", 0)):
                continue
            report["runs"].append({"sweep": sweep, "batch": batch, "length": each, "found": measured})
            times = f"{gpus} times " if gpus > 1 else ""
            print(f"\n{times}{batch} x {each} tokens, {device_name()}\n", flush=True)
            print(table(measured, gpus * batch * each, flops, gpus, args), flush=True)
            if args.out:  # after every length: a later failure loses nothing
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "step.json").write_text(json.dumps(report, indent=1))
                draw(report, args.out / "step.png")
    if gpus > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
