# `make demo` and `make test` set up everything they need on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
# Of the benchmark: fashion-mnist/, cifar-10-batches-bin/ and cifar-100-binary/ lie there.
SETS ?= data
# Of `make gpu`: pieces of seven minutes, and at most an epoch more.
DEVICE ?= cuda
SUITES ?= gpu paper structural
WORKERS ?= 4
MINUTES ?= 7
# One thread a process: two test processes with two threads each fight for two cores.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
# Long training: keep large allocations in the heap instead of asking the kernel for each of them.
TRAIN_ENVIRONMENT := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 \
	MALLOC_TOP_PAD_=268435456

# Python compiles what is imported when it is: all of it takes a minute more. And first pip itself:
# that of Python 3.11 takes three times as long to find out what is needed. What is compiled is
# kept, also where images for containers say otherwise: every process would do it again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Types are checked beside the tests.
MAKEFLAGS += --jobs=2

.PHONY: help demo test lint check docs dist bench crash fuzz sweep browser bench-cpu gpu oto-environment clean

help:  ## What can be made.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/installed  ## Train on real digits, end with a sparse network (under two minutes).
	$(BIN)/python -m examples.quickstart

test: lint check  ## Everything that must pass.

lint: .venv/installed  ## Style, layout, contracts of imports, types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Tracing costs a third of the time before Python 3.12.
check: .venv/installed  ## All tests. COVERAGE=yes: with their coverage, 95 % at least.
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		$(if $(COVERAGE),--cov --cov-report=term --cov-fail-under=95)

docs: .venv/installed  ## A site of README, guides and reference in site/; no broken link or name.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file examples/guides/mkdocs.yml
	@echo "site/index.html; with its search: $(BIN)/python -m http.server --directory site"

dist: .venv/installed  ## Wheel and sdist in dist/, and the demo with the wheel alone.
	rm -rf dist .venv-dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-dist
	tar -xzf dist/*.tar.gz -C .venv-dist
	.venv-dist/bin/python $(INSTALL) pip
	.venv-dist/bin/python $(INSTALL) "$$(echo dist/*.whl)[examples]"
	cd .venv-dist/lightning_wgsef-*/ && rm -r lightning_wgsef && ../bin/python -m examples.quickstart
	.venv-dist/bin/lightning-wgsef --help > .venv-dist/help.txt

# BENCH="-k elements": only some of them, and the table goes to .benchmarks/.
bench: .venv/installed  ## Ratios to floors measured in the same run: tests/benchmarks/results.
	mkdir -p .benchmarks
	$(TRAIN_ENVIRONMENT) $(BIN)/python -m pytest tests/benchmarks $(BENCH) -o addopts= \
		-o python_files='bench_*.py' -p benchmark --benchmark-json=.benchmarks/raw.json \
		--benchmark-columns=median,iqr,rounds; status=$$?; \
		$(BIN)/python -m tests.benchmarks.table .benchmarks/raw.json \
		$(if $(BENCH),.benchmarks,tests/benchmarks/results) && exit $$status

crash: .venv/installed  ## Twenty trainings killed at random moments, and resumed.
	CRASHES=20 $(TEST_ENVIRONMENT) $(BIN)/python -m pytest tests/training/test_crash.py --no-cov

fuzz: .venv/installed  ## Five hundred random trainings, other ones each time.
	FUZZ=500 $(TEST_ENVIRONMENT) $(BIN)/python -m pytest tests/training/test_fuzz.py --no-cov \
		--show-capture=no --tb=short

sweep: .venv/installed  ## Tests that take half a minute or more each, and whole products of cases.
	SWEEP=yes $(TEST_ENVIRONMENT) $(BIN)/python -m pytest tests -m sweep --no-cov

browser: .venv/installed  ## TensorBoard in a real browser; the pictures of the README.
	command -v chromedriver > /dev/null || \
		apt-get install -y --no-install-recommends chromium chromium-driver
	mkdir -p examples/results/dashboard
	PICTURES=examples/results/dashboard $(BIN)/python -m pytest tests/lightning/test_browser.py --no-cov

bench-cpu: .venv-oto/installed  ## WGSEF and its rivals, about nine hours. Restartable.
	$(TRAIN_ENVIRONMENT) $(TEST_ENVIRONMENT) .venv-oto/bin/python -m examples.benchmark \
		--suite cpu --data-dir $(SETS)
	$(TRAIN_ENVIRONMENT) $(TEST_ENVIRONMENT) .venv-oto/bin/python -m examples.benchmark latencies \
		--suite cpu
	.venv-oto/bin/python -m examples.benchmark report --suite cpu

# In pieces, each of which commits its records: a machine that is lent for minutes loses one epoch.
gpu: .venv/installed  ## On a GPU: its tests and benchmarks, then SUITES one after the other. Restartable.
	$(BIN)/python -m pytest tests -m gpu --no-cov
	mkdir -p .benchmarks
	$(BIN)/python -m pytest tests/benchmarks -m gpu -o addopts= -o python_files='bench_*.py' \
		-p benchmark --benchmark-json=.benchmarks/gpu.json -W "ignore:Not saving anything"
	for suite in $(SUITES); do \
		while : ; do \
			$(TRAIN_ENVIRONMENT) $(TEST_ENVIRONMENT) $(BIN)/python -m examples.benchmark \
				--suite $$suite --data-dir $(SETS) --device $(DEVICE) --workers $(WORKERS) \
				--minutes $(MINUTES); \
			status=$$?; \
			$(BIN)/python -m examples.benchmark report --suite $$suite; \
			git add examples/results; \
			git diff --cached --quiet -- examples/results || git commit --quiet \
				--message "Records of the suite $$suite" -- examples/results; \
			test $$status = 75 || break; \
		done; \
	done

oto-environment: .venv-oto/installed  ## For HESSO of OTO, which is no dependency of the others.

clean:  ## Environments and caches away.
	rm -rf .venv .venv-dist .venv-oto dist .benchmarks site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) pip
	$(BIN)/python $(INSTALL) -e ".[dev]"
	touch $@

.venv-oto/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oto
	.venv-oto/bin/python $(INSTALL) pip
	.venv-oto/bin/python $(INSTALL) -e ".[dev]" only_train_once==3.0.1
	touch $@
