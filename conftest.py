"""pytest runs the notebooks small: KVPO_FAST=1 changes sizes only, and kernels inherit it. `KVPO_FAST=0 pytest` runs
them in full."""

import os

os.environ.setdefault("KVPO_FAST", "1")
