# make demo | test | test-frameworks | lint | bench | bench-frameworks | clean. ARGS="..." is passed on; CONTRIBUTING.md
# lists the variables.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-frameworks lint bench bench-frameworks clean

PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
USE_SYSTEM_TORCH ?= 0
MOE_EP_WITH_CUDA ?= auto
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps

# A stamp's name carries the settings it was made with, so that another setting makes another stamp.
key = $(shell printf '%s' '$(1)' | cksum | cut -d ' ' -f 1)
TORCH := $(STAMPS)/torch-$(call key,$(PYTHON) $(TORCH_SPEC) $(USE_SYSTEM_TORCH))
REQUIREMENTS_OF = $(STAMPS)/requirements-$(1)-$(call key,$(MOE_EP_WITH_NVSHMEM))
BUILD_SETTINGS := $(MOE_EP_WITH_CUDA) $(MOE_EP_CUDA_ARCHS) $(MOE_EP_WITH_NVSHMEM) $(MOE_EP_NVSHMEM_DIR) $(CC) $(CXX) $(CXXFLAGS) $(NVCC_CCBIN) $(NVCC_APPEND_FLAGS)
BUILD_FULL := $(STAMPS)/build-full-$(call key,$(BUILD_SETTINGS))
BUILD_HOST := $(STAMPS)/build-host
SOURCES := setup.py pyproject.toml $(shell find build_tools csrc -type f -not -name '*.pyc')

# The frameworks' own venv; the package is not installed there, its sources are on the path.
FW_VENV := .venv-frameworks
FW_FLOOR := $(FW_VENV)/transformers-floor
FW_PYTHON := $(FW_VENV)/bin/python
FW_PIP := $(FW_PYTHON) -m pip --disable-pip-version-check install -q
FW_STAMP := $(FW_VENV)/stamps/frameworks-$(call key,$(PYTHON) $(TORCH_SPEC) $(USE_SYSTEM_TORCH))
FRAMEWORKS ?= $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard tests/frameworks/*/test_*.py)))))
# What the frameworks compile and cache goes with the venv; nothing is fetched while tests run.
FW_RUN := CUDA_VISIBLE_DEVICES= PATH="$(CURDIR)/$(FW_VENV)/bin:$$PATH" PYTHONPATH=$(CURDIR) DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 \
  HF_HOME=$(CURDIR)/$(FW_VENV)/huggingface TORCH_EXTENSIONS_DIR=$(CURDIR)/$(FW_VENV)/torch_extensions

# The demo trains on the CPU where there is no GPU, so it compiles no CUDA there; what `make test` has built is used.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q . || compgen -G '/dev/nvidia[0-9]*' >/dev/null && echo 1)
RUN_BUILD := $(if $(HAS_GPU)$(wildcard $(BUILD_FULL)),$(BUILD_FULL),$(BUILD_HOST))

demo: $(call REQUIREMENTS_OF,demo) $(RUN_BUILD)
	$(BIN)/moe-ep demo $(ARGS)

test: $(call REQUIREMENTS_OF,test) $(BUILD_FULL)
	$(BIN)/python -m pytest $(ARGS)

# Every framework has an interpreter of its own: they patch torch and read the environment when they are imported.
# FRAMEWORKS="megatron" runs one of them. The last run is transformers once more, with the oldest supported release.
test-frameworks: $(FW_STAMP)
	@for name in $(FRAMEWORKS); do \
	  echo "== $$name"; $(FW_RUN) MOE_EP_FRAMEWORK=$$name \
	    $(FW_PYTHON) -m pytest tests/frameworks/$$name moe_ep/integrations/$$name* $(ARGS); \
	done; \
	if [[ " $(FRAMEWORKS) " == *" transformers "* ]]; then \
	  echo "== transformers, oldest supported"; $(FW_RUN) MOE_EP_FRAMEWORK=transformers MOE_EP_FLOOR=1 \
	    PYTHONPATH=$(CURDIR)/$(FW_FLOOR):$(CURDIR) $(FW_PYTHON) -m pytest tests/frameworks/transformers $(ARGS); \
	fi

bench: $(call REQUIREMENTS_OF,demo) $(RUN_BUILD)
	$(BIN)/moe-ep bench $(ARGS)

bench-frameworks: $(FW_STAMP)
	@$(FW_RUN) $(FW_PYTHON) -m tests.frameworks.bench $(ARGS)

# The package itself is not installed for this: every tool reads the sources.
lint: $(call REQUIREMENTS_OF,dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/lint-imports
	$(BIN)/mypy -p moe_ep

clean:
	rm -rf $(VENV) $(FW_VENV) build dist *.egg-info moe_ep/_C*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call make_venv,FOLDER): a new venv with torch. With USE_SYSTEM_TORCH=1 it sees what $(PYTHON) sees: its base
# installation, and its own folder where it is a venv.
ifeq ($(USE_SYSTEM_TORCH),1)
define make_venv
rm -rf $(1)
$(PYTHON) -c 'import torch' || { echo "USE_SYSTEM_TORCH=1: $(PYTHON) cannot import torch; set PYTHON, or leave USE_SYSTEM_TORCH out to install $(TORCH_SPEC)" >&2; exit 1; }
$(PYTHON) -m venv --system-site-packages $(1)
$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' > $(1)/system_torch.path
$(1)/bin/python -c 'import torch' 2>/dev/null || cp $(1)/system_torch.path "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system_torch.pth"
$(1)/bin/python -c 'import torch; print("torch", torch.__version__, "of", torch.__file__)'
mkdir -p $(1)/stamps
endef
else
define make_venv
rm -rf $(1)
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip --disable-pip-version-check install -q "$(TORCH_SPEC)"
mkdir -p $(1)/stamps
endef
endif

$(TORCH):
	$(call make_venv,$(VENV))
	touch $@

# torch comes first and no other install may bring another one. DeepSpeed's set-up imports torch and compiles nothing.
$(FW_STAMP): $(wildcard tests/frameworks/requirements/*.txt)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "PYTHON=$(PYTHON): the frameworks need Python 3.11 or later; set PYTHON to one" >&2; exit 1; }
	$(call make_venv,$(FW_VENV))
	$(FW_PIP) -r tests/frameworks/requirements/imports.txt
	DS_BUILD_OPS=0 $(FW_PIP) --no-deps --no-build-isolation -r tests/frameworks/requirements/frameworks.txt
	$(FW_PIP) --no-deps --target $(FW_FLOOR) -r tests/frameworks/requirements/transformers_floor.txt
	touch $@

$(call REQUIREMENTS_OF,%): pyproject.toml build_tools/project.py $(TORCH)
	$(BIN)/python build_tools/project.py $* > $(STAMPS)/$*.txt
	$(PIP) install -q -r $(STAMPS)/$*.txt
	touch $@

# One build at a time is in the tree, whatever its settings were.
$(BUILD_FULL) $(BUILD_HOST): $(SOURCES) $(TORCH) $(call REQUIREMENTS_OF,demo)
	rm -f $(STAMPS)/build-*
	$(if $(filter $@,$(BUILD_HOST)),MOE_EP_WITH_CUDA=0 MOE_EP_WITH_NVSHMEM=0,MOE_EP_WITH_CUDA=$(MOE_EP_WITH_CUDA)) \
	  $(PIP) install -v --no-build-isolation --no-deps -e . > $(STAMPS)/build.log 2>&1 || { cat $(STAMPS)/build.log; exit 1; }
	grep -o 'moe_ep: built .*' $(STAMPS)/build.log
	touch $@
