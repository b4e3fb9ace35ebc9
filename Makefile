# make demo | test | check | bench; needs nothing but Python (3.10 to 3.12) and make.
PYTHON ?= python3
# TransformerLens generation: 4 (TransformerBridge) or 3 (HookedTransformer and bridge)
GENERATION ?= 4
VENV ?= .venv-$(GENERATION)
BIN := $(VENV)/bin
CONSTRAINTS := constraints/transformer-lens-$(GENERATION).txt
REPORT ?= report.html

.PHONY: demo test check format bench picture clean

demo: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/sd-lens report smollm2-135m --out $(REPORT)

# One thread a process: together they have as many as there are cores. In the order of the files, the notebooks, which
# take longest, do not come last.
test: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	for file in benchmarks/*.py; do HF_HUB_OFFLINE=1 $(BIN)/python $$file || exit 1; done

picture: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python docs/picture.py

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
		|| (echo "sd_lens needs Python 3.10 to 3.12; name one with make PYTHON=..." && exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv-3 .venv-4
