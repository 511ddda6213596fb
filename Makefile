# Paths are relative on purpose: make cannot name a target whose path has a space in it.
PYTHON ?= python3

# Where it is set, as in many containers, every process compiles what it imports anew: four seconds for PyTorch alone,
# several hundred times in the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-faults lint

setup: .venv/installed

demo: setup
	.venv/bin/python -m semore_bench.demo

test: setup browser
	.venv/bin/python -m pytest -q --numprocesses=2 --dist=loadfile

# Kills, full disks, damaged files and hostile servers, many more of them than in `make test`: a quarter of an hour.
test-faults: setup
	.venv/bin/python -m pytest -q --numprocesses=2 --dist=worksteal tests/faults --long

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Written last, so that an interrupted installation is taken up again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "semore-bench needs Python 3.11 or newer, and '$(PYTHON)' is not that: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv || { \
	    echo "could not create .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	.venv/bin/python -m uv pip install --python .venv/bin/python --editable '.[test]' --constraint constraints.txt
	@$(MAKE) --no-print-directory gl
	@touch $@

# What comes from the system, not from a wheel: MuJoCo draws through EGL or OSMesa, and the report page is tested in a
# browser.
.PHONY: gl browser
gl: PACKAGES := libegl1 libgl1 libgl1-mesa-dri libgles2 libosmesa6
gl: WITHOUT := check with '.venv/bin/semore-bench doctor' that MuJoCo can render.
browser: PACKAGES := chromium
browser: WITHOUT := without Chromium the tests of the report page are skipped.
gl browser:
	@if ! command -v apt-get > /dev/null; then echo "Not a Debian system: $(WITHOUT)"; exit; fi; \
	missing=; for package in $(PACKAGES); do \
	    dpkg-query --show --showformat='$${Status}' $$package 2> /dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "Not installed:$$missing; $(WITHOUT) To install: sudo apt-get install$$missing"; exit; fi; \
	echo "Installing:$$missing"; \
	apt-get update -qq || true; \
	for package in $$missing; do \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $$package > /dev/null \
	        || echo "Could not install $$package; $(WITHOUT)"; \
	done
