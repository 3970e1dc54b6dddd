"""pytest runs the notebooks small: KVPO_FAST=1 changes sizes only, and kernels inherit it. `KVPO_FAST=0 pytest` runs
them in full. Each of pytest's processes and each kernel uses one thread, so that two of them fit on two cores. None
reaches the network (tests/offline/sitecustomize.py)."""

import os
import runpy
import signal
from pathlib import Path

OFFLINE = Path(__file__).parent / "tests" / "offline"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KVPO_FAST", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background job; Ctrl-C is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path(str(OFFLINE / "sitecustomize.py"))
