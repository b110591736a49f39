# `make` lists the targets. Needs Python 3.11 to 3.13 and make, nothing else; GNU make 3.81 will do.

# PYTHON= picks the interpreter. Without it a finished .venv keeps the one it was made with.
ifeq ($(PYTHON),)
PYTHON := $(if $(wildcard .venv/installed),.venv/bin/python,python3)
endif
VENV := .venv/bin/python

# For `make lab`, as in LAB_ARGS="--no-browser --port 8899"; for train and evaluate, as in ARGS="--steps 500".
LAB_ARGS ?=
ARGS ?=
OUT ?=

# `make lab FRESH=1` opens copies of the lessons without outputs, which are yours: my_lessons/.
FRESH ?=
LESSON_00 := /lab/tree/$(if $(FRESH),my_lessons,notebooks)/00_start_here.ipynb

# Jupyter refuses to start as root, who is the only user of most containers.
ROOT_ARGS := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help lab test doctor setup gpu exercises grade bench train evaluate badges bench-gpu compile-table architecture clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

lab: setup ## set up, then open the course in JupyterLab; FRESH=1: in copies of the lessons without outputs
	@$(if $(FRESH),$(VENV) -m tools.fresh)
	@$(VENV) -m jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=$(LESSON_00) $(ROOT_ARGS) $(LAB_ARGS)

test: setup ## set up, then lint, type check, tests, and every notebook
	@$(VENV) -m tools.run_tests

doctor: setup ## what this machine can do, and which lessons run live on it
	@$(VENV) -m course.doctor

setup: ## .venv with everything installed; does nothing when it is up to date
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed, and '$(PYTHON)' is not one: install one and name it, as in: make lab PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) tools/setup_venv.py

gpu: setup ## flash-attn, on a machine with a CUDA device (optional; builds for several minutes)
	@$(VENV) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "No CUDA device here, and flash-attn needs one. The course works without it.")'
	$(VENV) -m pip install ninja packaging psutil setuptools wheel
	$(VENV) -m pip install --no-build-isolation flash-attn

exercises: setup ## exercises/, the students' notebooks, made anew from solutions/
	@$(VENV) -m grading.release

grade: setup ## grade SUBMISSIONS=folder (of a folder a student), or UNIT=02 of it; results in grades/
	@$(if $(SUBMISSIONS),,echo "Which? As in: make grade SUBMISSIONS=submitted" >&2; exit 2)
	@$(VENV) -m grading "$(SUBMISSIONS)" $(if $(UNIT),--unit "$(UNIT)") $(ARGS)

bench: setup ## generation on this machine's CPU, against its limits and transformers
	@$(VENV) -m benchmarks.decode_cpu $(ARGS)

train: setup ## train the checkpoint again (resumable)
	@$(VENV) -m minillm.train $(ARGS)

evaluate: setup ## measure the checkpoint's recall and abstention
	@$(VENV) -m minillm.evaluate $(ARGS)

badges: setup ## Open-in-Colab badges, once pyproject.toml has the repository's address
	@$(VENV) -m tools.badges

bench-gpu: ## every GPU kernel checked and timed, into OUT; on a GPU machine, with the Python it has (ARGS=--dry-run: on a CPU)
	@$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out "$(OUT)") $(ARGS)

compile-table: setup ## every kernel compiled for every GPU, without one: instructions, registers, spills, shared memory
	@$(VENV) -m kernels $(ARGS)

architecture: setup ## docs/architecture.svg, the picture of the imports between folders, and the same as a table
	@$(VENV) -m tools.architecture $(ARGS)

clean: ## remove .venv and caches; keeps your notebooks and runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find minillm kernels course grading tools benchmarks tests notebooks -name __pycache__ -prune -exec rm -rf {} +
