# Everything runs in .venv, which `setup` makes. COMFYUI_PATH=<checkout> uses your own ComfyUI.
PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
WORKERS ?= 2
THREADS ?= 1
PYTEST = OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: help setup demo comfyui bench test test-all test-isa style quality clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup:  ## .venv with pinned requirements, a ComfyUI in .cache; at once where done
	@$(PYTHON) -m dev.setup

demo: setup  ## the tiny world, unprotected and protected, in a real ComfyUI
	@$(BIN)/python -m dev.demo

comfyui: setup  ## a ComfyUI with this pack in your browser, until Ctrl+C
	@$(BIN)/python -m dev.open_comfyui

bench: setup  ## what protection costs on this machine, in runs/bench (BENCH_ARGS="--resolution 512")
	@$(BIN)/saferope bench $(BENCH_ARGS)

test: setup  ## all tests but the slow ones, two at a time (PYTEST_ARGS="-k rotation" for some)
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: setup  ## the slow tests too
	@$(PYTEST) $(PYTEST_ARGS)

# As ATen, oneDNN and MKL name them: a CPU of 2010, one with AVX2, one with AVX-512 but without bf16
ISAS := default,SSE41,SSE4_2 avx2,AVX2,AVX2 avx512,AVX512_CORE,AVX512

test-isa: setup  ## `test` as on three kinds of CPU, one after the other (THREADS=2 for another order of sums)
	@for isa in $(ISAS); do set -- $$(echo $$isa | tr , ' '); echo "== $$isa"; \
	  ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3 $(MAKE) test || exit 1; done

style: setup  ## fix and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

quality: setup  ## ruff, mypy and plain words, without changing anything
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m dev.words
	@$(BIN)/python -m dev.pages --check

clean:  ## remove what set-up, builds and tests made
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
