# make env | plan-env | demo | demo-full | test | test-slow | test-newest | lint | lock | clean
#
# .venv, to use and for the demo, is of the newest Python found here. .venv-test is of the newest for which torch comes
# without CUDA's libraries, since the tests compare with torch on CPU. A Python that is named serves for both:
# make PYTHON=python3.12 ... Exported models are also tried with an old transformers, in an environment of its own. All
# are installed from the lock files, which serve every Python that the package does.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell tools/pythons.sh)
else
TEST_PYTHON ?= $(PYTHON)
NAMED := $(PYTHON)
endif
VENV := .venv
TEST := .venv-test
OLD := .venv-transformers-4.46
UV := .uv/bin/uv
TORCH := torch==2.13.0
OLD_TRANSFORMERS := transformers==4.46.3
# uv reads its own variables; a machine that sets pip's is understood all the same.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Modules are compiled once, here: where Python may not write them, each start of a program would compile them anew, which
# takes as long as loading them does.
export UV_COMPILE_BYTECODE := 1

# Into the environment whose mark ($@) is made; the package itself as it lies here.
install = VIRTUAL_ENV=$(CURDIR)/$(@D) $(UV) pip install --quiet
package = $(install) --no-deps -e .
.PHONY: env test-env newest-env plan-env demo demo-full test test-slow test-newest lint lock clean same

env: same $(VENV)/.installed
test-env: $(TEST)/.installed $(OLD)/.installed
	@$(MAKE) --no-print-directory $(TEST)/libtpu/.installed || $(no-libtpu)
newest-env: same $(VENV)/.installed-test
	@$(MAKE) --no-print-directory $(VENV)/libtpu/.installed || $(no-libtpu)
plan-env: env $(VENV)/libtpu/.installed
no-libtpu = echo 'the TPU compiler cannot be had here: the tests of its programs are skipped'

# An environment keeps its Python; another one that is named later is refused instead of ignored.
same:
	@test -z "$(NAMED)" -o ! -x $(VENV)/bin/python || test "$$($(VENV)/bin/python -V)" = "$$("$(NAMED)" -V 2>&1)" || \
		{ echo "$(VENV) is of $$($(VENV)/bin/python -V), not of $(NAMED): make clean takes it away" >&2; exit 1; }

$(UV):
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'calm_jax needs Python 3.11 or newer, and $(or $(PYTHON:%=% is not),none was found here); name one: make PYTHON=python3.13 ...' >&2; exit 1; }
	"$(PYTHON)" -m venv .uv
	.uv/bin/python -m pip install --quiet uv

$(VENV)/bin/python: | $(UV)
	$(UV) venv --quiet --seed --python "$$("$(PYTHON)" -c 'import sys; print(sys.executable)')" $(VENV)

$(VENV)/.installed: requirements.lock setup.cfg | $(VENV)/bin/python
	$(install) -r requirements.lock
	$(package)
	touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	$(install) -r requirements-test.lock
	touch $@

$(TEST)/bin/python: | $(UV)
	python=$(or $(TEST_PYTHON),$$(tools/pythons.sh $(UV) $(TORCH))) && $(UV) venv --quiet --seed --python "$$python" $(TEST)

$(TEST)/.installed: requirements-parity.lock setup.cfg | $(TEST)/bin/python
	$(install) -r requirements-parity.lock
	$(package)
	touch $@

$(OLD)/.installed: requirements-transformers-4.46.lock | $(UV)
	python=$$(tools/pythons.sh $(UV) $(TORCH) $(OLD_TRANSFORMERS)) && $(UV) venv --quiet --python "$$python" $(OLD)
	$(install) -r requirements-transformers-4.46.lock
	touch $@

# JAX itself names the TPU compilers that fit it. In an environment's folder but not among its packages: there JAX would
# look for a TPU at each start.
%/libtpu/.installed: | %/bin/python
	$(UV) pip install --quiet --python $*/bin/python --target $(@D) --no-deps "$$($*/bin/python -c \
		'import importlib.metadata as m; print(next(r for r in m.requires("jax") if r.startswith("libtpu")).split(";")[0])')"
	touch $@

demo: env
	$(VENV)/bin/python -m tools.demo --workdir runs/demo

demo-full: env
	$(VENV)/bin/python -m tools.demo --full --workdir runs/demo-full

test: test-env
	$(TEST)/bin/ruff check .
	$(TEST)/bin/python -m pytest

# What `make test` leaves out: faults, thorough sweeps, whole programs at work for long.
test-slow: test-env
	$(TEST)/bin/python -m pytest -m slow

# What needs no torch, with the newest Python and JAX; the rest says that it is skipped.
test-newest: newest-env
	$(VENV)/bin/python -m pytest

lint: test-env
	$(TEST)/bin/ruff check .

# One lock serves Python 3.11 and later, by markers; what a lock file holds stays until the file is removed. Torch's plain
# version is pinned without what it needs on a GPU: any build of that version will do.
compile = UV_FIND_LINKS= $(UV) pip compile --universal --python-version 3.11 --no-header --no-annotate --quiet
torchless = sed -i -E '/^(nvidia-|cuda-|triton)/d; s/^(torch==[0-9.]+).*/\1/'
lock: | $(UV)
	$(compile) setup.cfg --extra demo -o requirements.lock
	$(compile) setup.cfg --extra test --extra dev -c requirements.lock -o requirements-test.lock
	echo $(TORCH) | $(compile) setup.cfg --extra test --extra parity --extra dev -c requirements-test.lock -c - -o requirements-parity.lock
	printf '%s\n' $(OLD_TRANSFORMERS) $(TORCH) numpy pillow protobuf safetensors sentencepiece | $(compile) - -o requirements-transformers-4.46.lock
	$(torchless) requirements-parity.lock requirements-transformers-4.46.lock

clean:
	rm -rf .uv $(VENV) $(TEST) $(OLD) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
