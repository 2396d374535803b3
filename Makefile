# `make demo` and `make test` set up everything they need on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= data/fashion-mnist
# Of the benchmark: fashion-mnist/, cifar-10-batches-bin/ and cifar-100-binary/ lie there.
SETS ?= data
# One thread a process: two test processes with two threads each fight for two cores.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1
# Long training: keep large allocations in the heap instead of asking the kernel for each of them.
TRAIN_ENVIRONMENT := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 \
	MALLOC_TOP_PAD_=268435456

.PHONY: demo test lint check docs bench crash fuzz browser lenet bench-cpu oto-environment clean

demo: .venv/installed  ## Train on real digits, end with a sparse network (under two minutes).
	$(BIN)/python -m examples.quickstart

test: lint check  ## Everything that must pass.

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

check: .venv/installed
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-fail-under=95

docs: .venv/installed  ## A site of README, guides and reference in site/; no broken link or name.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file examples/guides/mkdocs.yml
	@echo "site/index.html; with its search: $(BIN)/python -m http.server --directory site"

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

browser: .venv/installed  ## TensorBoard in a real browser; the pictures of the README.
	command -v chromedriver > /dev/null || \
		apt-get install -y --no-install-recommends chromium chromium-driver
	mkdir -p examples/results/dashboard
	PICTURES=examples/results/dashboard $(BIN)/python -m pytest tests/lightning/test_browser.py --no-cov

lenet: .venv/installed  ## LeNet-5 on Fashion-MNIST; DATA=folder of the four files.
	$(TRAIN_ENVIRONMENT) $(BIN)/python -m examples.lenet --data-dir $(DATA)

bench-cpu: .venv-oto/installed  ## WGSEF and its rivals, about nine hours. Restartable.
	$(TRAIN_ENVIRONMENT) $(TEST_ENVIRONMENT) .venv-oto/bin/python -m examples.benchmark \
		--suite cpu --data-dir $(SETS)
	$(TRAIN_ENVIRONMENT) $(TEST_ENVIRONMENT) .venv-oto/bin/python -m examples.benchmark latencies \
		--suite cpu
	.venv-oto/bin/python -m examples.benchmark report --suite cpu

oto-environment: .venv-oto/installed  ## For HESSO of OTO, which is no dependency of the others.

clean:
	rm -rf .venv .venv-oto .benchmarks site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv-oto/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oto
	.venv-oto/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[dev]" only_train_once==3.0.1
	touch $@
