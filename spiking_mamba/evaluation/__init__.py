"""How good models are: zero-shot tasks, perplexity, statistics.

evaluate(EvaluationSettings(models=["runs/quickstart/student/model"], limit=100))  # results.json, see README

tasks = zero_shot_tasks(["piqa", "arc_easy"])  # of a model in memory
zero_shot(model, tokenizer, tasks)["piqa"]["acc"]
perplexity(model, rows)["perplexity"]
"""

from spiking_mamba.common.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "EvaluationSettings": "settings",
        "evaluate": "evaluator",
        "perplexity": "scoring",
        "weights_sha256": "evaluator",
        "zero_shot": "scoring",
        "zero_shot_tasks": "tasks",
    },
)
