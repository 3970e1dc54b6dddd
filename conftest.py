"""pytest runs the notebooks small: KVPO_FAST=1 changes sizes only, and kernels inherit it. `KVPO_FAST=0 pytest` runs
them in full. Each of pytest's processes and each kernel uses one thread, so that two of them fit on two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KVPO_FAST", "1")
