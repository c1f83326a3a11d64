# `make demo` trains a tagger on the embedded data set and tags a file with it; `make test` runs all tests.
# Both set up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/python recipes/AudioSet/train.py hparams/mini.yaml
	$(BIN)/psla-tag --model results/mini/1/tagger --top-k 3 $$(ls results/mini/data/audio/eval/*.flac | head -n 3)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov=psla_sb -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -e '.[test]'
	touch $@
