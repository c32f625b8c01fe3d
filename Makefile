# make env | plan-env | demo | test | test-slow | lint | lock | clean. The environment is .venv, installed from the lock files; exported models
# are also tried with an old transformers, in an environment of its own.
PYTHON ?= python3
VENV := .venv
OLD := .venv-transformers-4.46
BIN := $(VENV)/bin
LIBTPU := 0.0.42.1
# uv reads its own variables; a machine that sets pip's is understood all the same.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Modules are compiled once, here: where Python may not write them, each start of a program would compile them anew, which
# takes as long as loading them does.
export UV_COMPILE_BYTECODE := 1
INSTALL_OLD = VIRTUAL_ENV=$(CURDIR)/$(OLD) $(BIN)/uv pip install --quiet
INSTALL := VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet

.PHONY: env test-env plan-env demo test test-slow lint lock clean

env: $(VENV)/.installed
test-env: $(VENV)/.installed-test $(OLD)/.installed
	@$(MAKE) --no-print-directory plan-env || echo 'the TPU compiler cannot be had here: the tests of its programs are skipped'
plan-env: .libtpu/.installed

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "calm_jax needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/.installed: requirements.lock setup.cfg | $(BIN)/uv
	$(INSTALL) -r requirements.lock
	$(INSTALL) --no-deps -e .
	touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	$(INSTALL) -r requirements-test.lock
	touch $@

$(OLD)/.installed: requirements-transformers-4.46.lock | $(BIN)/uv
	$(PYTHON) -m venv $(OLD)
	$(INSTALL_OLD) -r requirements-transformers-4.46.lock
	touch $@

# The TPU compiler for tools.plan, in a folder of its own: inside the environment JAX would look for a TPU at each start.
.libtpu/.installed: | $(BIN)/uv
	$(BIN)/uv pip install --quiet --target .libtpu --no-deps libtpu==$(LIBTPU)
	touch $@

demo: env
	$(BIN)/python -m tools.demo --workdir runs/demo

test: test-env
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# What `make test` leaves out: faults, thorough sweeps, whole programs at work for long.
test-slow: test-env
	CALM_THOROUGH=1 $(BIN)/python -m pytest -m slow

lint: test-env
	$(BIN)/ruff check .

# The test lock pins torch's plain version: a CPU build is enough, and any build of that version will do.
lock: test-env
	$(BIN)/uv pip compile setup.cfg --extra demo --python-version 3.11 --no-header --no-annotate -q -o requirements.lock
	echo 'torch==2.13.0' | $(BIN)/uv pip compile setup.cfg --extra test --extra dev -c requirements.lock -c - --python-version 3.11 --no-header --no-annotate -q -o requirements-test.lock
	printf '%s\n' transformers==4.46.3 torch==2.13.0 numpy pillow protobuf safetensors sentencepiece | $(BIN)/uv pip compile - --python-version 3.11 --no-header --no-annotate -q -o requirements-transformers-4.46.lock
	sed -i -E '/^(nvidia-|cuda-|triton)/d; s/\+cpu$$//' requirements-test.lock requirements-transformers-4.46.lock

clean:
	rm -rf $(VENV) $(OLD) .libtpu build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
