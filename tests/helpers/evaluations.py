"""Made-up results of an evaluation, in the form that ``recipes/evaluate`` writes them."""

from dataclasses import asdict

import numpy as np

from spiking_mamba.evaluation.statistics import SOURCE_TASKS, gaps, groups
from spiking_mamba.spikes.energy import COSTS_45NM

NORMED = ("hellaswag", "arc_challenge", "openbookqa")
CHANCE = {"piqa": 0.5, "boolq": 0.5, "winogrande": 0.5}
WIDTHS = {"in_proj": (768, 3352), "out_proj": (1536, 768)}


def _task(task, random, skill, difficulty, spiking):
    """Scores of items whose difficulties all models share, so that they are correlated."""
    main = "acc_norm" if task in NORMED else "acc"
    items = {
        name: (random.normal(skill + bonus, 0.5, len(difficulty)) > difficulty).astype(int).tolist()
        for name, bonus in (("acc", 0.0), ("acc_norm", 0.1))
    }
    n = len(difficulty)
    metrics = {
        name: {"value": float(np.mean(v)), "stderr": float(np.std(v, ddof=1) / np.sqrt(n))}
        for name, v in items.items()
    }
    spikes = {
        "mean_abs": 0.55,
        "nonzero_share": 0.41,
        "tokens": 91 * n,
        "accumulations": 3.1e9,
        "dense_macs": 5.5e9,
    }
    note = "other items than the stock task's" if task == "sciq" else None
    data = {"source": "packages", "split": "validation", "rows": n, "sha256": f"{task:0<64}", "note": note}
    return {
        "n": n,
        "main": main,
        "chance": CHANCE.get(task, 0.25),
        "metrics": metrics,
        "items": items,
        "data": data,
        "spikes": spikes if spiking else None,
    }


def _layers(random, layers, levels, rate, channels):
    rows = {}
    for layer in range(layers):
        for name, (inputs, outputs) in WIDTHS.items():
            mean = rate * (1.5 if name == "in_proj" else 0.5) * random.uniform(0.6, 1.4)
            distance = np.abs(np.arange(levels) - levels // 2)
            share = np.exp(-distance / max(mean, 0.05))
            share[0] = 0.0  # a count that never came
            row = {
                "mean_abs": mean,
                "nonzero_share": min(0.9, mean * 0.8),
                "silent_channels": 3,
                "tokens": 10_000,
                "accumulations": mean * 10_000 * inputs * outputs,
                "dense_macs": 1e4 * inputs * outputs,
                "histogram": (share / share.sum() * inputs * 10_000).round().tolist(),
            }
            if channels:
                row["channels"] = random.gamma(0.7, mean / 0.7, inputs).tolist()
            rows[f"backbone.layers.{layer}.mixer.{name}"] = row
    return rows


def _costs(dense, accumulations, other=0.0):
    found = {}
    for table, cost in COSTS_45NM.items():
        energies = {
            "dense": (dense + other) * cost.mac,
            "spiking": accumulations * cost.ac + other * cost.mac,
            "quantised": (dense + other) * 0.3,
            "quantised_sparse": 0.4 * dense * 0.3 + other * 0.3,
        }
        ours = energies["spiking"] if table != "fp32" else accumulations * 0.1 + other * 0.3
        row = {f"{name}_pj_per_token": value for name, value in energies.items()}
        row["gain"] = energies["dense"] / energies["spiking"]
        row["gain_over_quantised"] = energies["quantised"] / ours
        row["gain_over_quantised_sparse"] = energies["quantised_sparse"] / ours
        found[table] = row
    return found


def _energy(rows):
    layers = [
        {
            "name": name,
            "mean_abs": row["mean_abs"],
            "nonzero_share": row["nonzero_share"],
            "accumulations_per_token": row["accumulations"] / row["tokens"],
            "dense_macs_per_token": row["dense_macs"] / row["tokens"],
            "energy": _costs(row["dense_macs"] / row["tokens"], row["accumulations"] / row["tokens"]),
        }
        for name, row in rows.items()
    ]
    accumulations = sum(layer["accumulations_per_token"] for layer in layers)
    dense = sum(layer["dense_macs_per_token"] for layer in layers)
    memory = {
        "projections": _costs(dense, 5 * accumulations),
        "model": _costs(dense, 5 * accumulations, dense),
        "decode": _costs(dense, 8 * accumulations, 2 * dense),
    }
    operations = {"embedding": 0, "in_proj": 6e7, "conv": 1.7e5, "scan": 9e6, "norms": 5e4, "out_proj": 3e7}
    return {
        "hypothetical": ["fp16", "int8"],
        "projections": _costs(dense, accumulations),
        "model": _costs(dense, accumulations, 0.5 * dense),
        "with_memory": memory,
        "layers": layers,
        "costs": {name: asdict(cost) for name, cost in COSTS_45NM.items()},
        "pass": {"batch": 1, "length": 2048},
        "operations_per_token": operations | {"lm_head": 3.8e7},
    }


def evaluation_model(
    name,
    group=None,
    seed=None,
    reference=False,
    spiking=True,
    tasks=(*SOURCE_TASKS, "sciq"),
    layers=4,
    levels=9,
    items=400,
    skill=0.2,
    rate=0.5,
    channels=False,
    joules=False,
):
    random = np.random.default_rng(list(name.encode()))
    found = {}
    for index, task in enumerate(tasks):
        difficulty = np.random.default_rng(index).normal(0, 1, items)
        found[task] = _task(task, random, skill + random.normal(0, 0.03), difficulty, spiking)
    rows = _layers(random, layers, levels, rate, channels) if spiking else {}
    spikes = {"mean_abs": rate, "nonzero_share": 0.8 * rate, "projections": rows}
    whole = set(SOURCE_TASKS) <= set(tasks)
    main = [found[task]["metrics"][found[task]["main"]]["value"] for task in SOURCE_TASKS if whole]
    loss = 3.2 - skill + random.normal(0, 0.02)
    perplexity = {
        corpus: {
            "perplexity": float(np.exp(loss)),
            "nll_per_token": loss,
            "bits_per_byte": loss / 3,
            "tokens": 51_100,
            "data": {"source": corpus, "documents": 77, "sha256": f"{corpus:0<64}"},
        }
        for corpus in ("wikipedia-leads", "state-of-the-union")
    }
    return {
        "name": name,
        "group": group or name,
        "seed": seed,
        "path": f"runs/{name}/model",
        "reference": reference,
        "neuron": "SILIFNode" if spiking else None,
        "levels": levels if spiking else None,
        "parameters": 128_989_632,
        "dtype": "float32",
        "weights_sha256": "ab" * 32,
        "tasks": found,
        "average": float(np.mean(main)) if whole else None,
        "perplexity": perplexity,
        "spikes": spikes if spiking else None,
        "energy": _energy(rows) if spiking else None,
        "joules": {"joules": 812.5, "per_token": {"prefill": 0.0031}, "counter": "NVML"} if joules else None,
    }


def evaluation_results(models, resamples=1000):
    provenance = {
        "command": "python recipes/evaluate/evaluate.py recipes/evaluate/tiny.yaml",
        "commit": "0123456789abcdef",
        "date": "2026-11-22T05:00:00+00:00",
        "hardware": {"device": "2 CPU threads", "cpu": "x86_64", "gpu": None},
        "versions": {"torch": "2.13.0", "lm-eval": "0.4.13"},
        "settings": {"tasks": list(SOURCE_TASKS), "limit": None},
    }
    return {
        "schema": "spiking_mamba/evaluation/1",
        "provenance": provenance,
        "models": models,
        "groups": groups(models),
        "gaps": gaps(models, resamples=resamples),
    }


def seeds(number, **fields):
    """A dense teacher and as many students that differ by the seed."""
    students = [
        evaluation_model(f"student-seed{seed}", "student", seed, **{"skill": 0.1} | fields)
        for seed in range(number)
    ]
    teacher = {"reference": True, "spiking": False, "skill": 0.3, "joules": False}
    return [evaluation_model("teacher", **fields | teacher), *students]
