"""Pretrain a dense teacher, distil its spiking student, measure both.

python recipes/quickstart/quickstart.py recipes/quickstart/quickstart.yaml
"""

import dataclasses
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spiking_mamba import SpikingMambaForCausalLM, data, evaluation
from spiking_mamba.checkpoint import load_dense
from spiking_mamba.distillation import DistillationSettings, distill
from spiking_mamba.energy import projection_energy
from spiking_mamba.pretraining import PretrainingSettings, pretrain
from spiking_mamba.report import write_report
from spiking_mamba.settings import parse_settings
from spiking_mamba.spikes import count_spikes
from spiking_mamba.training import device_name, fail_clearly, quiet, start_run

PROMPT = "The city of"
VERSIONS = ("torch", "transformers", "spikingjelly", "lm-eval")


@dataclass
class QuickstartSettings:
    """Settings of the quickstart; every field is a key of the YAML file.

    Attributes:
        output: folder of the run: ``teacher/model``, ``student/model``, ``report.md``, ``report.png`` and
            ``results.json``.
        data, length, vocab_size, model: see ``spiking_mamba.pretraining.PretrainingSettings``.
        teacher_training, student_training: fields of transformers' ``TrainingArguments``.
        neuron, sgc, membrane, threshold, learn_threshold, loss: see
            ``spiking_mamba.distillation.DistillationSettings``.
        held_out_rows: how many rows of held-out text give the perplexity.
        tasks: zero-shot sets, see ``spiking_mamba.evaluation.CHANCE``.
        limit: items of each set; null for all.
        seed: of weights, data order and every random generator.
        resume, overwrite: go on with, or throw away, the run in ``output``.
    """

    output: str
    data: Any = field(default_factory=lambda: ["wikipedia-leads", "state-of-the-union"])
    length: int = 256
    vocab_size: int = 4096
    model: dict = field(default_factory=dict)
    teacher_training: dict = field(default_factory=dict)
    neuron: dict = field(default_factory=lambda: {"class": "neurons.SILIFNode"})
    sgc: Any = None
    membrane: str = "token"
    threshold: Any = 1.0
    learn_threshold: bool = False
    loss: dict = field(default_factory=dict)
    student_training: dict = field(default_factory=dict)
    held_out_rows: int = 400
    tasks: Any = ("arc_easy", "piqa", "sciq")
    limit: Any = 100
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def _select(self, cls: type, **others: Any) -> Any:
        names = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(self)}
        return cls(**{name: getattr(self, name) for name in names} | others)

    def teacher(self, folder: Path) -> PretrainingSettings:
        return self._select(
            PretrainingSettings, output=str(folder / "teacher"), training=self.teacher_training
        )

    def student(self, folder: Path, teacher: Path) -> DistillationSettings:
        return self._select(
            DistillationSettings,
            output=str(folder / "student"),
            teacher=str(teacher),
            training=self.student_training,
        )


def run(settings: QuickstartSettings) -> dict[str, Any]:
    """Run it all; return what ``results.json`` holds."""
    start = time.time()
    # what is wrong is an error now, not after the teacher's training
    folder = Path(settings.output)
    for_teacher, for_student = settings.teacher(folder), settings.student(folder, folder / "teacher/model")
    for_teacher.make_arguments()
    for_student.check(for_teacher.make_config(settings.vocab_size, end=0))
    tasks = evaluation.zero_shot_tasks(settings.tasks)
    held_out_text = data.load_text(settings.data, split="held_out")
    start_run(settings, settings.resume, settings.overwrite)

    print("1/4  Pretraining the dense teacher")
    teacher_folder, teacher_log = pretrain(for_teacher)
    print("2/4  Distilling the spiking student")
    student_folder, student_log = distill(for_student)

    print("3/4  Evaluating")
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    teacher = load_dense(teacher_folder)
    spiking = {
        "neuron": settings.neuron,
        "membrane": settings.membrane,
        "threshold": settings.threshold,
    }
    student = AutoModelForCausalLM.from_pretrained(student_folder)
    models = {
        "teacher": teacher,
        "before": SpikingMambaForCausalLM.from_dense(teacher, **spiking),
        "after": student,
    }
    held_out = data.tokenize(held_out_text, tokenizer, settings.length)
    held_out = held_out.shuffle(seed=0).select(range(min(settings.held_out_rows, len(held_out))))
    results: dict[str, Any] = {}
    for name, model in models.items():
        with count_spikes(model) as counts:  # the spikes are those of the perplexity's own forward passes
            results[name] = evaluation.perplexity(model.eval(), held_out)
        results[name]["zero_shot"] = evaluation.zero_shot(model, tokenizer, tasks, limit=settings.limit)
    before, after = results["before"]["perplexity"], results["after"]["perplexity"]
    prompt = tokenizer(PROMPT, return_tensors="pt").to(student.device)
    torch.manual_seed(settings.seed)
    sample = student.generate(**prompt, max_new_tokens=40, do_sample=True, top_p=0.9)
    results |= {
        "gap_closed": (before - after) / (before - results["teacher"]["perplexity"]),
        "spikes": counts.to_dict(),
        "energy": projection_energy(counts),
        "levels": 2 * (student.config.max_spike_count or 1) + 1,
        "held_out_rows": len(held_out),
        "held_out_tokens": results["after"]["tokens"],
        "teacher_log": teacher_log,
        "student_log": student_log,
        "prompt": PROMPT,
        "sample": " ".join(tokenizer.decode(sample[0], skip_special_tokens=True).split()),
        "seed": settings.seed,
        "seconds": time.time() - start,
        "device": device_name(),
        "versions": {name: version(name) for name in VERSIONS},
    }
    print("4/4  Writing the report\n")
    print(write_report(folder, results))
    print(f"\nReport: {folder / 'report.md'}, picture: {folder / 'report.png'}, student: {student_folder}")
    return results


def main() -> None:
    settings = parse_settings(QuickstartSettings, description=__doc__)
    quiet()
    with fail_clearly():
        run(settings)


if __name__ == "__main__":
    main()
