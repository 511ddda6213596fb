"""Settings for all tests."""

import os

# One thread per process: several of them share the machine, in the tests more than anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
