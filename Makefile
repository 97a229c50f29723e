# Every target does the set-up it needs; set-up is incremental. Needs python3 >= 3.10 with venv and
# headers, gcc, g++ and make. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# The one place that pins versions: what we develop, format and measure with. Users get torch >= 2.10.
CONSTRAINTS := torch==2.13.0 ruff==0.17.5
# The oldest transformers that pyproject.toml claims, installed beside the current one and tested.
OLDEST_TRANSFORMERS := 5.0.0
OLDEST := $(VENV)/oldest-$(OLDEST_TRANSFORMERS)
OLDEST_TESTS := $(addprefix tests/,test_hf.py test_quantize.py test_demo.py test_kv_cache.py)

C_FILES := $(sort $(wildcard csrc/*.c csrc/*/*.c))
C_KERNELS := $(filter-out csrc/module.c,$(C_FILES))
CSRC := $(C_FILES) $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.h csrc/*.map)
EXTENSION := gpu_poor/_gpu_poor_C.abi3.so

help:            ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# -- set-up ------------------------------------------------------------------------------------

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "gpu-poor needs python3 >= 3.10; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig, venv, ensurepip; \
		sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo "$(PYTHON) lacks venv or headers (Debian: apt install python3-venv python3-dev)"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build-deps: | $(PY)
	printf '%s\n' $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(PY) -m pip install -q -c $(VENV)/constraints.txt torch "setuptools>=77" wheel
	@touch $@

$(EXTENSION): setup.py $(CSRC) $(VENV)/.build-deps
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# After the extension: the editable install finds it built and does not build it again.
$(VENV)/.dev: pyproject.toml | $(EXTENSION)
	$(PY) -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[hf,dev]'
	@touch $@

$(OLDEST)/.done: | $(VENV)/.dev
	$(PY) -m pip install -q --upgrade --target $(OLDEST) transformers==$(OLDEST_TRANSFORMERS)
	@touch $@

dev: $(VENV)/.dev $(EXTENSION)  ## virtual environment, dependencies, compiled extension

# -- use ---------------------------------------------------------------------------------------

demo: dev        ## quantize the small model in the package and show what changed
	$(PY) -m gpu_poor.examples.demo

test: lint asan pytest test-oldest  ## everything CI runs

pytest: dev      ## the Python tests
	$(PY) -m pytest -q

test-oldest: dev $(OLDEST)/.done  ## the transformers tests on the oldest version claimed
	PYTHONPATH=$(OLDEST) $(PY) -c 'import transformers; \
		assert transformers.__version__ == "$(OLDEST_TRANSFORMERS)", transformers.__version__'
	PYTHONPATH=$(OLDEST) $(PY) -m pytest -q $(OLDEST_TESTS)

lint: dev        ## ruff, and the C files as pedantic C11
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	gcc -std=c11 -pedantic -Wall -Wextra -Werror -Wno-psabi -fsyntax-only -Icsrc \
		-isystem "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')" $(C_FILES)

# Two programs: what this CPU can run, and the AMX kernels with their tile instructions in plain C.
CHECKS := $(patsubst %.c,build/check/%.o,$(C_KERNELS) tests/c/check_kernels.c)
TILES := $(patsubst %.c,build/check/%.o,csrc/cpu.c $(filter %_amx.c,$(C_KERNELS)))
CHECK_FLAGS := -std=c11 -O1 -g -ffp-contract=off -Wno-psabi -fno-omit-frame-pointer \
	-fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc

build/check/%.o: %.c $(CSRC)
	@mkdir -p $(@D)
	gcc $(CHECK_FLAGS) -c $< -o $@

build/check/%.emulated.o: %.c $(CSRC) tests/c/emulated_tiles.h
	@mkdir -p $(@D)
	gcc $(CHECK_FLAGS) -DGPU_POOR_EMULATE_TILES -Itests/c -c $< -o $@

build/check_kernels: $(CHECKS)
	gcc $(CHECK_FLAGS) $^ -o $@ -lm

build/check_emulated: $(filter-out $(TILES),$(CHECKS)) $(TILES:.o=.emulated.o)
	gcc $(CHECK_FLAGS) $^ -o $@ -lm

asan: build/check_kernels build/check_emulated  ## the C kernels of every instruction set under ASan and UBSan
	build/check_kernels
	build/check_emulated amx

wheel: dev       ## dist/gpu_poor-*-abi3-*.whl
	rm -rf dist build/lib* build/bdist*
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist .
	@ls -l dist

wheel-test: wheel  ## install the wheel into a fresh environment and run the demo's model there
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install -q -c $(VENV)/constraints.txt "$$(echo dist/*.whl)[hf]"
	cd build && wheel-venv/bin/python -m gpu_poor.examples.demo

bench: dev       ## all benchmarks; MODELS= and DATA= name folders of models and texts
	$(PY) -m benchmarks $(if $(MODELS),--models $(MODELS)) $(if $(DATA),--data $(DATA))

results: dev     ## RESULTS.md and the README's tables from benchmarks/results/*.json
	$(PY) -m benchmarks.report

clean:           ## all that was built; the virtual environment stays
	rm -rf build dist *.egg-info $(EXTENSION)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.DEFAULT_GOAL := help
.PHONY: help dev demo test pytest test-oldest lint asan wheel wheel-test bench results clean
