# Everything sets itself up: Python >= 3.11 is all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed once for each content of the files that say what to install.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
OUT ?= eval/results
RUN ?= runs/demo

.PHONY: demo test test-slow test-clients check docs gpu gpu-kernels gpu-latency gpu-train gpu-tune gpu-more sanitize format
.DEFAULT_GOAL := test

# torch comes first, so that no other package chooses a build of its own. Its CUDA builds bring their own triton; beside
# others one is installed for the tests of the kernels, which interpret and compile them without a GPU.
$(STAMP): train/plume_demo.py train/plume_hops.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "plume needs Python >= 3.11; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt hatchling setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet triton==3.9.0
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	rm -f $(VENV)/.installed-*
	touch $@

# Trains and compares; ABLATIONS=1 adds three ablations, SEED=1 takes another seed.
demo: $(STAMP)
	$(BIN)/python train/plume_demo.py --out $(RUN) $(if $(SEED),--seed $(SEED)) $(if $(ABLATIONS),--ablations)

# Two processes of one thread each: most tests wait for Python, not for products. Kernels are interpreted apart from them,
# since Triton decides that once for a process.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTEST)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTEST) -m interpreted tests/plume_kernels

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Libraries that embed with a saved folder, at the versions that the tests have been run with; they are not in $(VENV),
# since each of them has wishes of its own.
CLIENTS := .venv-clients
test-clients: $(STAMP)
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --constraint constraints.txt hatchling torch
	$(CLIENTS)/bin/pip install --quiet --requirement tests/clients/requirements.txt
	$(CLIENTS)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -m clients tests/clients

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict --quiet

# Pages of the public classes, from their docstrings; opens them on this machine.
docs: $(STAMP)
	$(BIN)/mkdocs serve

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# All that needs a CUDA device: three targets of under eight minutes each, which stand alone; results go to $(OUT) as
# they come. Uses PYTHON where it is set, else the environment that make has made, else python3; packages may lie on
# PYTHONPATH beside it. A part that fails is reported, the next one runs, and the exit status tells; each bench has its
# own gate and times nothing that is wrong.
GPU_PYTHON := $(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(BIN)/python,$(PYTHON))
GPU := env PYTHONPATH=.:kernels:train:eval$(if $(PYTHONPATH),:$(PYTHONPATH))
PART = { echo "== $(1)"; $(1) || { echo "== FAILED: $(1)"; failed=1; }; }

gpu:
	@failed=0; for target in gpu-kernels gpu-latency gpu-train; do $(MAKE) --no-print-directory $$target \
		&& echo "== $$target: passed" || { echo "== $$target: FAILED"; failed=1; }; done; exit $$failed

gpu-kernels:
	@failed=0; \
	$(call PART,$(GPU) timeout 300 $(GPU_PYTHON) -m pytest -m gpu tests/test_gpu_kernels.py); \
	$(call PART,$(GPU) timeout 150 $(GPU_PYTHON) kernels/bench.py --shapes 2b --time-limit 90 --out $(OUT)); \
	exit $$failed

gpu-latency:
	@failed=0; \
	$(call PART,$(GPU) timeout 280 $(GPU_PYTHON) -m plume_eval latency --config configs/eval/latency_2b.yaml --out $(OUT)); \
	$(call PART,$(GPU) timeout 160 $(GPU_PYTHON) -m plume_eval latency --config configs/eval/latency_2b_batches.yaml --out $(OUT)); \
	exit $$failed

gpu-train:
	@failed=0; \
	$(call PART,$(GPU) timeout 300 $(GPU_PYTHON) -m pytest -m gpu tests/test_gpu.py); \
	$(call PART,$(GPU) timeout 150 $(GPU_PYTHON) train/bench.py --shapes 2b --runs 3 --out $(OUT)); \
	exit $$failed

# Finds the tiles of a device that has no table yet, about five minutes; the table is in kernels/plume_kernels/tuned.
gpu-tune:
	$(GPU) $(GPU_PYTHON) kernels/tune.py --shapes 2b 7b --time-limit 270

# What can wait: the baselines of torch.compile, the shapes of Qwen2-VL-7B, the adapter's share of training.
gpu-more:
	$(GPU) $(GPU_PYTHON) kernels/bench.py --shapes 2b --compiled --batch-sizes 1 --time-limit 120 --out $(OUT)/compiled
	$(GPU) $(GPU_PYTHON) kernels/adapter.py --shapes 2b --out $(OUT)
	$(GPU) $(GPU_PYTHON) -m plume_eval latency --config configs/eval/latency_2b_compiled.yaml --out $(OUT)
	$(GPU) $(GPU_PYTHON) -m plume_eval latency --config configs/eval/latency_7b.yaml --out $(OUT)

# Looks for reads and writes out of bounds and for races in shared memory, at the smallest shapes.
# cuDNN's attention, which kernels are held against, has races of its own.
SANITIZE := $(GPU) compute-sanitizer --error-exitcode 1 --kernel-name-exclude kernel_substring=cudnn
sanitize:
	$(SANITIZE) --tool memcheck $(GPU_PYTHON) -m pytest -m gpu tests/test_gpu_kernels.py -k small_model
	$(SANITIZE) --tool racecheck $(GPU_PYTHON) -m pytest -m gpu tests/test_gpu_kernels.py -k small_model
