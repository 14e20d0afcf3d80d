# The one entry point. Needs Python >= 3.10 and a C++17 compiler (nvcc too, for the CUDA kernels); the rest goes into .venv.
#
#   make paint     a picture in out.png, with the small embedded model      make test     every test this machine can run
#   make bench     the benchmarks                                           make ci       what a merge has to pass
#   make readme    tables of README.md from bench/results                   make wheel    dist/*.whl
#   make lint      make format     make clean                               make asan     op tests under AddressSanitizer
#   make gpu       on an NVIDIA GPU: build, GPU tests and headline figures in 8 minutes, without a network and with the
#                  packages that PYTHON has; make gpu-more, again and again, goes on with all other figures, for GPU_MINUTES
#                  each time (bench/gpu.py tells more)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a 3d render of a fox on a teal background
OUT ?= out.png
PAGES := README.md docs/sana-tiny.md docs/quantisation.md

.PHONY: install paint test asan ci lint format wheel bench gpu gpu-more readme clean
.DEFAULT_GOAL := install

# Editable, so that the source tree is what runs and what the tests see. Built again when the C++ or the packaging changes.
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
INSTALL := $(BIN)/pip install --quiet -c constraints.txt --no-build-isolation

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools pybind11 ninja
	touch $@

$(VENV)/run: $(VENV)/tools $(SOURCES)
	$(INSTALL) -e .
	touch $@

$(VENV)/dev: $(VENV)/run
	$(INSTALL) -e ".[test]"
	touch $@

install: $(VENV)/run

paint: $(VENV)/run
	$(BIN)/sana generate "$(PROMPT)" --model sana-tiny -o $(OUT)

# A worker per core, one torch thread in each: OpenMP threads that wait for one another crawl on a shared machine.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations=20 $(PYTEST_ARGS)

# The CPU kernels with bounds checks in every load and store. CPython and torch leak by design; libstdc++, for which Python
# has no use, must be there when the checks start, or the first exception that torch throws ends the process.
OP_TESTS := $(addprefix tests/test_,gemm.py int4.py quantize.py modulate.py mix_ffn.py depthwise_glu.py linear_attention.py \
  cross_attention.py conv2d.py winograd.py upsample.py multi_scale.py rms_norm.py)
asan: $(VENV)/dev
	SANA_BUILD=asan SANA_CUDA=0 $(BIN)/python setup.py build_ext --build-lib build/asan
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 SANA_CPU_MODULE=$$(ls build/asan/sana_kernels/_cpu*.so) \
	  $(BIN)/python -m pytest -q -n auto $(OP_TESTS)

# Where nvcc is found: every CUDA kernel for every target, and none may spill.
ci: lint test
	if command -v $${NVCC:-nvcc} >/dev/null; then $(BIN)/python -m sana_bench.resources; fi
	$(BIN)/sana bench kernels --quick
	$(BIN)/sana bench image --quick
	$(BIN)/sana bench quality --quick
	for page in $(PAGES); do $(BIN)/python -m sana_bench.report $$page --check || exit 1; done

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/tools
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w dist .

bench: $(VENV)/dev
	$(BIN)/sana bench kernels
	$(BIN)/sana bench image

GPU_OUT ?= build/gpu
gpu:
	$(PYTHON) bench/gpu.py quick --out $(GPU_OUT)

GPU_MINUTES ?= 60
gpu-more:
	$(PYTHON) bench/gpu.py more --out $(GPU_OUT) --minutes $(GPU_MINUTES)

readme: $(VENV)/run
	for page in $(PAGES); do $(BIN)/python -m sana_bench.report $$page; done

clean:
	rm -rf $(VENV) build dist *.egg-info sana_kernels/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
