PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: help setup demo demo-diffusion demo-controlnet test test-all lint bench gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

$(VENV)/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=python3.12, say")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/development: requirements-dev.txt $(VENV)/runtime
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

setup: $(VENV)/development ## make .venv with runtime and development requirements

demo: $(VENV)/runtime ## synthetic CT, datalist, training, evaluation; minutes on two CPU cores
	$(RUN) -m scripts.phantom write --output_dir demo/data/phantoms --count 48 --shape "[96,80,96]"
	$(RUN) -m scripts.datalist build --data_dir demo/data/phantoms --pattern 'phantom_???.nii.gz' --val_fraction 0.06 --test_fraction 0.1 --output demo/data/datalist_ct.json
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/train.json','configs/demo.json']"
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/evaluate.json','configs/demo.json']" --output_dir demo/outputs/evaluation

DEMO_DIFFUSION := 'configs/demo.json','configs/demo_diffusion.json'

demo-diffusion: $(VENV)/runtime ## from the demo's autoencoder to new volumes: latents, diffusion, generated volumes, their report
	test -e demo/models/autoencoder.pt || $(MAKE) demo
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/encode.json','configs/demo.json']" --output_dir demo/outputs/embeddings
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/train_diffusion.json',$(DEMO_DIFFUSION)]"
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/generate.json',$(DEMO_DIFFUSION)]" --output_dir demo/outputs/generated
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/evaluate_generated.json',$(DEMO_DIFFUSION)]" --output_dir demo/outputs/evaluation_generated

DEMO_CONTROLNET := $(DEMO_DIFFUSION),'configs/demo_controlnet.json'
LABELLED := --json_data_list demo/data/datalist_labels.json

demo-controlnet: $(VENV)/runtime ## from the demo's diffusion model to volumes for given label maps, and their report
	test -e demo/models/diff_unet_3d_rflow-ct.pt || $(MAKE) demo-diffusion
	$(RUN) -m scripts.phantom write --output_dir demo/data/phantoms --count 48 --shape "[96,80,96]" --labels True
	$(RUN) -m scripts.datalist build --data_dir demo/data/phantoms --label_pattern 's/$$/_label/' --val_fraction 0.06 --test_fraction 0.1 --output demo/data/datalist_labels.json
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/encode.json','configs/demo.json']" $(LABELLED) --output_dir demo/outputs/embeddings
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/train_controlnet.json',$(DEMO_CONTROLNET)]"
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/generate.json',$(DEMO_CONTROLNET)]" --mask_dir demo/data/datalist_labels.json --splits "['validation','testing']" --output_dir demo/outputs/controlled
	$(RUN) -W ignore -m monai.bundle run --config_file "['configs/evaluate_generated.json','configs/demo.json']" $(LABELLED) --generated_dir demo/outputs/controlled --unconditional_dir demo/outputs/generated --output_dir demo/outputs/evaluation_controlled

test: $(VENV)/development ## the test suite
	$(RUN) -m pytest

test-all: $(VENV)/development ## the test suite with the slow tests
	$(RUN) -m pytest -m ''

lint: $(VENV)/development ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/development ## patches, steps and diffusion against stock MONAI (REFERENCE=checkout of NV-Generate-CTMR); host and device at once; windows, with the demo's weights
	$(RUN) -W ignore -m tests.benchmarks.data
	$(RUN) -W ignore -m tests.benchmarks.step
	$(RUN) -W ignore -m tests.benchmarks.diffusion $(if $(REFERENCE),--reference $(REFERENCE))
	$(RUN) -W ignore -m tests.benchmarks.overlap
	test ! -e demo/models/autoencoder.pt || $(RUN) -W ignore -m tests.benchmarks.windows

MINUTES ?= 8

gpu: $(VENV)/development ## on a machine with a GPU: its tests, then its benchmark, which takes MINUTES=8 and ends in one table and outputs/gpu.md
	@status=0; \
	$(RUN) -W ignore -m pytest -q -m gpu || status=$$?; \
	$(RUN) -W ignore -m tests.benchmarks.gpu --minutes $(MINUTES) || status=$$?; \
	exit $$status

clean: ## remove the environment, caches and what the demo made
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
