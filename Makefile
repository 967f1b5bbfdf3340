# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip
# Tests are mostly compilations, each of one thread. Idle threads of one process must not spin while the other works.
WORKERS ?= 2
PYTEST = OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal
SOURCES = skipc passes runtime kernels tests benchmarks examples

.PHONY: help demo test test-all check format bench bench-grid clean

help:
	@echo "make demo      install, then run SmolLM2 under Inductor and under skipc (about 5 minutes on 2 cores)"
	@echo "make test      install, then run the test suite (30 to 50 minutes on 2 cores)"
	@echo "make test-all  the same with the long sweeps"
	@echo "make check     format, lint and types (on an installed wheel)"
	@echo "make bench     first call and skipping, side by side with Inductor (about 10 minutes)"
	@echo "make bench-grid  decode, prefill and greedy tokens over the whole grid of peers (hours; goes on where it stopped)"

# One environment for all targets, made again when the project's requirements change.
$(VENV)/.installed: pyproject.toml
	@echo "==> making a virtual environment in $(VENV) and installing skipc with its test and demo requirements"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --no-compile --disable-pip-version-check 'setuptools>=77' wheel
	@echo "==> installing (torch's CPU build is about 200 MB) ..."
	$(PIP) install --no-compile --disable-pip-version-check --progress-bar on -e '.[hf,report,dev]'
	@touch $@

demo: $(VENV)/.installed
	@echo "==> running the demo; its picture and figures go to skipc-out/"
	$(VENV)/bin/skipc demo --out skipc-out

test: $(VENV)/.installed
	@echo "==> running the test suite (long sweeps left out: make test-all)"
	$(PYTEST) -m 'not slow' -q

test-all: $(VENV)/.installed
	@echo "==> running the test suite with the long sweeps"
	$(PYTEST) -q

check: $(VENV)/.installed
	@echo "==> format and lint"
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	@echo "==> types, on an installed wheel (mypy does not follow the editable mapping)"
	@rm -rf build/wheel build/types
	@$(PIP) wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel .
	@$(PIP) install --quiet --disable-pip-version-check --no-deps --no-compile --target build/types build/wheel/skipc-*.whl
	cd build/types && MYPYPATH=. ../../$(VENV)/bin/python -m mypy --config-file ../../pyproject.toml -p skipc

format: $(VENV)/.installed
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

bench: $(VENV)/.installed
	@mkdir -p skipc-out
	$(VENV)/bin/python benchmarks/first_call.py --json skipc-out/first_call.json
	$(VENV)/bin/python benchmarks/decode_step.py --json skipc-out/decode_step.json

bench-grid: $(VENV)/.installed
	@mkdir -p skipc-out
	$(VENV)/bin/python benchmarks/decode.py --memory --json skipc-out/decode.json --plot skipc-out/decode.png
	$(VENV)/bin/python benchmarks/prefill.py --memory --json skipc-out/prefill.json --plot skipc-out/prefill.png
	$(VENV)/bin/python benchmarks/tokens.py --json skipc-out/tokens.json

clean:
	rm -rf $(VENV) build dist skipc-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
