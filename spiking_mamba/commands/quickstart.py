"""Distil a spiking student from the dense teacher that comes with the project, and measure both."""

import dataclasses
import time
from dataclasses import field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from spiking_mamba import data, evaluation
from spiking_mamba.commands.configuration import command_settings
from spiking_mamba.common.errors import fail_clearly
from spiking_mamba.common.interruption import interruptible
from spiking_mamba.common.machine import device_name
from spiking_mamba.common.progress import Stage, quiet
from spiking_mamba.common.provenance import provenance
from spiking_mamba.common.schema import Count, Name, Names, Seed, Sources, mapping_of, schema
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.configuration import SpikingMambaConfig
from spiking_mamba.model.modeling import SpikingMambaForCausalLM
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.reports.quickstart import write_report
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.counts import SpikeCounts
from spiking_mamba.spikes.energy import model_energy, projection_energy
from spiking_mamba.training.arguments import Training
from spiking_mamba.training.distillation import DistillationSettings, distill, first_threshold
from spiking_mamba.training.distillation_loss import DistillationLoss
from spiking_mamba.training.run import kept_in, run_folder
from spiking_mamba.training.student import Compensation, Length, Membrane, Neuron, Threshold

PROMPT = "The city of"
VERSIONS = ("torch", "transformers", "spikingjelly", "lm-eval")


@schema
class QuickstartSettings:
    """Settings of the quickstart; every field is a key of the YAML file.

    Attributes:
        output: folder of the run: ``student/model``, ``report.md``, ``report.html``, ``report.png`` and
            ``results.json``.
        teacher, data, length, decontaminate, separate_documents, neuron, sgc, membrane, threshold,
            learn_threshold, loss, training: see ``spiking_mamba.training.distillation.DistillationSettings``.
        held_out: text that the teacher has not seen, for the perplexity.
        held_out_rows: how many rows of it.
        tasks: zero-shot sets, see ``spiking_mamba.data.benchmarks``.
        limit: items of each set; null for all.
        limit_seed: which ones those are.
        seed: of data order and every random generator.
        resume, overwrite: go on with, or throw away, the run in ``output``.
    """

    output: Name
    teacher: Name = "recipes/quickstart/teacher"
    data: Sources = field(default_factory=lambda: ["wikipedia-leads", "state-of-the-union"])
    length: Length = 256
    decontaminate: bool = True
    separate_documents: bool = True
    neuron: Neuron = field(default_factory=lambda: {"class": "neurons.SILIFNode"})
    sgc: Compensation | None = None
    membrane: Membrane = "token"
    threshold: Threshold = 1.0
    learn_threshold: bool = False
    loss: mapping_of(DistillationLoss) = field(default_factory=dict)  # type: ignore[valid-type]
    training: Training = field(default_factory=dict)
    held_out: Name = "wikipedia-passages"
    held_out_rows: Count = 400
    tasks: Names = field(default_factory=lambda: ["arc_easy", "piqa", "sciq"])
    limit: Count | None = 100
    limit_seed: Seed = 0
    seed: Seed = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.distillation()

    def distillation(self) -> DistillationSettings:
        """The settings of the training alone."""
        names = {f.name for f in dataclasses.fields(DistillationSettings)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        return DistillationSettings(**shared | {"output": str(Path(self.output) / "student")})


def run(settings: QuickstartSettings) -> dict[str, Any]:
    """Run it all; return what ``results.json`` holds."""
    start = time.time()
    # what is wrong is an error now, not after the training
    folder, distillation = Path(settings.output), settings.distillation()
    teacher: Any = load_dense(settings.teacher)
    tokenizer = load_tokenizer(settings.teacher)
    distillation.check(teacher.config)
    distillation.make_arguments()
    data.check_sources(settings.data)
    tasks = evaluation.zero_shot_tasks(settings.tasks)
    held_out = data.draw_rows(settings.held_out, tokenizer, settings.length, settings.held_out_rows)
    with (
        interruptible(lambda: kept_in(Path(distillation.output))),
        run_folder(settings, settings.resume, settings.overwrite),
    ):
        print("1/3  Distilling the spiking student", flush=True)
        student_folder, log = distill(distillation, teacher, tokenizer)

        print("2/3  Evaluating", flush=True)
        spiking: dict[str, Any] = {
            "neuron": settings.neuron,
            "membrane": settings.membrane,
            "threshold": first_threshold(distillation, teacher, tokenizer),
        }
        models: dict[str, Any] = {
            "teacher": teacher,
            "before": SpikingMambaForCausalLM.from_dense(teacher, **spiking),
            "after": AutoModelForCausalLM.from_pretrained(student_folder),
        }
        results = measure(models, held_out, tasks, tokenizer, settings)
        results |= {
            "log": log,
            "seed": settings.seed,
            "seconds": time.time() - start,
            "device": device_name(),
            "versions": {name: version(name) for name in VERSIONS},
            "provenance": provenance(settings),
        }
        print("3/3  Writing the report\n", flush=True)
        print(write_report(folder, results))
    print(f"\nReport: {folder / 'report.md'}, {folder / 'report.html'}; student: {student_folder}")
    return results


def measure(
    models: dict[str, Any],
    held_out: Dataset,
    tasks: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    settings: QuickstartSettings,
) -> dict[str, Any]:
    """What the teacher and the student, before and after, are worth."""
    results: dict[str, Any] = {}
    with Stage(len(models) * (1 + len(tasks)), "evaluating") as stage:
        for name, model in models.items():
            stage.label = name if name == "teacher" else f"student {name}"
            # the spikes are those of the perplexity's own forward passes
            compared = None if name == "teacher" else models["teacher"]
            with count_spikes(model) as counts, stage.part("perplexity") as share:
                results[name] = evaluation.perplexity(
                    model.eval(), held_out, progress=share, reference=compared
                )
            results[name]["zero_shot"] = evaluation.zero_shot(
                model, tokenizer, tasks, limit=settings.limit, stage=stage, seed=settings.limit_seed
            )
    teacher, before, after = (results[name]["nll_per_token"] for name in models)
    student = models["after"]
    prompt = tokenizer(PROMPT, return_tensors="pt").to(student.device)
    torch.manual_seed(settings.seed)
    sample = student.generate(**prompt, max_new_tokens=40, do_sample=True, top_p=0.9)
    written: Any = tokenizer.decode(sample[0], skip_special_tokens=True)
    return results | {
        "gap_closed": (before - after) / (before - teacher),
        "spikes": counts.to_dict(),
        "energy": energy_gains(counts, student.config),
        "levels": student.config.levels or _levels_seen(counts),
        "held_out_rows": len(held_out),
        "held_out_tokens": results["after"]["tokens"],
        "held_out": settings.held_out,
        "prompt": PROMPT,
        "sample": " ".join(written.split()),
    }


def _levels_seen(counts: SpikeCounts) -> int:
    """How many values the spike counts had."""
    seen: set[int] = set()
    for projection in counts.projections.values():
        histogram = projection.histogram
        assert histogram is not None
        middle = len(histogram) // 2
        seen |= {int(n) - middle for n in histogram.nonzero()}
    return len(seen)


def energy_gains(counts: SpikeCounts, config: SpikingMambaConfig) -> dict[str, float]:
    """What the report says of energy: gains of the projections, of the whole model and of decoding."""
    whole = model_energy(counts, config)
    gains = projection_energy(counts)
    # what neurons with a potential cost, projections alone do not know
    gains["with_neurons"] = whole["projections_with_neurons"]["fp32"]["gain"]
    gains["whole_model"] = whole["model"]["fp32"]["gain"]
    gains["decoding"] = whole["with_memory"]["decode"]["fp32"]["gain"]
    return gains


@fail_clearly()
def main(description: str | None = __doc__) -> None:
    """Read the command line and run."""
    settings = command_settings(QuickstartSettings, "quickstart", description)
    quiet()
    run(settings)


if __name__ == "__main__":
    main()
