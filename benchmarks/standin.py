"""What `wan_update.py` measures with: seconds and peak bytes of a phase, and the memory and work of a network that is
not there: bytes that are alive, counted tensor by tensor, the cost of one call seen on fake tensors, and a stand-in
that allocates as much on the meta device."""

from __future__ import annotations

import contextlib
import resource
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside and are alive: `now`, and the largest so far, `peak`. A
    tensor on the meta device has no numbers; asked for one (is all of it finite?) it says 1."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        self.note((args, kwargs), False)  # what comes from outside is not counted
        out = func(*args, **kwargs)
        self.note(out, True)
        return out

    def note(self, tree, count: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    size = storage.nbytes() if count else 0
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, key, size).atexit = False

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_bytes(run: Callable, *args) -> int:
    with Live() as live:
        run(*args)
    return live.peak


def count_flops(run: Callable, *args) -> float:
    with FlopCounterMode(display=False) as counter:  # not inside Live: it keeps tensors alive
        run(*args)
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Cost:
    """Bytes and FLOPs of one call of the network, by kind: "forward", "encode", "gradient" (forward, recomputation and
    backward). Both grow linearly with the batch, FLOPs also with the tokens that are read."""

    seen: dict[tuple[str, int], float]  # (kind, batch 1 or 2): bytes; (kind, 0): FLOPs of a batch of 1
    past: int  # tokens that were read, but for the kind "alone"

    def bytes(self, kind: str, batch: int) -> int:
        one, two = self.seen[kind, 1], self.seen[kind, 2]
        return one + (two - one) * (batch - 1)

    def flops(self, kind: str, batch: int, past: int) -> float:
        reading = self.seen["forward", 0] - self.seen["alone", 0]
        full = self.seen["forward" if kind == "encode" else kind, 0]
        return batch * (full - reading * (1 - past / self.past))


def fake(module: torch.nn.Module) -> FakeTensorMode:
    """Replaces weights on the meta device by fake ones that say they are on the CPU: autocast passes over meta. -> the
    mode in which to run it"""
    mode = FakeTensorMode()
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    other = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                    is_weight = tensors is part._parameters
                    tensors[name] = torch.nn.Parameter(other, tensor.requires_grad) if is_weight else other
    return mode


class Standin:
    """Takes the network's place on the meta device: allocates what a call needs, and counts forwards and FLOPs."""

    def __init__(self, dims: tuple[int, int, int, int], cost: Cost, dtype: torch.dtype):
        """dims: layers, tokens of a frame, heads, channels of a head"""
        self.layers, *self.shape = dims
        self.cost, self.dtype, self.device = cost, dtype, torch.device("meta")
        self.forwards, self.flops = 0, 0.0
        self.weight = torch.zeros((), device="meta", requires_grad=True)

    def call(self, kind: str, n: int, kv: Tensor | None, out: int = 0) -> None:
        self.forwards += n
        self.flops += self.cost.flops(kind, n, 0 if kv is None else kv.shape[3])
        torch.empty(self.cost.bytes(kind, n) - out, dtype=torch.uint8, device="meta")  # alive for this instant

    def velocity(self, x, sigma, start, text, kv):
        self.call("gradient" if torch.is_grad_enabled() else "forward", len(x), kv)
        return x * self.weight

    def encode(self, x0, start, text, kv):
        out = torch.empty(self.layers, 2, *x0.shape[:2], *self.shape, dtype=self.dtype, device="meta")
        self.call("encode", len(x0), kv, out.untyped_storage().nbytes())
        return out

    def text_keys(self, text):
        return torch.empty(self.layers, len(text), *self.shape[1:], device="meta")


@dataclass
class Meter:
    """Seconds and peak bytes of each phase; on the meta device bytes and FLOPs."""

    device: torch.device
    live: Live | None = None
    network: Standin | None = None
    rows: dict[str, dict] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        if self.live:
            self.live.peak = self.live.now
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        row = self.rows.setdefault(phase, {"seconds": 0.0, "peak": 0, "forwards": 0, "flops": 0.0})
        done = (self.network.forwards, self.network.flops) if self.network else (0, 0.0)
        begun = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = self.live.peak if self.live else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row["seconds"] += time.perf_counter() - begun
        row["peak"] = max(row["peak"], peak)
        if self.network:
            row["forwards"] += self.network.forwards - done[0]
            row["flops"] += self.network.flops - done[1]
