# Two commands do everything on a machine with Python >= 3.11, git and make.
#   make demo   pretrain a ResNet-18 on drawn scenes and show what it learned
#   make test   lint, types and tests, as the machine that guards the main branch runs them

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DEMO := build/demo
STEPS ?= 100

.PHONY: demo test lint types tests clean

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(RUN) -c "from pathlib import Path; from pixel_level_contrastive_learning.scenes import save_scenes; \
	save_scenes(Path('$(DEMO)'), {'train': 400, 'val': 100})"
	$(RUN) examples/pretrain_loop.py $(DEMO)/images/train --steps $(STEPS) --out $(DEMO)/improved-resnet.pt
	$(RUN) benchmarks/transfer.py $(DEMO) $(DEMO)/improved-resnet.pt --size 160 160

test: lint types tests

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/installed
	$(RUN) -m mypy

tests: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile $(PYTEST)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info
