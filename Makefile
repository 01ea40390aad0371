# Each target makes .venv by itself. Python 3.11 or newer, make and pip are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# TORCH=1 adds PyTorch, the oracle of some tests; they are skipped without it.
READY := $(VENV)/.ready-test$(if $(TORCH),-torch)

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.ready
	set -a; . ./launch.env; $(BIN)/python main.py --config=configs/unimiss_plus.py:phantom --workdir=$(RUN)

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-all: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lint: $(READY)
	$(BIN)/ruff check .

# Half an hour on one core; TORCH=1 gives step and memory their peer.
bench: $(READY)
	for b in drr.py input.py "step.py --ops" step.py memory.py startup.py; do \
	  $(BIN)/python benchmarks/$$b || exit 1; done

clean:
	rm -rf $(VENV) .cache runs

$(VENV)/.ready: setup.py requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c requirements.lock -e .
	touch $@

$(READY): $(VENV)/.ready
	$(BIN)/python -m pip install -q -c requirements.lock -e ".[test]"
	$(if $(TORCH),$(BIN)/python -m pip install -q torch==2.13.0)
	touch $@
