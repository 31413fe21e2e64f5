# Two commands are enough on a fresh machine: `make quickstart` and `make test`. Both set up `.venv` first.
# UV or other installers work as well; plain venv and pip are what every machine has.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: checkpoint docs install paper quickstart test test-ground test-slow test-upstream test-versions check clean typecheck

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

quickstart: install
	$(BIN)/agevlm quickstart

test: install
	$(BIN)/python -m pytest -q -n 2

test-slow: install
	$(BIN)/python -m pytest -q -m slow

# The tests of what needs torchvision (SAM 2, SAM 3, the faster image backend), on a CPU. They have an environment of their
# own: torchvision's wheels fit the package index's own torch, which `===` asks for (a CPU build is 2.13.0+cpu).
GROUND ?= .venv-ground
INDEX_TORCH = $(shell sed -n 's/^torch==/torch===/p' constraints.txt)
test-ground:
	$(PYTHON) -m venv $(GROUND)
	if $(GROUND)/bin/pip install -q -c constraints.txt $(INDEX_TORCH) torchvision -e ".[dev,ground]"; then \
		CUDA_VISIBLE_DEVICES= $(GROUND)/bin/python -m pytest -q -rs -n 2 \
			tests/grounding tests/processing/test_image_backends.py tests/test_remote_code.py; \
	else echo "skipped: torchvision and the torch that it needs cannot be installed here"; fi

# transformers' own common tests on our classes; TRANSFORMERS_TESTS is the folder `tests` of its sources
# (tests/upstream/test_modeling_upstream.py says how to get them). Its markers are not ours: no --strict-markers.
test-upstream: install
	$(BIN)/pip install -q parameterized
	AGEVLM_TRANSFORMERS_TESTS=$(TRANSFORMERS_TESTS) $(BIN)/python -m pytest -q -rs \
		-o addopts=--import-mode=importlib tests/upstream

# The shipped checkpoint under other versions of transformers, without this repository. VERSIONS="oldest newest" takes
# the oldest supported and the newest released; left out, all that docs/versions.md lists.
test-versions: install
	$(BIN)/python tests/versions/run.py $(VERSIONS)

typecheck: install
	$(BIN)/mypy -p agevlm
	$(BIN)/mypy bench examples

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p agevlm
	$(BIN)/mypy bench examples

# checkpoints/agevlm-tiny: four stages from checkpoints/tiny-parts, each of which goes on where it was killed
CHECKPOINT = build/checkpoint
THINGS = --max-objects 6 --size 320 --colors red orange yellow green blue purple \
	--names apple bicycle bird car cat clock fish flower house key star tree
FLAGS = --size tiny --variant agevlm-phrases-lm --data $(CHECKPOINT)/scenes --language $(CHECKPOINT)/fresh \
	--stored-features $(CHECKPOINT)/features
checkpoint: install
	$(BIN)/agevlm data scenes --output $(CHECKPOINT)/fresh --captions 0 --instructions 0 --test 300 --splits composition $(THINGS)
	$(BIN)/agevlm data scenes --output $(CHECKPOINT)/scenes --seed 7 --captions 6400 --instructions 32000 --turns 8 --presence-first 0.5 \
		--test 0 $(THINGS)
	test -d $(CHECKPOINT)/start || $(BIN)/agevlm init --output $(CHECKPOINT)/start --parts checkpoints/tiny-parts \
		--image-size 320 --cross-attention-layers 1 4
	$(BIN)/agevlm train stage1_align $(FLAGS) --init-from $(CHECKPOINT)/start --output-dir $(CHECKPOINT)/stage1
	$(BIN)/agevlm train stage2_adapt_vision $(FLAGS) --init-from $(CHECKPOINT)/stage1 --output-dir $(CHECKPOINT)/stage2
	$(BIN)/agevlm train stage3_ground $(FLAGS) --init-from $(CHECKPOINT)/stage2 --output-dir $(CHECKPOINT)/stage3
	$(BIN)/agevlm train stage4_instruct $(FLAGS) --per-device-train-batch-size 16 --gradient-accumulation-steps 1 \
		--init-from $(CHECKPOINT)/stage3 --output-dir $(CHECKPOINT)/agevlm-tiny
	$(BIN)/agevlm eval $(CHECKPOINT)/agevlm-tiny --scenes $(CHECKPOINT)/fresh --output $(CHECKPOINT)/results
	$(BIN)/agevlm card $(CHECKPOINT)/agevlm-tiny --evaluation $(CHECKPOINT)/results/agevlm-tiny/metrics.json

# The API reference, from the docstrings: build/api/index.html
docs: install
	$(BIN)/pip install -q -e ".[docs]"
	$(BIN)/mkdocs build

# docs/paper.md, from docs/paper.yaml
paper: install
	$(BIN)/python docs/paper.py

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache build
