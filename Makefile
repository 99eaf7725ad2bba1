# Everything runs in a virtual environment in this folder; each target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The release that the tests run with. spikingjelly comes without its dependencies: it asks for torchvision
# and torchaudio, several gigabytes that nothing here uses.
TORCH ?= torch==2.13.0

.PHONY: help test test-gpu lint quickstart gpu clean

help:
	@echo "make quickstart   distil a spiking Mamba2 on real text and report (under 10 minutes, no GPU needed)"
	@echo "make test         lint, types, and all tests that need no GPU"
	@echo "make test-gpu     the tests that need an NVIDIA GPU"
	@echo "make gpu          add mamba-ssm's and causal-conv1d's kernels to the current environment"

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  e = p["optional-dependencies"]; names = p["dependencies"] + e["recipes"] + e["dev"]; \
	  print(*[n for n in names if not n.startswith("spikingjelly")], sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet "$(TORCH)" -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps spikingjelly==2.0.0 loguru
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

quickstart: $(BIN)/.ready
	$(BIN)/python recipes/quickstart/quickstart.py recipes/quickstart/quickstart.yaml $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-gpu: $(BIN)/.ready
	$(BIN)/python -m pytest tests/gpu $(ARGS)

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	sh recipes/install_gpu.sh

clean:
	rm -rf $(VENV) build dist *.egg-info
