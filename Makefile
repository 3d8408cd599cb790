# `make` alone lists the targets. Each target makes the virtual environment it needs.

PYTHON ?= python3
# An index with CPU-only wheels of torch and torchvision, for machines without a GPU.
TORCH_INDEX ?=
# For `make figures`: folders of the 24 Kodak images and of other photographs (ours: 100 of BSDS500's
# validation part), and JSON files with their captions.
KODAK ?=
KODAK_CAPTIONS ?=
COCO ?=
COCO_CAPTIONS ?=
# For `make train-tiny`: fields of every stage, for instance --trainer.precision=bf16-mixed.
FIT_OPTIONS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
# One thread per worker: the workers share the cores, and torch would start one thread a core in each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu lint format types golden docs notebooks check-wheel \
	train-tiny figures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=python3.12  TORCH_INDEX=URL (CPU wheels)  KODAK=DIR"

# The package goes in first, without dependencies, because pip then refuses an unsuitable Python
# before anything large is downloaded. torch and torchvision follow as a matched pair: several
# dependencies ask for "any torch", and an index of CPU wheels (TORCH_INDEX) has nothing else to
# offer, so it must not serve the last step.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-deps --editable .
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

venv: $(INSTALLED) ## make .venv with everything for development

demo: $(INSTALLED) ## compress and decompress sample photographs into demo-output/
	$(BIN)/python -m percov2.demo --output demo-output

test: $(INSTALLED) ## run the fast tests
	$(PYTEST)

test-slow: $(INSTALLED) ## run the slow tests
	$(PYTEST) -m 'slow and not gpu'

test-gpu: $(INSTALLED) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED) ## mend style and formatting in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(INSTALLED) ## check the type annotations
	$(BIN)/mypy

golden: $(INSTALLED) ## freeze a model and streams into tests/golden (refuses to replace them)
	$(BIN)/python -m tests.golden.make

docs: $(INSTALLED) ## build the documentation into site/
	$(BIN)/python -m mkdocs build --strict

notebooks: $(INSTALLED) ## run the notebooks from top to bottom
	$(PYTEST) -m slow tests/test_notebooks.py

check-wheel: ## build sdist and wheel, and run the demo from the wheel in an empty environment
	PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) .ci/check-wheel

# $(call fit,OVERLAYS): the file and its overlays below configs/tiny. What was interrupted goes on from
# its newest checkpoint.
fit = $(BIN)/python -m percov2.fit $(patsubst %,--config configs/tiny/%.yaml,$(1)) \
	--ckpt_path auto $(FIT_OPTIONS)
# $(call trained,RUN): the last file that a stage writes. Later stages ask for earlier ones behind a bar:
# a stage that is finished is left alone, whatever the age of its files.
trained = runs/$(1)/model/training.yaml

train-tiny: $(call trained,tiny/settle) $(call trained,tiny-low/adversarial)
train-tiny: ## retrain tiny and tiny-low, or go on with it (PERCOV2_DATA=DIR: shards and captions)

$(call trained,tiny/autoencoder): | $(INSTALLED)
	$(call fit,autoencoder)
$(call trained,tiny/stage1): | $(call trained,tiny/autoencoder)
	$(call fit,stage1)
$(call trained,tiny/masked): | $(call trained,tiny/stage1)
	$(call fit,stage1 masked)
$(call trained,tiny/stage2): | $(call trained,tiny/masked)
	$(call fit,stage2)
$(call trained,tiny/adversarial): | $(call trained,tiny/stage2)
	$(call fit,stage2 adversarial)
$(call trained,tiny/joint): | $(call trained,tiny/adversarial)
	$(call fit,stage2 adversarial joint)
$(call trained,tiny/joint-masked): | $(call trained,tiny/joint)
	$(call fit,stage1 masked masked_joint)
$(call trained,tiny/settle): | $(call trained,tiny/joint-masked)
	$(call fit,stage2 adversarial joint settle)
$(call trained,tiny-low/stage1): | $(call trained,tiny/autoencoder)
	$(call fit,stage1 low/stage1)
$(call trained,tiny-low/masked): | $(call trained,tiny-low/stage1)
	$(call fit,stage1 low/stage1 masked low/masked)
$(call trained,tiny-low/adversarial): | $(call trained,tiny-low/masked) $(call trained,tiny/settle)
	$(call fit,stage2 adversarial joint settle low/adversarial)

# $(call evaluate,DATA,OUTPUT,CAPTIONS): up to the models and competitors.
evaluate = $(BIN)/percov2 evaluate --data $(1) --output $(2) $(if $(3),--captions $(3)) \
	--metrics psnr,ms_ssim,gradient_energy,efficientnet_frechet
# $(call compare,COMMAND,MODELS): the competitors' rates are those of tiny.
define compare
	$(1) --model tiny --competitors jpeg,jpeg2000,webp,avif,jxl,heic --no-report
	$(1) --model tiny --competitors webp,avif,heic --rates 2x --no-report
	$(1) --model $(2)
endef

figures: $(INSTALLED) ## measure the presets and their competitors (KODAK=DIR, COCO=DIR, or one of them)
	$(if $(KODAK)$(COCO),,$(error neither KODAK nor COCO is set: run `make figures KODAK=DIR` with the \
		folder of the Kodak images, or COCO=DIR with any folder of photographs))
	$(if $(KODAK),$(call compare,$(call evaluate,kodak=$(KODAK),runs/kodak,$(KODAK_CAPTIONS)),tiny tiny-low))
	$(if $(COCO),$(call compare,$(call evaluate,$(COCO),runs/coco,$(COCO_CAPTIONS)),tiny))

clean: ## remove caches and build products (keeps .venv and runs)
	rm -rf build dist site *.egg-info demo-output .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks percov2 tests -name __pycache__ -type d -prune -exec rm -rf {} +
