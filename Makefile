# Each target makes .venv by itself. Python 3.11 or newer, make and pip are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU: huge pages and the memory-optimised scheduler are worth a quarter of a step, see benchmarks/RESULTS.md.
CPU := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
  XLA_FLAGS="--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED $(XLA_FLAGS)" \
  JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/xla
RUN ?= runs/demo
# TORCH=1 adds PyTorch, the oracle of some tests; they are skipped without it.
READY := $(VENV)/.ready-test$(if $(TORCH),-torch)

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.ready
	$(CPU) $(BIN)/python main.py --config=configs/unimiss_plus.py:phantom --workdir=$(RUN)

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-all: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lint: $(READY)
	$(BIN)/ruff check .

bench: $(READY)
	for b in drr input; do $(BIN)/python benchmarks/$$b.py; done

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
