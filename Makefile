# Everything runs in a virtual environment of its own; only Python 3.10+ and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
READY := $(VENV)/ready
FILES := $(VENV)/files
# The sources stay where they are, and the environment links to each file of the package: type checkers follow links.
INSTALL := $(BIN)/pip install --quiet --config-settings editable_mode=strict --editable

.PHONY: demo test lint docs bench record clean always

demo: $(INSTALLED)
	$(BIN)/finelip demo

test: $(READY)
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels -m triton

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml

# To site/index.html. The variable keeps out a notice of the theme's makers.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/pytest bench/ --benchmark-only

# Each file of benchmarks to bench/results/$(MACHINE)/, and the tables of all that was recorded.
record: $(READY)
	$(INSTALL) '.[peers]'
	mkdir -p bench/results/$(MACHINE)
	for path in bench/test_*.py; do \
		name=$$(basename $$path .py); \
		$(BIN)/pytest $$path --benchmark-only --benchmark-json=bench/results/$(MACHINE)/$${name#test_}.json || exit 1; \
	done
	$(BIN)/python bench/report.py

# Installed again when the requirements change, or the list of files to link. The demo needs no more than users do.
$(INSTALLED): pyproject.toml $(FILES)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(INSTALL) .
	touch $(INSTALLED)

$(READY): $(INSTALLED)
	$(INSTALL) '.[dev]'
	touch $(READY)

$(FILES): always
	@mkdir -p $(VENV)
	@find finelip_fast kernels training export -type f -not -name '*.pyc' | sort > $(FILES).new
	@cmp -s $(FILES).new $(FILES) || cp $(FILES).new $(FILES)

clean:
	rm -rf $(VENV) demo site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
