# The whole ritual. On a machine with Python 3.11 or newer, make and git, `make demo` and `make test` do all set-up themselves.
#   make PYTHON=python3.12 ...           another interpreter
#   make EXTRAS=export,cpu,evaluate,dev ...       other extras (default: gpu in place of cpu where nvidia-smi is found)
#   make test ARGS='-x --lf'             arguments for pytest
#   make test WORKERS=8                  processes that share the tests (default: 2)

PYTHON ?= python3
EXTRAS ?=
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FIXTURE := tests/fixtures/hybrid-a
# Libraries are installed without compiled files: what is imported is compiled then, and kept, or every process would do so again.
unexport PYTHONDONTWRITEBYTECODE
# A file of tests stays in one process: what its tests share is made once. Files come in the order that tests/conftest.py gives them.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install lint format types test test-trained test-engines test-browser test-long test-all test-quick test-times test-wheel mutants kernels test-gpu gpu-pack gpu-first-hour gpu-page fp16-check quantization-tables quantize-real wheel demo mid bench bench-real house-numbers bench-auto bench-experts bench-weights engines-published engines-inside engines-boundary tiny browser docs clean ci faults soak

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## everything into .venv (repeated only when pyproject.toml changes)

$(STAMP): pyproject.toml tools/install.py
	@command -v $(PYTHON) > /dev/null || { echo "error: there is no '$(PYTHON)' here; name a Python >= 3.11 with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) tools/install.py --venv $(VENV) $(if $(EXTRAS),--extras $(EXTRAS))
	@touch $@

lint: $(STAMP) ## style, format and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYTHONPATH=src $(BIN)/lint-imports

format: $(STAMP) ## mends what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

test: $(STAMP) ## the tests of everything that needs neither a GPU nor what the next five targets are for: below five minutes
	$(PYTEST) -m "not (trained or wheel or browser or kernels or (trt_rtx and slow))" --cpu-limit 20 $(ARGS)

test-trained: $(STAMP) ## the tests that take tens of seconds: the trained model quantized, tuned, by lm-evaluation-harness; other tools
	$(PYTEST) -m trained $(ARGS)

test-engines: $(STAMP) ## the tests that build engines with TensorRT for RTX; no GPU
	$(PYTEST) -m "trt_rtx and slow" $(ARGS)

test-browser: $(STAMP) ## the tests that open the pages; skipped without Chromium, which `make browser` installs
	$(PYTEST) -m browser $(ARGS)

test-long: $(STAMP) ## the last three in one run, whose processes then have less to wait for
	$(PYTEST) -m "trained or browser or (trt_rtx and slow)" $(ARGS)

test-all: $(STAMP) ## `make test` and `make test-long` in one run, likewise: what `.ci/run` runs
	$(PYTEST) -m "not (wheel or kernels) or trained or browser or (trt_rtx and slow)" --cpu-limit 20 $(ARGS)

test-quick: $(STAMP) ## the tests without the mark `slow` or another of those that take long: below two minutes
	$(PYTEST) -m "not (slow or trained or wheel or browser or kernels)" $(ARGS)

test-times: $(STAMP) ## the same one after another; fails where one takes more than 2 s of a processor
	$(BIN)/python -m pytest -m "not (slow or trained or wheel or browser or kernels)" --cpu-limit 2 $(ARGS)

test-wheel: $(STAMP) ## the wheel with each of its extras in an environment of its own: every verb works, or names the extra it needs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m wheel tests/wheel tests/test_packaging.py $(ARGS)

mutants: $(STAMP) ## one operator or number of a pure module changed at a time: which changes no test notices; half an hour
	$(BIN)/python -m tools.mutants $(ARGS)

faults: $(STAMP) ## kills, broken disks and flipped bits, hundreds of each, and what did not hold; needs a C compiler; half an hour
	$(BIN)/python -m tools.faults $(ARGS)

soak: $(STAMP) ## 10,000 requests of mixed kinds from eight threads: memory stays, and every text is right
	$(BIN)/python -m tools.faults.soak $(ARGS)

kernels: $(STAMP) ## expert kernels in Triton's interpreter, and compiled for every GPU and format; no GPU
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m kernels tests/kernels $(ARGS)

test-gpu: $(STAMP) ## the tests that need a GPU; fails without one, skips a library that is missing unless REQUIRE names it (REQUIRE=gpu,trt)
	TWOTOWER_REQUIRE=$(or $(REQUIRE),gpu) $(BIN)/python -m pytest -m gpu $(ARGS)

gpu-pack: $(STAMP) ## on any machine: what a bare GPU machine without a network needs, in parts below 60 MB, into out/gpu-pack
	PYTHONPATH=src $(BIN)/python -m tools.gpu.pack $(ARGS)

gpu-first-hour: ## on a machine with a GPU: independent questions, an archive of answers, and docs/gpu/<device>.md; with a pack it needs no .venv
	PYTHONPATH=src $(or $(wildcard $(BIN)/python),$(PYTHON)) -m tools.gpu.first_hour $(ARGS)

gpu-page: $(STAMP) ## docs/gpu/<device>.md from results that came home: make gpu-page ARGS="A/results.json B/results.json"
	PYTHONPATH=src $(BIN)/python -m tools.gpu.page $(ARGS)

fp16-check: $(STAMP) ## tokens of the small model with every result rounded to float16, against float32; under a minute, no GPU
	$(BIN)/python -m tools.fp16_check $(ARGS)

quantization-tables: $(STAMP) ## the tables and the picture of docs/measurements/quantization.md, measured: ten minutes, no GPU
	$(BIN)/python tools/quantization_tables.py $(ARGS)

quantize-real: $(STAMP) ## one expert layer at published widths through every format: seconds, memory, error; five minutes, 4 GB of disk
	$(BIN)/python tools/quantize_real.py --output docs/measurements/quantization.md $(ARGS)

wheel: $(STAMP) ## dist/: sdist, and the wheel built from it
	rm -rf dist
	$(BIN)/python -m build --no-isolation

demo: $(STAMP) ## checkpoint -> graphs -> engines -> tokens on a toy model, in both modes
	$(BIN)/python tools/demo.py

bench: out/bench ## time and memory of export and generation on the toy model
	$(BIN)/twotower bench $<

bench-real: $(STAMP) ## the same of an export at published widths: 8 GB of weights, verified, some minutes
	$(BIN)/twotower bench --real-widths --scratch .

mid: $(STAMP) ## out/mid-checkpoint and out/mid: a model of middle size with random weights and 64 experts, for speed on a CPU
	$(BIN)/python tools/mid.py

out/bench: $(STAMP)
	rm -rf $@
	$(BIN)/twotower export $(FIXTURE) -o $@
	$(BIN)/twotower build $@ --target ort-cpu

bench-experts: $(STAMP) ## a layer of experts of published width on this CPU, in float32 and in 4 bits: two minutes, 8 GB of memory
	$(BIN)/python tools/cpu_experts.py $(ARGS)

house-numbers: $(STAMP) ## figures of the source code, of a commit or several: ARGS="HEAD~20 HEAD"
	$(BIN)/python -m tools.house_numbers $(ARGS)

bench-auto: $(STAMP) ## what --mode auto costs beside the better mode, on a trained model and on that of `make mid`: ten minutes
	rm -rf out/auto-tiny
	$(BIN)/twotower export assets/twotower-tiny -o out/auto-tiny
	$(BIN)/twotower build out/auto-tiny --target ort-cpu
	test -d out/mid || $(MAKE) mid
	$(BIN)/twotower build out/mid --target ort-cpu
	$(BIN)/python tools/auto_choice.py --tiny out/auto-tiny --mid out/mid $(ARGS)

bench-weights: $(STAMP) ## a file of 4.3 GB to a device made of host memory, beside cp: five minutes and more, 14 GB of memory
	$(BIN)/python tools/bench_weights.py $(ARGS)

engines-published: $(STAMP) ## the published model compiled for TensorRT for RTX without its weights, held to figures: two minutes, no GPU
	$(BIN)/python tools/engines_published.py $(ARGS)

engines-inside: $(STAMP) ## memory, time and size of engines that hold quantized experts, beside what is planned: two minutes, no GPU
	$(BIN)/python tools/engines_inside.py $(ARGS)

engines-boundary: $(STAMP) ## a slice at published widths in one piece and in segments, side by side on the CPU
	$(BIN)/python tools/engines_boundary.py $(ARGS)

tiny: $(STAMP) ## trains assets/twotower-tiny again and makes its suite: about two hours on two cores
	for stage in context labelled denoiser; do $(BIN)/python tools/tiny/train.py --work out/tiny --stage $$stage || exit 1; done
	$(BIN)/python tools/tiny/publish.py --work out/tiny --output assets/twotower-tiny
	$(BIN)/python tools/tiny/suite.py --output src/twotower/evaluate/data/suite.jsonl

browser: ## Chromium for the tests that open pages (Debian packages, as root)
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null; }

docs: $(STAMP) ## links, commands and examples in the documents
	$(BIN)/python -m pytest tests/test_docs.py

clean: ## removes the environment, outputs and caches
	rm -rf $(VENV) out build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

ci: lint types test wheel ## what the continuous integration runs first, and a change should pass before it is sent; `.ci/run` is all of it
