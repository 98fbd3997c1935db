# llamalet's everyday commands; `make` alone lists them.
# Each sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help demo demo-lite test test-fast test-bounds test-arm torture fuzz lint bench clean

help:  ## list these targets
	@echo "llamalet: small Llama models, from data to story"
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/' | expand -t 20

demo: .venv/train  ## write a corpus, train a small model, export it, prove it, tell a story (minutes, offline)
	$(RUN) tinystories.py synthesize --seed=1
	$(RUN) tinystories.py train-vocab --source=synthetic --vocab-size=2048
	$(RUN) tinystories.py pretokenize --source=synthetic
	$(RUN) train.py configs/demo.toml --overwrite
	$(RUN) -m parity.demo out/demo

demo-lite: .venv-lite/lite  ## the same without PyTorch, in an environment of its own (minutes, offline)
	.venv-lite/bin/python tinystories.py synthesize --seed=1
	.venv-lite/bin/python tinystories.py train-vocab --source=synthetic --vocab-size=2048
	.venv-lite/bin/python tinystories.py pretokenize --source=synthetic
	.venv-lite/bin/python train.py configs/demo.toml --out_dir=out/demo-lite --overwrite
	.venv-lite/bin/python -m parity.demo out/demo-lite

# In two processes, because the tests spend half of their time waiting.
test: .venv/dev  ## run every test (offline, CPU, minutes)
	$(RUN) -m pytest --numprocesses=2 --dist=worksteal

test-fast: .venv/dev  ## run all tests but those that train, compile or take seconds (a minute)
	$(RUN) -m pytest --numprocesses=2 --dist=worksteal -m "not trains and not compiles and not slow"

test-bounds: .venv/dev  ## run the runtime's tests with every index of the kernels checked
	NUMBA_BOUNDSCHECK=1 $(RUN) -m pytest tests/llamalet/kernels tests/parity \
	    tests/llamalet/test_generate.py tests/llamalet/test_evaluate.py

test-arm: .venv/dev  ## run the runtime's tests as 64-bit Arm code under qemu (half an hour; Debian)
	$(RUN) tests/on_arm.py $(ARGS)

torture: .venv/dev  ## kill, fill, flip and interrupt runs by the hundred (an hour), for benchmarks/torture.log
	$(RUN) -m pytest --torture --torture-log=benchmarks/torture.log $(ARGS)

fuzz: .venv/dev  ## damage files of every format in 350,000 ways (half an hour), for benchmarks/fuzz.log
	PYTHONPATH=tests:. $(RUN) -m fuzz.campaign --log=benchmarks/fuzz.log $(ARGS)

lint: .venv/dev  ## check style (ruff), types (mypy) and which room imports which (import-linter)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/train  ## measure the runtime's speed on this machine
	$(RUN) -m benchmarks.runtime $(ARGS)

clean:  ## remove what the commands made, all but .venv, data/ and out/
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

# Two sets of packages, each installed once and again when the lists change.
.venv/train: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "installing the packages of constraints.txt into .venv (PyTorch is large: this takes minutes)"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,serve]"
	@touch $@

.venv-lite/lite: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "installing numpy, numba, sentencepiece and tqdm into .venv-lite"
	$(PYTHON) -m venv .venv-lite
	.venv-lite/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lite]"
	@touch $@

.venv/dev: .venv/train
	@echo "installing the packages for tests and checks"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,hub,serve,dev]"
	@touch $@
