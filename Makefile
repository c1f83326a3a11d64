# `make demo` trains a tagger on the embedded data set and tags a file with it; `make test` runs all tests; `make coverage` also
# says which lines they run, and takes longer; `make test-slow` runs those that take minutes; `make test-gpu` those on a GPU;
# `make test-browser` those of the demo page, in Chromium.
# All set up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: demo test coverage test-slow test-gpu test-browser lint

demo: .venv/installed
	$(BIN)/python recipes/AudioSet/train.py hparams/mini.yaml
	$(BIN)/psla-tag --model results/mini/1/tagger --top-k 3 $$(ls results/mini/data/audio/eval/*.flac | head -n 3)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

coverage: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov=psla_sb -n 2 --dist loadfile

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2

test-gpu: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cuda tests/test_gpu.py

test-browser: .venv/installed
	@command -v chromium || { command -v apt-get > /dev/null && $(ROOT) apt-get update -q && \
		$(ROOT) apt-get install -y -q --no-install-recommends chromium; } || \
		{ echo "error: this needs the command chromium, and could not install Debian's package of that name"; exit 2; }
	$(BIN)/pip install --disable-pip-version-check -q -e '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/browser

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e '.[test]'
	touch $@
