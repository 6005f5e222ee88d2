# Everything runs in a virtual environment of its own; only Python 3.10+ and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
READY := $(VENV)/ready

.PHONY: demo test lint stubs docs bench record ring clean

demo: $(INSTALLED)
	$(BIN)/finelip demo

test: stubs
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels -m triton

# Mypy would take the package of the folder where it runs, which lacks those that lie beside it.
lint: stubs
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
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

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

# Peers, to bench/results/$(MACHINE)/. Packages that need an environment of their own: RING="--python fast-plaid=PATH".
ring: $(READY)
	$(BIN)/pip install --quiet --editable '.[peers]'
	for items in 20000 200000; do \
		$(BIN)/python bench/ring.py --items $$items --out bench/results/$(MACHINE)/ring.json $(RING) || exit 1; \
	done
	$(BIN)/python bench/ring_encoding.py --out bench/results/$(MACHINE)/encoding.json $(RING)
	$(BIN)/python bench/report.py

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

clean:
	rm -rf $(VENV) demo site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
