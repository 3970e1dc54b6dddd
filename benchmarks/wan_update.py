"""One KVPO update at the size of Wan2.1-1.3B: what it needs, and what it takes. Random weights, nothing to download.

    python benchmarks/wan_update.py --plan              memory, FLOPs and time for several settings; needs no GPU
    python benchmarks/wan_update.py --branch_batch 1    the update itself, measured, next to its plan
    python benchmarks/wan_update.py --naive             the authors' schedule too, on the same machine in the same run
    python benchmarks/wan_update.py --small --naive     a small model, for a CPU

The plan is no formula: it runs the very update below on the meta device, with a stand-in for the network that allocates
what one forward (and backward) of the real one allocates on fake tensors, and counts every byte that is alive. So it
knows what rollout.py keeps, copies and drops.

Not in it: the prompt encoder (run once, freed) and the reward models (processes of their own, random advantages here).
The authors' schedule is its order of work: the prefix's whole history copied to the host and back for every branch,
branches one by one, three policies replayed, every step of every block alone, one graph over all branches. Their copy
of all caches in every forward is left out. Both schedules must give the same loss and gradients before a time is
printed: to 1e-4 in float32 (with bfloat16 the difference is printed).
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kvpo_min import chr as routing
from kvpo_min.bank import Bank
from kvpo_min.config import TrainConfig
from kvpo_min.grpo import kvpo_loss
from kvpo_min.kvpo import replay_energies
from kvpo_min.policies import acting, adapter_weights, add_policies, copy_adapter
from kvpo_min.rollout import (
    KVHistory,
    Sampler,
    Stream,
    draw_noise,
    fork,
    generate,
    keep_frames,
    pieces,
    segment_at,
    switch_reach,
)
from kvpo_min.tve import calibrate_tau, gibbs_log_prob, schedule, trajectory_energy
from kvpo_min.wan.real import SWITCHES, MixedBackbone, decode_stream

GIB = 2**30
WINDOW, NEAREST = routing.Window(), 1


@dataclass(frozen=True)
class Size:
    """A model and an update."""

    transformer: dict  # of WanTransformer3DModel
    vae: dict  # of AutoencoderKLWan
    latent: tuple[int, int, int]  # C, H, W
    words: tuple[int, int]  # tokens and width of an encoded prompt
    num_frames: int = 147
    fork: int = 57
    num_generations: int = 8
    perturb_num_blocks: int = 5  # routed
    grad_steps: int = 2
    rank: int = 256
    global_frames: int = 126  # as configs/longlive_single_gpu.yaml: to the end of the video
    bank_size: int = 0  # frames of MemFlow's memory bank

    @property
    def chunk_end(self) -> int:
        return routing.chunk_of(self.fork, self.num_frames).stop

    @property
    def stop(self) -> int:
        return min(self.num_frames, self.chunk_end + self.global_frames)


FULL = Size(
    dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30), {}, (16, 60, 104), (512, 4096)
)
SMALL = Size(
    dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=48, num_layers=2, text_dim=32, freq_dim=32),
    dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1), (16, 4, 4), (7, 32),
    num_frames=42, fork=21, num_generations=2, rank=4, global_frames=3,
)  # fmt: skip


@dataclass
class Model:
    backbone: object  # rollout.Backbone
    decode: Callable[[Tensor], None]  # latents [1, T, C, H, W] of one video; the pixels go to the host
    policies: object  # from train.add_policies
    optimizer: torch.optim.Optimizer
    vae: torch.nn.Module
    device: torch.device

    @property
    def weights(self) -> list[Tensor]:
        return list(adapter_weights(self.policies, "default").values())


def build(size: Size, device: str, dtype: torch.dtype) -> Model:
    """Random weights in `dtype`, except what diffusers keeps in float32, and the adapters; `default` and `old` differ
    from the initial policy."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(**size.transformer).eval().requires_grad_(False)
        vae = AutoencoderKLWan(**size.vae).eval().requires_grad_(False)
        for weight in vae.parameters():
            weight.data = weight.data.to(dtype)
        for name, weight in transformer.named_parameters():
            if not set(name.split(".")) & set(transformer._keep_in_fp32_modules):
                weight.data = weight.data.to(dtype)
        transformer.enable_gradient_checkpointing()
        backbone = MixedBackbone(transformer, dtype)
        config = TrainConfig(rank=size.rank, lora_alpha=size.rank)
        policies = add_policies(SimpleNamespace(backbone=backbone), config)
        for name, weight in adapter_weights(policies, "default").items():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        copy_adapter(policies, "default", "old")
    optimizer = torch.optim.AdamW(adapter_weights(policies, "default").values(), lr=1e-5)

    return Model(backbone, partial(decode_video, vae), policies, optimizer, vae, torch.device(device))


@torch.no_grad()
def decode_video(vae, latents: Tensor) -> None:
    """latents [1, T, C, H, W]; the pixels go to the host, latent frame by latent frame."""
    for frames in decode_stream(vae, latents.split(1, 1)):
        frames.cpu()


def fill_moments(model: Model) -> None:
    """The optimizer as it is after a first update: it holds its moments. The weights stay."""
    group = model.optimizer.param_groups[0]
    rate, group["lr"] = group["lr"], 0.0
    for weight in model.weights:
        weight.grad = torch.zeros_like(weight)
    model.optimizer.step()
    model.optimizer.zero_grad()
    group["lr"] = rate


@dataclass(frozen=True)
class Task:
    """The same for both schedules: what is random, and what follows from the size."""

    size: Size
    texts: list[Tensor]
    noise: Tensor
    plan: routing.Plan
    sampler: Sampler
    advantages: Tensor


def draw_task(size: Size, device: torch.device) -> Task:
    generator = torch.Generator().manual_seed(0)
    n_routed, sigmas = WINDOW.past - NEAREST, schedule()
    pool = routing.pool(size.fork, WINDOW, NEAREST, size.perturb_num_blocks)
    routes = routing.uniform_routes(pool, n_routed, size.num_generations, generator)
    noise = draw_noise(size.stop // WINDOW.block, len(sigmas), (WINDOW.block, *size.latent), generator)
    switches = tuple(s for s in SWITCHES if s < size.stop)
    texts = torch.randn(len(switches) + 1, 1, *size.words, generator=generator)
    advantages = torch.randn(size.num_generations, generator=generator)
    return Task(
        size, list(texts.to(device)), noise.to(device),
        routing.Plan(size.fork, pool, routes, size.perturb_num_blocks), Sampler(sigmas, WINDOW, switches),
        advantages.to(device),
    )  # fmt: skip


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
        done = (self.network.forwards, self.network.flops) if self.network else (0, 0.0)
        begun = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = self.live.peak if self.live else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {"seconds": time.perf_counter() - begun, "peak": peak}
        if self.network:
            row |= {"forwards": self.network.forwards - done[0], "flops": self.network.flops - done[1]}
        self.rows[phase] = row


# ----------------------------------------------------------------------------------------------------------- our update


def update(model: Model, task: Task, branch_batch: int, replay_batch: int, meter: Meter) -> tuple[Tensor, list[Tensor]]:
    """One update as `train.train` does it, phase by phase; -> loss () and the gradients, on the host (none on the meta
    device)."""
    size, plan, backbone, policies = task.size, task.plan, model.backbone, model.policies
    near = range(plan.fork - switch_reach(WINDOW), plan.fork)
    with torch.no_grad(), acting(policies, "old"):
        with meter("prefix"):
            empty = Stream(bank=Bank(size.bank_size) if size.bank_size else None)
            prefix = generate(backbone, empty, task.texts, task.noise, plan.fork, task.sampler)
            prefix = keep_frames(prefix, {*range(WINDOW.sink), *plan.routes.flatten().tolist(), *near})
        with meter("branches"):
            rollout = fork(
                backbone, task.texts, task.noise, plan, size.stop, size.chunk_end, task.sampler, NEAREST, branch_batch,
                prefix,
            )  # fmt: skip
    del prefix
    read = {*range(WINDOW.sink), *near[-WINDOW.past :]}  # by replays
    rollout = replace(rollout, prefix=keep_frames(rollout.prefix, read))
    with meter("decode"):
        decode(model, rollout.videos, size)

    def energies() -> Tensor:  # [G]
        each = torch.zeros(rollout.trajectory.z[: size.num_generations].shape[:3], device=model.device)
        for where, part, sampler in pieces(backbone, rollout, task.sampler, replay_batch):
            each[where] = replay_energies(backbone, part, sampler)
        return trajectory_energy(each)

    with torch.no_grad():
        with meter("replay, initial policy"), acting(policies, "initial"):
            E_init = energies()
        with meter("replay"):
            E = energies()
    loss, slope = objective(E, E, E_init, task.advantages)  # the old policy is the current one
    with meter("replay with gradient"):
        for where, part, sampler in pieces(backbone, rollout, task.sampler, replay_batch, size.grad_steps):
            each = replay_energies(backbone, part, sampler, len(sampler.sigmas))
            (each * slope[where[0], None, None]).sum().backward()
    return loss, step(model, meter)


def decode(model: Model, videos: Tensor, size: Size) -> None:
    """From the fork's chunk to the end of the videos [G + 1, T, C, H, W]: what rewards look at."""
    chunk = routing.chunk_of(size.fork, size.num_frames).start
    for video in videos.split(1):
        model.decode(video[:, chunk:])


def step(model: Model, meter: Meter) -> list[Tensor]:
    """The optimizer and the moving average; -> the gradients before, on the host."""
    if model.device.type == "meta":
        return []
    gradients = [weight.grad.to("cpu", copy=True) for weight in model.weights]
    with meter("optimizer"):
        torch.nn.utils.clip_grad_norm_(model.weights, 1.0)
        model.optimizer.step()
        copy_adapter(model.policies, "default", "ema", 0.001)
    model.optimizer.zero_grad()
    return gradients


def objective(E: Tensor, E_old: Tensor, E_init: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """-> loss (), dL/dE [G]; tau from the spread of E_old"""
    tau = 1.0 if E.is_meta else calibrate_tau(E_old[None])
    leaf = E.detach().requires_grad_()
    log_p, log_p_old, log_p_init = (gibbs_log_prob(e, tau) for e in (leaf, E_old, E_init))
    loss = kvpo_loss(log_p, log_p_old, log_p_init, advantages).total
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# ---------------------------------------------------------------------------------------------- the authors' schedule


def naive(model: Model, task: Task, meter: Meter) -> tuple[Tensor, list[Tensor]]:
    """The same update in the order of the authors' trainer (kvpo.py:985-1582, 2257-2393); see the top of this file.
    Written without `fork` and `replay`, so that it checks them. -> loss (), gradients on the host"""
    size, plan, backbone, policies, sampler = task.size, task.plan, model.backbone, model.policies, task.sampler
    trails: list[list] = []
    with torch.no_grad(), acting(policies, "old"):
        with meter("prefix"):
            prefix = generate(backbone, Stream(), task.texts, task.noise, plan.fork, sampler)
            host = {f: kv.cpu() for f, kv in prefix.history.frames.items()}
            prefix = replace(prefix, history=KVHistory())

        def restored() -> KVHistory:
            return KVHistory({f: kv.to(model.device, copy=True) for f, kv in host.items()})

        with meter("branches"):
            videos = []
            for routes in [*plan.routes.split(1), None]:
                trails.append([])

                def reads(start: int, routes=routes) -> Tensor:
                    if routes is None or start >= plan.fork + plan.perturb_num_blocks * WINDOW.block:
                        return routing.ordinary_frames(start, WINDOW)
                    return routing.branch_frames(routes, start, WINDOW, NEAREST)[0]

                def record(start: int, z: Tensor, x0: Tensor, trail=trails[-1]) -> None:
                    if start < size.chunk_end:
                        trail.append((start, z, x0))

                stream = replace(prefix, history=restored())
                stream = generate(backbone, stream, task.texts, task.noise, size.stop, sampler, reads, record)
                videos.append(stream.latents)
    with meter("decode"):
        decode(model, torch.cat(videos), size)

    text = task.texts[segment_at(plan.fork, sampler.switches)]

    def energy(trail: list) -> Tensor:  # ()
        history, total = restored(), 0.0
        for start, z, x0 in trail:
            kv = history.read(routing.ordinary_frames(start, WINDOW))
            for s, sigma in enumerate(sampler.sigmas):
                with torch.set_grad_enabled(torch.is_grad_enabled() and s < size.grad_steps):
                    v = backbone.velocity(z[:, s], sigma[None], start, text, kv)
                total = total + (v - (z[:, s] - x0[:, s]) / sigma).square().mean()
            history = history.append(start, backbone.encode(x0[:, -1], start, text, kv))
        return total

    E = {}
    for policy in ("initial", "old"):
        with meter(f"replay, {policy} policy"), torch.no_grad(), acting(policies, policy):
            E[policy] = torch.stack([energy(trail) for trail in trails[:-1]])
    with meter("replay with gradient"):
        current = torch.stack([energy(trail) for trail in trails[:-1]])
        loss, slope = objective(current, E["old"], E["initial"], task.advantages)
        (current * slope).sum().backward()
    return loss, step(model, meter)


def difference(ours: tuple, theirs: tuple) -> tuple[float, float]:
    """-> relative difference of two losses, and of two lists of gradients (norm of the difference over the norm)"""
    norm = sum(g.square().sum() for g in theirs[1]).sqrt()
    apart = sum((a - b).square().sum() for a, b in zip(ours[1], theirs[1], strict=True)).sqrt()
    return ((ours[0] - theirs[0]).abs() / theirs[0].abs()).item(), (apart / norm).item()


# ------------------------------------------------------------------------------------------------------------- the plan


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside and are alive: `now`, and the largest so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
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
    backward). Seen on fake tensors for 1 and 2 layers and batches of 1 and 2; from there both grow linearly, as do
    FLOPs with the tokens that are read; kind "alone" reads none."""

    seen_bytes: dict[tuple[str, int, int], int]  # (kind, layers, batch), reading `past` tokens
    seen_flops: dict[tuple[str, int], float]  # (kind, layers) of a batch of 1
    past: int
    layers: int

    def bytes(self, kind: str, batch: int) -> int:
        one, two = (self.deepen(self.seen_bytes[kind, 1, n], self.seen_bytes[kind, 2, n]) for n in (1, 2))
        return one + (two - one) * (batch - 1)

    def flops(self, kind: str, batch: int, past: int) -> float:
        kind = "forward" if kind == "encode" else kind
        kinds = (kind, "forward", "alone")
        full, forward, alone = (self.deepen(self.seen_flops[k, 1], self.seen_flops[k, 2]) for k in kinds)
        return batch * (full - (forward - alone) * (1 - past / self.past))

    def deepen(self, one, two):
        return one + (two - one) * (self.layers - 1)


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


def forward_backward(backbone, *call) -> None:
    backbone.velocity(*call).square().mean().backward()


def network_cost(size: Size, dtype: torch.dtype) -> Cost:
    frames, (_, height, width) = WINDOW.sink + WINDOW.past, size.latent
    per_frame, seen_bytes, seen_flops = height // 2 * (width // 2), {}, {}
    heads, head_dim = size.transformer["num_attention_heads"], size.transformer["attention_head_dim"]
    for layers in (1, 2):
        model = build(replace(size, transformer=size.transformer | {"num_layers": layers}), "meta", dtype)
        with fake(model.backbone):
            for weight in model.weights:
                weight.grad = torch.zeros_like(weight)
            backbone = model.backbone
            # the positions' table looks at frame numbers, which fake tensors do not have
            backbone.transformer.rope.turn = lambda at, h, w: torch.empty(
                1, at.shape[1] * h * w, 1, head_dim // 2, dtype=torch.complex64
            )
            for n in (1, 2):
                x, text = torch.empty(n, WINDOW.block, *size.latent), torch.empty(1, *size.words)
                kv = torch.empty(layers, 2, n, frames * per_frame, heads, head_dim, dtype=dtype)
                call = (x, torch.ones(n), 0, text)
                with torch.no_grad():
                    seen_bytes["forward", layers, n] = peak_bytes(backbone.velocity, *call, kv)
                    seen_bytes["encode", layers, n] = peak_bytes(backbone.encode, x, 0, text, kv)
                    if n == 1:
                        seen_flops["forward", layers] = count_flops(backbone.velocity, *call, kv)
                        seen_flops["alone", layers] = count_flops(backbone.velocity, *call, None)
                seen_bytes["gradient", layers, n] = peak_bytes(forward_backward, backbone, *call, kv)
                if n == 1:
                    seen_flops["gradient", layers] = count_flops(forward_backward, backbone, *call, kv)
    return Cost(seen_bytes, seen_flops, frames * per_frame, size.transformer["num_layers"])


def decode_cost(size: Size, vae: torch.nn.Module) -> tuple[int, float, float]:
    """-> bytes at the peak while a video is decoded, FLOPs of its first latent frame and of each later one. `vae` is on
    the meta device, and is fake afterwards."""
    with fake(vae):
        two, three = (torch.empty(1, n, *size.latent) for n in (2, 3))
        flops = [count_flops(decode_video, vae, z) for z in (two, three)]
        return peak_bytes(decode_video, vae, three), 2 * flops[0] - flops[1], flops[1] - flops[0]


class Standin:
    """Takes the network's place on the meta device: allocates what a call needs, and counts forwards and FLOPs."""

    def __init__(self, size: Size, cost: Cost, dtype: torch.dtype):
        per_frame = size.latent[1] // 2 * (size.latent[2] // 2)
        self.shape = (per_frame, size.transformer["num_attention_heads"], size.transformer["attention_head_dim"])
        self.cost, self.dtype, self.layers = cost, dtype, size.transformer["num_layers"]
        self.forwards, self.flops = 0, 0.0
        self.weight = torch.zeros((), device="meta", requires_grad=True)

    def call(self, kind: str, n: int, kv: Tensor | None, out: int = 0) -> None:
        self.forwards += n
        self.flops += self.cost.flops(kind, n, 0 if kv is None else kv.shape[3])
        torch.empty(self.cost.bytes(kind, n) - out, dtype=torch.uint8, device="meta")  # alive for this instant

    def velocity(self, x, sigma, start, text, kv):
        kind = "gradient" if torch.is_grad_enabled() else "forward"
        self.call(kind, len(x), kv)
        return x * self.weight

    def encode(self, x0, start, text, kv):
        shape = (self.layers, 2, *x0.shape[:2], *self.shape)
        out = torch.empty(shape, dtype=self.dtype, device="meta")
        self.call("encode", len(x0), kv, out.untyped_storage().nbytes())
        return out

    def text_keys(self, text):
        return torch.empty(self.layers, len(text), *self.shape[1:], device="meta")


@dataclass(frozen=True)
class Fixed:
    """Bytes that are there in every phase, or in some."""

    base: int
    vae: int
    adapter: int  # one of the three
    frame: int  # keys and values of one latent frame

    @property
    def always(self) -> int:  # base, VAE, default + old, two moments; ema lies on the CPU
        return self.base + self.vae + 4 * self.adapter


def plan_update(size: Size, dtype: torch.dtype, settings: list[tuple[int, int]]) -> tuple[Fixed, Cost, dict]:
    """-> what is fixed, cost of a call, {(branch_batch, replay_batch): {phase: {peak, forwards, flops}}}"""
    cost, model = network_cost(size, dtype), build(size, "meta", dtype)

    def count(weights) -> int:
        return sum(w.numel() * w.element_size() for w in weights)

    adapter = count(model.weights)
    vae = count(model.vae.parameters())
    decode_bytes, first_flops, later_flops = decode_cost(size, model.vae)
    heads, head_dim = size.transformer["num_attention_heads"], size.transformer["attention_head_dim"]
    tokens = size.latent[1] // 2 * (size.latent[2] // 2)
    frame = size.transformer["num_layers"] * 2 * tokens * heads * head_dim * dtype.itemsize
    fixed = Fixed(count(model.backbone.transformer.parameters()) - 3 * adapter, vae, adapter, frame)
    table = {}
    for setting in settings:
        network = Standin(size, cost, dtype)

        def decode(latents: Tensor, network=network) -> None:
            torch.empty(decode_bytes, dtype=torch.uint8, device="meta")
            network.flops += first_flops + (latents.shape[1] - 1) * later_flops

        task = draw_task(size, torch.device("meta"))
        with Live() as live:
            meter = Meter(torch.device("meta"), live, network)
            update(replace(model, backbone=network, decode=decode), task, *setting, meter)
        rows = meter.rows
        for phase, row in rows.items():
            row["peak"] += fixed.always + (adapter if phase == "replay with gradient" else 0)
        # gradients, and one temporary of their size in the fused AdamW
        rows["optimizer"] = {"peak": fixed.always + 2 * adapter, "forwards": 0, "flops": 0.0}
        table[setting] = rows
    return fixed, cost, table


def print_plan(size: Size, dtype: torch.dtype, settings: list[tuple[int, int]], tflops: float) -> None:
    fixed, cost, table = plan_update(size, dtype, settings)
    g, n_read = size.num_generations, WINDOW.sink + WINDOW.past + size.bank_size
    print(f"{size.latent[1] * 8} x {size.latent[2] * 8} pixels, {size.num_frames} latent frames, K = {g}, "
          f"P = {size.perturb_num_blocks}, fork at frame {size.fork}, videos to frame {size.stop}, "
          f"LoRA rank {size.rank}, "
          f"{str(dtype).removeprefix('torch.')}\n")  # fmt: skip
    print("| what | GiB |\n|---|---|")
    for what, size_of in (
        ("transformer, frozen", fixed.base),
        ("VAE, frozen", fixed.vae),
        ("LoRA, one adapter in float32", fixed.adapter),
        ("two adapters, default and old; ema lies on the CPU", 2 * fixed.adapter),
        ("AdamW's moments", 2 * fixed.adapter),
        ("there in every phase", fixed.always),
        ("gradients", fixed.adapter),
        ("keys and values of one latent frame", fixed.frame),
        (f"of {WINDOW.history} frames, a whole history", WINDOW.history * fixed.frame),
        (f"of {n_read} frames, what a block reads", n_read * fixed.frame),
        ("a forward's activations", cost.bytes("forward", 1)),
        ("a forward's and backward's, gradient checkpointing", cost.bytes("gradient", 1)),
    ):
        print(f"| {what} | {size_of / GIB:.2f} |")
    phases = list(next(iter(table.values())))
    print("\nPeak of each phase in GiB:\n")
    print("| branch_batch | replay_batch | " + " | ".join(phases) + " | largest |\n|" + "---|" * (len(phases) + 3))
    for (branch_batch, replay_batch), rows in table.items():
        peaks = [rows[phase]["peak"] / GIB for phase in phases]
        cells = " | ".join(f"{peak:.1f}" for peak in peaks)
        print(f"| {branch_batch} | {replay_batch} | {cells} | {max(peaks):.1f} |")
    print(f"\nWork, and time at {tflops:g} TFLOP/s:\n")
    print("| phase | forwards | PFLOP | seconds |\n|---|---|---|---|")
    rows = table[settings[0]]
    total = {"forwards": sum(r["forwards"] for r in rows.values()), "flops": sum(r["flops"] for r in rows.values())}
    for phase, row in (rows | {"sum": total}).items():
        print(f"| {phase} | {row['forwards']} | {row['flops'] / 1e15:.2f} | {row['flops'] / tflops / 1e12:.0f} |")


# ----------------------------------------------------------------------------------------------------------------- main


def measure(size: Size, device: str, dtype: torch.dtype, setting: tuple[int, int], with_naive: bool) -> dict:
    """-> {"ours": {phase: {seconds, peak}}, "naive": the same or None or "out of memory", "difference"}"""
    model = build(size, device, dtype)
    fill_moments(model)
    task = draw_task(size, model.device)
    meter, other, apart = Meter(model.device), Meter(model.device), None
    ours = update(model, task, *setting, meter)
    if with_naive:
        copy_adapter(model.policies, "old", "default")
        try:
            theirs = naive(model, task, other)
        except torch.OutOfMemoryError:
            return {"ours": meter.rows, "naive": "out of memory", "difference": None}
        apart = difference(ours, theirs)
        if dtype == torch.float32:
            assert max(apart) < 1e-4, f"the two schedules differ: loss by {apart[0]:.1e}, gradients by {apart[1]:.1e}"
    return {"ours": meter.rows, "naive": other.rows or None, "difference": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--small", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--naive", action="store_true", help="the authors' schedule too")
    parser.add_argument("--branch_batch", type=int, default=1, help="branches that are made at once")
    parser.add_argument("--replay_batch", type=int, default=1, help="forwards of a replay that run at once")
    parser.add_argument("--rank", type=int, default=0, help="of the LoRA; default 256, or 4 with --small")
    parser.add_argument("--fork", type=int, default=0, help="fork at this frame")
    parser.add_argument("--global_frames", type=int, default=None, help="frames after the fork's chunk")
    parser.add_argument("--bank_size", type=int, default=0, help="frames of MemFlow's memory bank (3); 0: LongLive")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=None, help="default: float32 with --small")
    throughput = "throughput for the plan's seconds; 66 is 40%% of an RTX 4090's 165 in bfloat16"
    parser.add_argument("--tflops", type=float, default=66.0, help=throughput)
    args = parser.parse_args()
    size = SMALL if args.small else FULL
    size = replace(size, rank=args.rank or size.rank, fork=args.fork or size.fork, bank_size=args.bank_size)
    if args.bank_size and args.naive:
        parser.error("the authors' schedule is written out for LongLive alone: give --bank_size or --naive")
    if args.global_frames is not None:
        size = replace(size, global_frames=args.global_frames)
    if size.fork not in (forks := routing.eligible_forks(size.num_frames, WINDOW, NEAREST, size.perturb_num_blocks)):
        parser.error(f"a fork at frame {size.fork} is not possible; these are: {forks}")
    if min(args.branch_batch, args.replay_batch) < 1:
        parser.error("branch_batch and replay_batch must be 1 or more")
    dtype = getattr(torch, args.dtype or ("float32" if args.small else "bfloat16"))
    if args.plan:
        g = size.num_generations
        print_plan(size, dtype, [(1, 1), (1, 2), (1, 4), (3, 4), (g + 1, 4 * g)], args.tflops)
        return
    if args.device == "cpu" and not args.small:
        parser.error("the full size needs a GPU; give --plan for its plan, or --small for a small model")
    setting = (args.branch_batch, args.replay_batch)
    _, _, table = plan_update(size, dtype, [setting])
    out = measure(size, args.device, dtype, setting, args.naive)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}, branch_batch {setting[0]}, replay_batch {setting[1]}\n")
    naive_rows = out["naive"] if isinstance(out["naive"], dict) else {}
    print("| phase | seconds | peak GiB | planned GiB | PFLOP | naive seconds | naive peak GiB |\n|" + "---|" * 7)
    for phase in [*out["ours"], *(p for p in naive_rows if p not in out["ours"])]:
        ours, planned, theirs = (rows.get(phase) for rows in (out["ours"], table[setting], naive_rows))
        cells = [f"{ours['seconds']:.2f}", f"{ours['peak'] / GIB:.2f}"] if ours else ["", ""]
        cells += [f"{planned['peak'] / GIB:.2f}", f"{planned['flops'] / 1e15:.3g}"] if planned else ["", ""]
        cells += [f"{theirs['seconds']:.2f}", f"{theirs['peak'] / GIB:.2f}"] if theirs else ["", ""]
        print(f"| {phase} | " + " | ".join(cells) + " |")
    seconds = [sum(row["seconds"] for row in rows.values()) for rows in (out["ours"], naive_rows)]
    print(f"| sum | {seconds[0]:.2f} | | | | {f'{seconds[1]:.2f}' if naive_rows else ''} | |")
    if args.device == "cpu":
        print("\nOn a CPU the peak is that of the whole process so far.")
    if out["naive"] == "out of memory":
        print("\nThe authors' schedule ran out of memory.")
    if out["difference"]:
        print("\nRelative difference of the two: loss {:.1e}, gradients {:.1e}".format(*out["difference"]))


if __name__ == "__main__":
    main()
