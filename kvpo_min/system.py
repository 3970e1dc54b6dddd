"""What a run shares with its machine: the other processes, signals, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------ processes


def join_processes() -> None:
    """Under torchrun or `share_work`: joins the other processes and takes the GPU that is this one's. Otherwise
    nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=12))  # one process writes while the others wait


def processes_for(wanted: int, groups: int) -> int:
    """How many processes are to share the groups of an update: `wanted`, or for 0 as many as there are cores, and no
    more than divide the groups evenly. 1 under torchrun, and where processes cannot be joined."""
    if "WORLD_SIZE" in os.environ or not dist.is_available() or sys.platform == "win32":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return wanted or max(n for n in range(1, max(1, cores) + 1) if groups % n == 0)


@contextlib.contextmanager
def share_work(n: int, command: Sequence[str]) -> Iterator[None]:
    """Starts n - 1 further processes of `kvpo-min COMMAND`, of one thread each, which this one then meets in
    `join_processes`, as if torchrun had started them all. On a CPU two processes of one thread are nearly twice as fast
    as one of two threads. They are in a session of their own, so that Ctrl-C reaches this process alone, which saves
    what there is, and they end with it. Raises RuntimeError when one does not start."""
    if n == 1:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    malloc = {"MALLOC_TRIM_THRESHOLD_": "16000000000", "MALLOC_MMAP_THRESHOLD_": "8000000000"}  # memory is kept
    code = "import sys; from kvpo_min.cli import main; import torch; print(flush=True); sys.exit(main(sys.argv[1:]))"
    before, threads, helpers = dict(os.environ), torch.get_num_threads(), []
    try:
        for rank in range(1, n):
            mine = before | malloc | shared | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            helpers.append(subprocess.Popen([sys.executable, "-c", code, *command], env=mine, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.PIPE, start_new_session=True))  # fmt: skip
        for helper in helpers:
            if not helper.stdout.readline():
                raise RuntimeError(f"a process that was to share the work ended with exit code {helper.wait()}")
        os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
        torch.set_num_threads(1)
        yield
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ |= before


def processes() -> tuple[int, int]:
    """-> the rank of this process, and how many there are; (0, 1) without torchrun"""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(value) -> list:
    """The value that each process gives, in the order of their ranks."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the first one's numbers, in place."""
    if processes()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def sum_over_all(tensor: Tensor) -> Tensor:
    """Adds up the tensors of all processes, in place."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(weights: Sequence[Tensor]) -> None:
    """Adds up the gradients of all processes, in one message."""
    if processes()[1] == 1:
        return
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    total = sum_over_all(torch.cat([g.flatten() for g in gradients]))
    for weight, part in zip(weights, total.split([w.numel() for w in weights]), strict=True):
        weight.grad = part.view_as(weight)


# -------------------------------------------------------------------------------------------------------------- signals


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done, so that it is done as a whole."""
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
        yield
        return
    came = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not Python's
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def ends_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, with which clusters end a job, is taken as Ctrl-C is."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Writes a file: afterwards it is on the disk, not only on its way there. Raises OSError that names it."""
    from safetensors import SafetensorError

    try:
        yield path
        sync(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OSError(f"{path} could not be written: {reason}. Free space there, or name another folder") from error


def sync(path: Path) -> None:
    """Waits until a file is on the disk, or the names in a folder, where the system can tell."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network disks refuse for folders
            raise
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------- text files of a run


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_text(path: Path, text: str) -> None:
    """Writes aside and renames, so that a file is either the old or the new one. Raises OSError naming it."""
    with writing(path.with_name(path.name + ".aside")) as aside:
        aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except Exception as error:  # malformed dates, tags and nesting raise nearly anything
        raise ValueError(f"{path} is not YAML: {error or type(error).__name__}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold lines like 'seed: 0', got a {type(content).__name__}")
    keys = [key.value for key, _ in tree.value]  # of a key that is there twice, YAML would take the last
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{path}: the key '{twice[0]}' is there twice; keep one")
    return content


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl. Raises ValueError naming a line that is no record of an update."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            lines.append(json.loads(line))
            lines[-1]["step"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: expected the JSON of an update, got {line[:60]!r} ({error})"
            ) from None
    return lines


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def finite(content):
    """JSON knows no nan: numbers that do not exist (the motion of prompts that name none) become null."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
