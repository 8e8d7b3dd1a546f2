# Each target sets up what it needs; a second run starts at once.

PYTHON_IN_VENV := .venv/bin/python
PACKAGES := $(wildcard configs data_pipeline pretrain finetune slurm benchmarks)

# MuJoCo without a display. OSMesa where the system has it, else EGL, which draws the same pixels.
export MUJOCO_GL ?= $(shell { ldconfig -p 2>/dev/null || /sbin/ldconfig -p; } | grep -q OSMesa && echo osmesa || echo egl)
# Mesa's software renderer takes every core for itself unless told otherwise.
export LP_NUM_THREADS ?= 1

.PHONY: help
help:
	@echo "make demo             recordings -> world model -> policy, all on this machine; ends in runs/demo/report.html"
	@echo "make demo DATA=PATH   the same chain on your own LeRobot dataset"
	@echo "make test             the test suite, in under ten minutes (ARGS='-k loader' for a part)"
	@echo "make test-slow        the rest of it: kills, whole chains, a real SLURM"
	@echo "make lint             style and types"
	@echo "make setup            only install: Debian libraries and .venv"

.PHONY: demo
demo: .venv/.ready
	$(PYTHON_IN_VENV) -m finetune.demo $(if $(DATA),--data "$(DATA)") $(ARGS)

# A test file per core, all its tests on one: they share what is slow to make. Many start processes of their own.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON_IN_VENV) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: test
test: .venv/.ready
	$(PYTEST) -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: .venv/.ready
	$(PYTEST) -m slow $(ARGS)

.PHONY: lint
lint: .venv/.ready
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy $(PACKAGES)

.PHONY: setup
setup: .venv/.ready
	@echo ".venv is ready"

.venv/.ready: pyproject.toml constraints.txt setup.sh
	./setup.sh
