# Everything runs in a virtual environment in this folder; each target sets up what it needs, from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# What `make lock` keeps behind the newest release, which the newest edge tests; torchvision goes with its torch.
HELD := torch==2.14.1 torchvision==0.29.1
# uv writes the lock and makes the edges, from an environment of its own: the lock may be what is broken.
UV := .venv-uv/bin/uv
# Processes that share the tests, a file at a time and one thread each; WORKERS=0: none but pytest's own.
WORKERS ?= 2
# `make test-edges EDGES=lowest` runs one of them.
EDGES ?= lowest newest
# What touches the interfaces of torch, transformers, spikingjelly, datasets, lm-eval and trl, and each recipe once.
EDGE_TESTS ?= tests/neurons $(addprefix tests/spiking_mamba/, \
  model evaluation/test_harness.py spikes/test_counting.py \
  $(addprefix training/test_, distillation.py head_loss.py preference.py pretraining.py)) \
  $(addprefix tests/recipes/test_, \
  recipes.py::test_teacher_and_student_load_with_the_auto_classes recipes.py::test_quickstart \
  distill_at_scale.py::test_two_processes_train_as_one_and_resume evaluate.py::test_results rl.py::test_the_results \
  rl.py::test_two_processes_train_as_one shipped_student.py)

.PHONY: help test storm test-gpu test-edges lint lock quickstart gpu docs notebook clean

help:
	@echo "make quickstart   distil a spiking Mamba2 on real text and report (minutes on a CPU, no GPU needed)"
	@echo "make test         lint, types, and all tests that need no GPU"
	@echo "make storm        thousands of wrong settings, and kills at hundreds of moments: nothing may be lost"
	@echo "make test-gpu     the tests that need an NVIDIA GPU"
	@echo "make test-edges   the oldest and the newest releases that pyproject.toml allows"
	@echo "make gpu          add mamba-ssm's and causal-conv1d's kernels to the current environment"
	@echo "make docs         the documentation as a site in site/, every link checked"
	@echo "make notebook     run the documentation's notebook, and keep what it printed and drew"
	@echo "make lock         renew constraints.txt, the versions that everything here is installed in"

# spikingjelly comes without its dependencies: it asks for torchvision and torchaudio, which nothing here uses.
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  e = p["optional-dependencies"]; names = p["dependencies"] + e["recipes"] + e["dev"]; \
	  print(*[n for n in names if not n.startswith("spikingjelly")], sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps spikingjelly loguru
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

quickstart: $(BIN)/.ready
	$(BIN)/python recipes/quickstart/quickstart.py recipes/quickstart/quickstart.yaml $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

storm: $(BIN)/.ready
	$(BIN)/python tests/storm/settings.py $(ARGS)
	$(BIN)/python tests/storm/kills.py $(ARGS)

test-gpu: $(BIN)/.ready
	$(BIN)/python -m pytest tests/gpu $(ARGS)

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	sh recipes/install_gpu.sh

# The site imports nothing of the project: an environment of its own, made in seconds.
.venv-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet -c constraints.txt -r .venv-docs/requirements.txt
	touch $@

docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict $(ARGS)

notebook: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt nbclient ipykernel
	$(BIN)/python docs/fill_notebook.py docs/notebooks/student.ipynb

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv==0.13.9

lock: $(UV)
	printf '%s\n' $(HELD) > .venv-uv/held.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --upgrade --all-extras \
	  --constraints .venv-uv/held.txt --no-annotate --custom-compile-command "make lock" -o constraints.txt pyproject.toml

test-edges: $(EDGES:%=edge-%)

edge-%: .venv-%/.edge
	.venv-$*/bin/python -m pytest $(EDGE_TESTS) $(ARGS)

.PRECIOUS: .venv-%/.edge
RESOLUTION_lowest := lowest-direct
RESOLUTION_newest := highest
.venv-%/.edge: pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv-$*
	printf '%s ; python_version < "3"\n' torchvision torchaudio > .venv-$*/left-out.txt
	$(UV) pip install --quiet --python .venv-$* --resolution $(RESOLUTION_$*) --overrides .venv-$*/left-out.txt \
	  -r pyproject.toml --extra recipes --extra dev
	$(UV) pip install --quiet --python .venv-$* --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) .venv-uv .venv-docs .venv-lowest .venv-newest build dist site *.egg-info
