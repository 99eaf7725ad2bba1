"""A process in which this project cannot be imported: loads a folder with its code, and scores by lm-eval.

python tests/helpers/remote_process.py FOLDER ROWS.json OUTPUT.pt
"""

import json
import sys
from importlib.abc import MetaPathFinder

HIDDEN = {"spiking_mamba", "neurons", "tests"}


class Hide(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
        return None


def task(rows):
    """A task of lm-eval on rows of its own, with no hub."""
    return {
        "task": "endings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": rows}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }


def likelihoods(results):
    """The log-likelihood of every choice of every row."""
    samples = sorted(results["samples"]["endings"], key=lambda sample: sample["doc_id"])
    return [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]


def main(folder, rows, output):
    sys.meta_path.insert(0, Hide())
    import lm_eval
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found = {"logits": model(ids).logits}
    found["text"] = model.generate(ids[:, :5], max_new_tokens=5, do_sample=False)
    model.save_pretrained(f"{folder}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}-again", trust_remote_code=True).eval()
    with torch.no_grad():
        found["again"] = again(ids).logits
    found["loss"] = model.train()(ids, labels=ids).loss
    found["loss"].backward()
    found["gradient"] = model.backbone.layers[0].mixer.in_proj.weight.grad
    found["loss"] = found["loss"].detach()
    scorer = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    found["scores"] = scorer(ids).logits.shape

    arguments = {"pretrained": folder, "trust_remote_code": True, "device": "cpu", "dtype": "float32"}
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=[task(rows)],
        batch_size=4,
        log_samples=True,
        bootstrap_iters=0,
    )
    found["likelihoods"] = likelihoods(results)
    assert not any(name.split(".")[0] in HIDDEN for name in sys.modules), "something was imported"
    torch.save(found, output)
    print(json.dumps(results["results"]["endings"]["acc,none"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
