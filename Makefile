# Everything runs in a virtual environment of its own; only Python 3.10+ and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
READY := $(VENV)/ready
# Files of tests run side by side; the tests of a file, which share models and servers, in one process.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: help demo test lint stubs docs bench record ring named clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## set up, and search 400 drawn scenes with the bundled model
	$(BIN)/finelip demo

test: stubs ## set up, and run the tests
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels -m triton

# Mypy would take the package of the folder where it runs, which lacks those that lie beside it.
lint: stubs ## set up, and check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache
	$(BIN)/pyright --pythonpath $(BIN)/python

# Type checkers do not follow pip to a package installed in place; they follow a stub package, here links in a wheel's layout.
stubs: $(READY)
	folder=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/finelip_fast-stubs && \
	mkdir -p $$folder && \
	ln -sfn $(CURDIR)/finelip_fast/* $(addprefix $(CURDIR)/,kernels training export) $$folder/ && \
	ln -sfn $(CURDIR)/finelip_fast/__init__.py $$folder/__init__.pyi

# To site/index.html. The variable keeps out a notice of the theme's makers.
docs: $(READY) ## build the site, site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY) ## run the benchmarks
	$(BIN)/pytest bench/ --benchmark-only

# Each file of benchmarks to bench/results/$(MACHINE)/, and the tables of all that was recorded.
record: named $(READY) ## run the benchmarks, and keep the results: make record MACHINE=NAME
	$(BIN)/pip install --quiet --editable '.[peers]'
	mkdir -p bench/results/$(MACHINE)
	for path in bench/test_*.py; do \
		name=$$(basename $$path .py); \
		$(BIN)/pytest $$path --benchmark-only --benchmark-json=bench/results/$(MACHINE)/$${name#test_}.json || exit 1; \
	done
	$(BIN)/python bench/report.py

# Peers, to bench/results/$(MACHINE)/. Packages that need an environment of their own: RING="--python fast-plaid=PATH".
ring: named $(READY) ## race other packages, and keep the results: make ring MACHINE=NAME
	$(BIN)/pip install --quiet --editable '.[peers]'
	for items in 20000 200000; do \
		$(BIN)/python bench/ring.py --items $$items --out bench/results/$(MACHINE)/ring.json $(RING) || exit 1; \
	done
	$(BIN)/python bench/ring_encoding.py --out bench/results/$(MACHINE)/encoding.json $(RING)
	$(BIN)/python bench/report.py

named:
	@test -n "$(MACHINE)" || { echo "error: expected MACHINE=NAME, the folder of the results in bench/results" >&2; exit 2; }

# Installed again when the requirements change; the package itself is installed in place. The demo ends by naming a server.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[serve]'
	touch $(INSTALLED)

$(READY): $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(READY)

clean: ## remove the environment and everything built
	rm -rf $(VENV) demo site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
