# Two commands do everything on a machine with Python >= 3.11, git and make.
#   make demo   pretrain a ResNet-18 on drawn scenes and show what it learned
#   make test   lint, types and tests, as the machine that guards the main branch runs them
# and a third says whether a change costs time or memory:
#   make bench  short benchmarks, their ratios beside the last recorded ones
# and a fourth builds the documentation's site:
#   make site   into build/site; a broken link or a public name without docstring fails

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
STEPS ?= 100

.PHONY: demo test lint types tests bench site clean

demo: $(VENV)/installed
	$(VENV)/bin/pixelcl demo --out build/demo --steps $(STEPS) --overwrite

test: lint types tests

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/vulture

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

# The short forms, whose ratios are shown beside the last recorded ones.
bench: $(VENV)/installed
	$(RUN) benchmarks/step.py --size 128 --batch 8 --rounds 3 --steps 2
	$(RUN) benchmarks/step.py --size 128 --batch 8 --rounds 3 --steps 2 --precision bfloat16 --channels-last
	$(RUN) benchmarks/memory.py --sides 32 64
	$(RUN) benchmarks/blocks.py --sides 16 32 --rounds 3
	$(RUN) benchmarks/startup.py --rounds 3
	$(RUN) benchmarks/scaling.py --check

# Strict: a warning fails. Nothing is fetched: no fonts, no plugins that ask others.
site: $(VENV)/installed-docs
	$(RUN) -m mkdocs build --strict

$(VENV)/installed-docs: $(VENV)/installed
	$(RUN) -m pip install --editable ".[docs]"
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info .import_linter_cache
