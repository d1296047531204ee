# Both commands start from nothing but Python 3.11+ and make.
.PHONY: demo demo-full test test-fast check check-lowest coverage docs mutations clean

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
# The oldest Python that setup.cfg promises, and the tests of what differs between releases of torch.
LOWEST_PYTHON ?= python3.11
LOWEST ?= .venv-lowest
LOWEST_TESTS = $(addsuffix .py,$(addprefix tests/test_,nodes graph graph_uses functional_use layer_hooks gate layers shipped_rules \
    attention model_gradients loss_gradients product_laws random_nets modes methods callback))

# Real images, wrong labels, in a minute: a reference, training with and without it, what is kept, and the samples.
demo: $(VENV)/.installed
	rm -rf outputs/demo
	$(RUN)/mimic-train experiment=digits_reference hydra.run.dir=outputs/demo/reference
	$(RUN)/mimic-train experiment=digits_noisy mimic=none hydra.run.dir=outputs/demo/plain
	$(RUN)/mimic-train experiment=digits_noisy mimic=posterior hydra.run.dir=outputs/demo/weighted
	$(RUN)/mimic-curate outputs/demo/weighted/scores filter=posterior out=outputs/demo/curated
	$(RUN)/mimic-report outputs/demo/curated data=digits data/noise=symmetric data.noise.rate=0.4 \
		ledger=outputs/demo/weighted/scores out=outputs/demo/report
	@echo 'Look at the samples: open outputs/demo/report/index.html in a browser.'

# The study behind the table of docs/evidence/demo.md, and one of docs/evidence/aligned.md; 8 minutes on 2 cores.
demo-full: $(VENV)/.installed
	$(RUN)/python -m scripts.studies demo
	$(RUN)/python -m scripts.studies aligned --parts noisy
	@echo 'Look at the samples: open outputs/studies/demo/files/report/index.html in a browser.'

# A worker per core. A file's tests share one, as they share fixtures; tests/conftest.py puts the slow files first.
PARALLEL = --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder

test: $(VENV)/.installed
	$(RUN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.installed
	$(RUN)/python -m pytest $(PARALLEL) -m "not slow"

check: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/codespell
	$(RUN)/proselint check README.md CHANGELOG.md CONTRIBUTING.md docs

# What the tests that are not slow leave out: build/coverage/index.html.
coverage: $(VENV)/.installed
	$(RUN)/python -m pytest $(PARALLEL) -m "not slow" --cov=lightning_mimic --cov-branch --cov-report=html:build/coverage --cov-report=term

check-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(PARALLEL) $(LOWEST_TESTS)

# The variables silence advertisements of other generators of sites; warnings of the build are errors.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(RUN)/python -m mkdocs --quiet build --clean
	@echo 'Read it: open build/site/index.html in a browser.'

mutations: $(VENV)/.installed
	$(RUN)/python tests/mutations/run.py

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lightning_mimic needs Python 3.11 or newer; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --upgrade pip
	$(RUN)/python -m pip install --editable '.[all,dev]'
	touch $@

# Every `name>=release` and `name[extra]>=release` of setup.cfg becomes `name==release`.
$(LOWEST)/.installed: setup.cfg
	$(LOWEST_PYTHON) -m venv --clear $(LOWEST)
	sed -n 's/^    \([a-z][a-z0-9_-]*\)\(\[[a-z]*\]\)*>=/\1==/p' setup.cfg | sort -u > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --constraint $(LOWEST)/lowest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) outputs multirun build *.egg-info .mypy_cache .pytest_cache .ruff_cache
