# Everything happens in .venv; a stamp file in it marks each install step, redone when what it read has changed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
PACKAGE := pyproject.toml setup.py constraints.txt
CLIP := fastmimi/assets/198-209-0000.ogg

# moshi pins an old torch and pocket-tts requires a server: they are installed without their dependencies, and these are
# what their Mimis need beside ours.
PEERS_NEED := einops huggingface_hub pyyaml requests safetensors scipy sentencepiece sphn tokenizers tqdm

# The other ends of what we support, without constraints.txt, each in an environment of its own. uv can resolve to the
# lowest versions, which pip cannot, and finds or fetches a Python that is not there by its bare version.
runs = $(firstword $(foreach python,$(1),$(shell $(python) -c '' 2>/dev/null && echo $(python))))
python = $(or $(call runs,python$(1) $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)),$(1))
PYTHON_OLDEST ?= $(call python,3.10)
PYTHON_NEWEST ?= $(call python,3.13)
UV := $(VENV)/bin/uv
# What is newest is looked up once a day.
TODAY := $(shell date +%F)
SHORT := tests/compat tests/models/test_parity_transformers.py tests/project/test_readme.py \
	$(addprefix tests/kernels/test_,whole_models.py causal_conv_transpose1d.py rvq_encode.py window_attention.py)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo check test test-oldest test-newest test-newest-short peer-tests fuzz bench bench-report \
	native native-sanitize native-arm numerics kernels-report docs lint types clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/stamp-demo  ## install, then encode and decode a bundled speech clip; results in out/
	mkdir -p out
	$(VENV)/bin/fastmimi roundtrip $(CLIP) out/demo.wav --model demo --tokens out/demo.safetensors --plot out/demo.png

check: lint types $(VENV)/stamp-test  ## lint, types and the fast tests (not marked slow): before every commit
	$(PY) -m pytest tests/ -m "not slow" -n 2 -x -q

test: $(VENV)/stamp-test  ## install the test extras and the peers, run the tests and the kernels' parity tests
	$(PY) -m pytest tests/ --kernels -n auto

test-oldest: .venv-oldest/stamp-test  ## run the tests with the lowest versions that pyproject.toml allows, on Python 3.10
	.venv-oldest/bin/python -m pytest tests/ --kernels -n auto

test-newest: .venv-newest/stamp-test-$(TODAY)  ## run the tests with the newest version of everything
	.venv-newest/bin/python -m pytest tests/ --kernels -n auto

test-newest-short: .venv-newest/stamp-test-$(TODAY)  ## the same, of the drop-ins, the README and the kernels alone
	.venv-newest/bin/python -m pytest $(SHORT) --kernels -n auto

peer-tests: $(VENV)/stamp-test  ## run transformers' own common model tests on its MimiModel and on ours
	$(PY) tests/peer_tests.py

fuzz: $(VENV)/stamp-test  ## mutated files and arguments for ten minutes, others at each run; prints what it finds
	$(PY) -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz

bench: $(VENV)/stamp-bench  ## run the benchmarks: ratios to the reference and to the peers
	$(PY) -m pytest bench/ --benchmark-only

bench-report: $(VENV)/stamp-bench  ## run the end-to-end benchmarks with two allocators: bench/results/cpu.{json,md,png}
	$(PY) bench/report.py

native: $(VENV)/stamp-test  ## build the native kernels again and run their tests
	$(PY) setup.py build_ext --inplace
	$(PY) -m pytest tests/kernels/test_native.py -q -n 2

native-sanitize: $(VENV)/stamp-test  ## build the native kernels with sanitizers and run their tests
	$(PY) tests/native_sanitize.py

native-arm: $(VENV)/stamp-test $(VENV)/stamp-uv  ## cross-compile the native kernels for AArch64 and run their tests under qemu-user
	$(PY) tests/native_arm.py

numerics: $(VENV)/stamp-test  ## run the ops' tests with PyTorch's other CPU kernels; how near errors come to their bound
	$(PY) tests/numerics_sweep.py

kernels-report: $(VENV)/stamp-test  ## compile all kernels for four GPUs without having one, predict times: bench/results/kernels.md
	$(PY) bench/kernels_report.py

docs: $(VENV)/stamp-docs  ## build the documentation: site/index.html, which opens without a server or a network
	$(PY) -m mkdocs build --strict

lint: $(VENV)/stamp-lint  ## ruff: rules and format; vermin: nothing that Python 3.10 lacks (seconds; installs no more)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/vermin --quiet --violations --target=3.10- --eval-annotations --exclude str.decode \
		fastmimi kernels reference bench tests examples setup.py

types: $(VENV)/stamp-types  ## mypy over the package
	$(PY) -m mypy

clean:  ## remove what builds, tests and the demo leave behind (.venv stays: remove it by hand)
	rm -rf out build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastmimi kernels reference tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/stamp-venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/stamp-demo: $(VENV)/stamp-venv $(PACKAGE)
	$(INSTALL) -e '.[plot]'
	touch $@

$(VENV)/stamp-test: $(VENV)/stamp-venv $(PACKAGE) Makefile
	$(INSTALL) -e '.[test]' rustymimi $(PEERS_NEED)
	$(INSTALL) --no-deps moshi pocket-tts
	touch $@

$(VENV)/stamp-bench: $(VENV)/stamp-test
	$(INSTALL) openvino
	touch $@

$(VENV)/stamp-uv: $(VENV)/stamp-venv
	$(INSTALL) uv
	touch $@

.venv-oldest/stamp-test: $(VENV)/stamp-uv $(PACKAGE) Makefile
	$(UV) venv --clear --seed --python $(PYTHON_OLDEST) .venv-oldest
	$(UV) pip install --python .venv-oldest --resolution lowest-direct -e '.[test]'
	$(UV) pip install --python .venv-oldest setuptools rustymimi $(PEERS_NEED)
	$(UV) pip install --python .venv-oldest --no-deps moshi pocket-tts
	touch $@

.venv-newest/stamp-test-$(TODAY): $(VENV)/stamp-uv $(PACKAGE) Makefile
	$(UV) venv --clear --seed --python $(PYTHON_NEWEST) .venv-newest
	$(UV) pip install --python .venv-newest --upgrade -e '.[test]' setuptools rustymimi $(PEERS_NEED)
	$(UV) pip install --python .venv-newest --no-deps moshi pocket-tts
	touch $@

$(VENV)/stamp-docs: $(VENV)/stamp-venv $(PACKAGE)
	$(INSTALL) mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

$(VENV)/stamp-lint: $(VENV)/stamp-venv constraints.txt
	$(INSTALL) ruff vermin
	touch $@

$(VENV)/stamp-types: $(VENV)/stamp-venv $(PACKAGE)
	$(INSTALL) -e '.[lint]'
	touch $@
