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
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------------------ processes


def writes() -> bool:
    """Whether this process is to write files: the first one, also before the processes have met."""
    return number_in_environment("WORLD_SIZE", 1) == 1 or number_in_environment("RANK") == 0


def join_processes() -> None:
    """Under torchrun or `share_work`: joins the other processes and takes the GPU that is this one's. Otherwise
    nothing."""
    world = number_in_environment("WORLD_SIZE", 1)
    if world == 1 or dist.is_initialized():
        return
    if (rank := number_in_environment("RANK")) >= world:
        raise ValueError(f"the environment variable RANK must be below WORLD_SIZE {world}, got {rank}")
    if number_in_environment("MASTER_PORT") > 65535:
        raise ValueError(f"the environment variable MASTER_PORT must be a port, got {os.environ['MASTER_PORT']}")
    if (local := number_in_environment("LOCAL_RANK")) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=12))  # one process writes while the others wait


def processes_for(wanted: int, groups: int) -> int:
    """How many processes are to share the groups of an update: `wanted`, or for 0 as many as there are cores, and no
    more than divide the groups evenly. 1 under torchrun, and where processes cannot be joined. Raises ValueError."""
    if wanted and groups % wanted:
        raise ValueError(f"{wanted} processes cannot share groups_per_update {groups}: give a multiple of {wanted}")
    if number_in_environment("WORLD_SIZE", 1) > 1 or not dist.is_available() or sys.platform == "win32":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return wanted or max(n for n in range(1, max(1, cores) + 1) if groups % n == 0)


@contextlib.contextmanager
def share_work(n: int, command: Sequence[str], meanwhile: Callable[[], None]) -> Iterator[None]:
    """Starts n - 1 further processes of `kvpo-min COMMAND`, of one thread each, which this one then meets in
    `join_processes`, as if torchrun had started them all. On a CPU two processes of one thread are nearly twice as fast
    as one of two threads. They are in a session of their own, so that Ctrl-C reaches this process alone, which saves
    what there is, and they end with it. `meanwhile`: what this one does while they start. Raises RuntimeError when one
    does not start."""
    if n == 1:
        meanwhile()
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    malloc = {"MALLOC_TRIM_THRESHOLD_": "16000000000", "MALLOC_MMAP_THRESHOLD_": "8000000000"}  # memory is kept
    # glibc's lists of small free blocks hold the edges of freed tensors, which then cannot be used for tensors again
    malloc |= {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}
    code = "import sys; from kvpo_min.cli import main, run; print(flush=True); sys.exit(main(sys.argv[1:]))"
    before, threads, helpers = dict(os.environ), torch.get_num_threads(), []
    try:
        for rank in range(1, n):
            threads_of = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # MKL's own would win over OpenMP's
            mine = malloc | before | shared | threads_of | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            helpers.append(subprocess.Popen([sys.executable, "-c", code, *command], env=mine, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.PIPE, start_new_session=True))  # fmt: skip
        meanwhile()
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


def number_in_environment(name: str, default: int | None = None) -> int:
    """One of the numbers that torchrun sets. Raises ValueError naming the variable."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isascii() or not text.isdigit() or name == "WORLD_SIZE" and int(text) < 1:
        wanted = "a number, as torchrun sets it" + (", and it must come with WORLD_SIZE" if default is None else "")
        raise ValueError(f"the environment variable {name} must be {wanted}, got {text!r}; start with torchrun")
    return int(text)


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


# All signals that end a process and can be caught; a system may lack some.
ENDING = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "ALRM",
          "VTALRM", "PROF", "BREAK") if hasattr(signal, f"SIG{name}")]  # fmt: skip


@contextlib.contextmanager
def handling(handler, *kinds) -> Iterator[None]:
    """Installs `handler`, for the block, for the ending signals whose handler is one of `kinds` (none given: any but
    "ignore", which nohup sets, and those that are not Python's). In the main thread only, where signals come."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ENDING}
    before = {n: old for n, old in before.items() if (old in kinds if kinds else old not in (None, signal.SIG_IGN))}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and all other ending signals wait until the block is done, so that it is done as a whole."""
    came = []
    try:
        with handling(lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def ends_like_ctrl_c():
    """For a block: every signal that would end the process, such as SIGTERM of a cluster or SIGHUP of a terminal that
    is closed, is taken as Ctrl-C is."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    return handling(interrupt, signal.SIG_DFL)


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


# -------------------------------------------------------------------------------------------------------------- folders

CLAIM = ".claim"  # in an output folder: the host and process that write there
STALE = 120.0  # seconds without a sign of life after which a claim of another machine no longer counts


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it: whoever else wants it meanwhile gets FileExistsError. Raises OSError where nothing
    can be written. What was made goes again if nothing was put into it.

    A lock on the file `.claim` decides, which the system frees with its process. Where the disk knows no locks, or does
    not share them, decide the process, or the file's age by the disk's own clock: a thread renews it."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    beat, path, descriptor = threading.Event(), folder / CLAIM, None

    def renew():
        while not beat.wait(STALE / 6):
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                holder = holder_of(descriptor, folder)
                if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
                os.close(descriptor)  # its holder deleted it in this moment
            if not holder:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
                os.fsync(descriptor)
        except OSError as error:
            above = next((place for place in folder.parents if place.exists()), None)
            if above and not above.is_dir():
                raise NotADirectoryError(f"{above} is a file, so {folder} cannot be made; name another place") from None
            what_to_do = "free space, or name another --output_dir"
            raise OSError(f"{folder} cannot be written to: {error.strerror}; {what_to_do}") from error
        if holder:
            os.close(descriptor)
            descriptor = None
            raise FileExistsError(
                f"{folder} is in use: {holder} writes there. Wait for it, or name another folder; should it be dead, "
                f"its claim ({path.name}) no longer counts after {STALE:.0f} seconds"
            )
        threading.Thread(target=renew, daemon=True).start()
        yield
    finally:
        beat.set()
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    path.unlink()
            os.close(descriptor)
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def holder_of(descriptor: int, folder: Path) -> str:
    """Locks an open claim. -> who else holds it, in words, or "" """
    host, _, process = os.pread(descriptor, 200, 0).decode(errors="replace").strip().rpartition(" ")
    words = f"process {process} on {host}" if host else "another process"
    locked = False
    if fcntl:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            return words
        except OSError:  # this disk knows no locks
            pass
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"kvpo")  # a full disk is seen now
        probe.flush()
        age = os.fstat(probe.fileno()).st_mtime - os.fstat(descriptor).st_mtime
    if host and host != socket.gethostname():
        return words if age < STALE else ""
    if host and not locked and process.isdigit() and int(process) != os.getpid():
        with contextlib.suppress(OSError):
            os.kill(int(process), 0)
            return words
    return ""


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    parts = {name: t for name, t in weights.items() if t.is_floating_point() and t.numel() and not t.is_meta}
    return [name for name, t in parts.items() if not torch.stack(t.detach().float().aminmax()).isfinite().all()]


# -------------------------------------------------------------------------------------------------- text files of a run

MOST_TEXT = 2**26  # bytes of a text file that is read: a larger one is no config, no list of prompts


def read_text(path: Path) -> str:
    """A text file, whose size is looked at before it is read. Raises ValueError naming it, and OSError."""
    if path.stat().st_size > MOST_TEXT:
        raise ValueError(f"{path} is too large for a text file: {path.stat().st_size} bytes, at most {MOST_TEXT}")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8; save it as one") from None


def load_tensors(path: Path):
    """What torch.save wrote, without running code of the file. Raises pickle.UnpicklingError for what could be code,
    and ValueError for an archive that would be larger in memory than on the disk, before it is read."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            sizes = [part.file_size for part in archive.infolist()]
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
        if packed or sum(sizes) > path.stat().st_size:
            raise ValueError("its parts are compressed, which torch.save never does")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_text(path: Path, text: str) -> None:
    """Writes aside and renames, so that a file is either the old or the new one. Raises OSError naming it."""
    path = Path(os.path.realpath(path))  # a link stays one
    with writing(path.with_name(path.name + ".aside")) as aside:
        aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    try:
        text = read_text(path)
        check_aliases(tree := yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
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


def check_aliases(tree) -> None:
    """Raises ValueError where an alias stands for more than one value: lists of such make a small file huge."""
    seen, left = set(), [tree] if tree else []
    while left:
        node = left.pop()
        if isinstance(node, yaml.ScalarNode):
            continue
        if id(node) in seen:
            raise ValueError("an alias (*) may stand for a single value only: write the list out")
        seen.add(id(node))
        left += node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl. Raises ValueError naming a line that is no record of an update."""
    lines = []
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else [], start=1):
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
