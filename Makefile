# Paths are relative on purpose: make cannot name a target whose path has a space in it.
PYTHON ?= python3

# Where it is set, as in many containers, every process compiles what it imports anew: four seconds for PyTorch alone,
# several hundred times in the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup system demo test test-faults lint docs missing

setup: .venv/installed
	@$(MAKE) --no-print-directory missing

demo: setup
	.venv/bin/python -m semore_bench.demo

test: setup
	.venv/bin/python -m pytest -q --numprocesses=3 --dist=worksteal

# Kills, full disks, damaged files and hostile servers, many more of them than in `make test`: some ten minutes.
test-faults: setup
	.venv/bin/python -m pytest -q --numprocesses=3 --dist=worksteal --long tests/faults tests/test_sweep.py

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: setup
	.venv/bin/python -m semore_bench.pages

# Written last, so that an interrupted installation is taken up again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	    echo "semore-bench needs Python 3.11 or 3.12 (dm_control has no wheels for others), and '$(PYTHON)' is not that: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv || { \
	    echo "could not create .venv; on Debian and Ubuntu: make system" >&2; exit 1; }
	.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	.venv/bin/python -m uv pip install --python .venv/bin/python --editable '.[test]' --constraint constraints.txt
	@touch $@

# What comes from the system, not from a wheel: MuJoCo draws through EGL or OSMesa, the report page is tested in a browser,
# and Debian's Python makes environments with a package of its own.
PACKAGES := libegl1 libgl1 libgl1-mesa-dri libgles2 libosmesa6 chromium
# Prints those that are not installed; nothing where packages have other names.
define LIST_MISSING
command -v dpkg-query > /dev/null || exit 0; \
for package in $(PACKAGES); do \
    dpkg-query --show --showformat='$${Status}' $$package 2> /dev/null | grep -q 'ok installed' || printf '%s ' $$package; \
done; \
$(PYTHON) -c 'import ensurepip' 2> /dev/null || printf 'python3-venv '
endef

missing:
	@missing=$$($(LIST_MISSING)); if [ -n "$$missing" ]; then \
	    echo "Not installed: $$missing(for MuJoCo's rendering; chromium: for the tests of the report page)."; \
	    echo "To install: make system"; \
	fi

# Root, or sudo, is needed; a package that cannot be installed stops nothing: `semore-bench doctor` says what follows.
system:
	@if ! command -v apt-get > /dev/null; then \
	    echo "Not a Debian system; '.venv/bin/semore-bench doctor' checks after 'make setup' that MuJoCo can render."; exit; \
	fi; \
	missing=$$($(LIST_MISSING)); if [ -z "$$missing" ]; then exit; fi; \
	sudo=; if [ "$$(id -u)" != 0 ]; then sudo=sudo; fi; \
	if [ -n "$$sudo" ] && ! command -v sudo > /dev/null; then \
	    echo "Not installed, and you are not root: $$missing"; exit; \
	fi; \
	echo "Installing: $$missing"; \
	$$sudo apt-get update -qq || true; \
	for package in $$missing; do \
	    $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$package > /dev/null \
	        || echo "Could not install $$package"; \
	done
