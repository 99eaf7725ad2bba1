"""Pushes a folder to the hub that HF_ENDPOINT names, and loads it from there: FOLDER REPOSITORY OUTPUT.pt"""

import sys

import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import spiking_mamba  # noqa: F401, makes it known to the Auto classes


def main(folder, repository, output):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.push_to_hub(repository, token="secret")
    tokenizer.push_to_hub(repository, token="secret")
    ModelCard.load(f"{folder}/README.md").push_to_hub(repository, token="secret")
    again = AutoModelForCausalLM.from_pretrained(repository)
    ids = AutoTokenizer.from_pretrained(repository)("a cat met a dog", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = {"ids": ids, "logits": again(ids).logits, "card": ModelCard.load(repository).data.to_dict()}
    torch.save(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
