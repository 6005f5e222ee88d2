# Everything runs in a virtual environment of its own; only Python 3.10+ and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
READY := $(VENV)/ready

.PHONY: demo test lint docs bench record clean

demo: $(INSTALLED)
	$(BIN)/finelip demo

test: $(READY)
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels -m triton

# Types are checked where the folders lie as a wheel has them, by links.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/finelip_fast
	ln -sfn $(CURDIR)/finelip_fast/* $(addprefix $(CURDIR)/,kernels training export) build/types/finelip_fast/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# To site/index.html. The variable keeps out a notice of the theme's makers.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/pytest bench/ --benchmark-only

# Each file of benchmarks to bench/results/$(MACHINE)/, and the tables of all that was recorded.
record: $(READY)
	$(BIN)/pip install --quiet --editable '.[peers]'
	mkdir -p bench/results/$(MACHINE)
	for path in bench/test_*.py; do \
		name=$$(basename $$path .py); \
		$(BIN)/pytest $$path --benchmark-only --benchmark-json=bench/results/$(MACHINE)/$${name#test_}.json || exit 1; \
	done
	$(BIN)/python bench/report.py

# Installed again when the requirements change; the package itself is installed in place. The demo needs no more than users do.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $(INSTALLED)

$(READY): $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
