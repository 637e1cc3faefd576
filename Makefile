# One way in. `make` alone lists the targets; everything runs from .venv in this directory.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster test-cuda-build nightly bench bench-trl lint format sft grpo eval

# What .venv was made for; for a new one cuda where nvidia-smi works, else cpu. Demo and tests are for the CPU.
DEVICE := $(or $(DEVICE),$(shell cat .venv/.device 2>/dev/null),$(if $(filter demo test test-cluster nightly,$(MAKECMDGOALS)),cpu),$(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu))
# Index that torch alone is installed from; empty: wherever your pip is configured to look
TORCH_INDEX ?=
# the same for the CUDA build of `make test-cuda-build`
CUDA_INDEX ?=
PYTHON ?=
NODES ?=
WAIT ?=
ARGS ?=
SMOKE ?=
OUTPUT ?=
# PLOT=1: `make bench` also measures how an update grows, and draws it
PLOT ?=
SMOKED := $(filter-out 0,$(SMOKE))
# CHROMIUM=1: `make test` also looks at the report and the server's page in Chromium, which must be installed
CHROMIUM ?=
TESTED := -m "not nightly$(if $(filter-out 0,$(CHROMIUM)),, and not browser)"
export DEVICE TORCH_INDEX PYTHON

RUN := .venv/bin/tatar-dist
BENCHES := learner rollout sync reward data scaling
# with NODES: Slurm, an existing Ray cluster, or a development cluster here
SUBMIT = .venv/bin/python launch/submit.py $@ $(NODES) $(if $(filter-out 0,$(WAIT)),--wait)

# After a pytest: a failure is remembered and what follows runs all the same, but not after Ctrl-C (2). 5 is none where
# ARGS choose none of its tests.
REMEMBER = || { status=$$?; [ $$status != 2 ] || exit 2; $(if $(ARGS),[ $$status = 5 ] ||) bad=1; }

help:
	@echo "make setup [DEVICE=cpu|cuda] [TORCH_INDEX=…]  create .venv with everything in it (here: DEVICE=$(DEVICE))"
	@echo "make demo [SMOKE=1] [OUTPUT=…] [ARGS=\"k=v …\"] data, SFT, GRPO, evaluation and report of a tiny model on this CPU"
	@echo "make test [CHROMIUM=1]                         unit and integration tests on real Ray, vLLM and DeepSpeed"
	@echo "make lint | format                            ruff, mypy, import contracts | rewrite the formatting"
	@echo "make test-cluster                             hosts as namespaces, Slurm, faults; as root, after .ci/packages"
	@echo "make test-cuda-build                          torch, vLLM and DeepSpeed for CUDA without a GPU, in a .venv-cuda (10 GB)"
	@echo "make sft|grpo|eval [NODES=n] [ARGS=\"k=v …\"]   the recipe of configs/*.yaml; ARGS=--dry-run prints what would run"
	@echo "                                              with n: by sbatch (WAIT=1 stays with it), to RAY_ADDRESS, or on n Ray nodes here"
	@echo "make nightly                                  demo and probes with three seeds, mutations, benches: the figures of the pages"
	@echo "make bench                                    timings beside baselines and limits, as one table"
	@echo "make bench-trl                                a GRPO step beside TRL's, in a .venv-trl of its own"

setup:
	@bash launch/setup.sh

demo: setup
	@$(RUN) demo --output $(or $(OUTPUT),runs/demo$(if $(SMOKED),-smoke)) $(if $(SMOKED),--smoke) $(ARGS)

test: setup
	@bad=0; \
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadgroup $(TESTED) tests/unit $(ARGS) $(REMEMBER); \
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --maxprocesses 2 tests/device $(ARGS) $(REMEMBER); \
	.venv/bin/python -m pytest -n logical --maxprocesses 2 --dist loadgroup --no-loadscope-reorder $(TESTED) tests/integration $(ARGS) $(REMEMBER); \
	exit $$bad

test-cluster: setup
	@.venv/bin/python -m pytest -m "not nightly" tests/cluster $(ARGS)

test-cuda-build:
	@DEVICE=cuda TORCH_INDEX=$(CUDA_INDEX) bash launch/setup.sh .venv-cuda
	@bad=0; \
	OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest -n logical --maxprocesses 2 tests/device $(ARGS) $(REMEMBER); \
	OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest -n logical --maxprocesses 2 --dist loadfile tests/cuda_build $(ARGS) $(REMEMBER); \
	exit $$bad

nightly: setup
	@$(RUN) demo --output runs/nightly --seeds 3 $(ARGS)
	@$(RUN) probes --output runs/probes --seeds 3 $(ARGS)
	@.venv/bin/python tests/mutations.py
	@FUZZ_EXAMPLES=100000 .venv/bin/python -m pytest --timeout 3600 $$(grep -l FUZZ_EXAMPLES tests/unit/test_*.py)
	@SURVEY=all MUTATED=10000 .venv/bin/python -m pytest --timeout 7200 tests/unit/test_exits.py tests/unit/test_mutated.py
	@.venv/bin/python -m pytest -m nightly tests/unit tests/integration
	@PRETENDED_GPUS=all .venv/bin/python -m pytest tests/integration/test_pretended_gpus.py
	@SHARDS=all .venv/bin/python -m pytest tests/integration/test_shards.py
	@DEVICE_LAYERS=all .venv/bin/python -m pytest --timeout 3600 -s tests/device/test_memory.py
	@EXPORT_IMAGES=25 .venv/bin/python -m pytest --timeout 3600 tests/integration/test_export.py
	@.venv/bin/python -m pytest -m nightly tests/cluster
	@.venv/bin/python tests/cluster/chaos.py --minutes 30 --seed 30 --output runs/chaos
	@.venv/bin/python tests/cluster/chaos.py --minutes 20 --every 120 --seed 7 --output runs/chaos-120
	@bad=0; $(MAKE) test-cuda-build ARGS= || bad=1; \
	$(MAKE) bench PLOT=1 BENCHES="$(BENCHES) overlap staleness simulate" || bad=1; $(MAKE) bench-trl || bad=1; exit $$bad

# each into build/bench/NAME.json, then a table of all that are there; status 1, after the table, if one failed or missed a target
bench: setup
	@mkdir -p build/bench; bad=0; for name in $(BENCHES); do \
	    file=build/bench/$$name; echo "bench $$name"; \
	    $(RUN) bench $$name --json $(if $(filter-out 0,$(PLOT)),$$([ $$name != learner ] || echo --plot $$file.svg)) > $$file.json || bad=1; [ -s $$file.json ] || rm $$file.json; done; \
	$(RUN) bench table build/bench/*.json; exit $$bad

bench-trl: setup
	@bash launch/setup_trl.sh
	@$(MAKE) bench BENCHES=step

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo

format: setup
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

sft grpo eval: setup
	@$(if $(NODES),$(SUBMIT),$(RUN) $(@:eval=evaluate)) --config configs/$@.yaml $(ARGS)
