"""`kvpo-min bench`: one update (kvpo.py) against `naive.py`, the authors' order of work, and against
the floor.

Both get the same weights, script, plan and noise, on the same machine in the same process, and must leave the same loss
and gradient (relative 1e-4) before a time is taken; if they do not, `Disagreement` says by how much. They are compared
in float64: in float32 the two orders of work round differently, a video of 13 blocks multiplies that, and advantages
divide it by the small spread of the rewards. How far apart they then are in float32 is printed too. Measured are

    ratio           the authors' settings (`compat="official"`): the context between replayed blocks is the replaying
                    policy's own prediction on both sides. Equal numbers, float32.
    ratio_default   our settings, which replay all blocks at once, because their context is the branch's own stored x0.
                    The plain update has our settings too, but still its own context, which is what that schedule does.
                    (That both give the same numbers is checked with the stored context on both sides.) In
                    bfloat16 where that was faster just before; by how much it changes loss and gradient is printed.
    floor_ratio     our settings against the floor: the network's calls of the same update, the same shapes and batches,
                    one after the other on tensors that lie ready, those without gradient without adapters.

Times are medians over interleaved pairs. Peak memory is that of a process of its own (`alone`). The six steps of an
update (kvpo.py) are called and timed one by one, and the network is wrapped by one that counts.

`scaling` measures how time grows with the branches, the routed blocks and the history, and what a stream needs.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from kvpo_min import chr as routing
from kvpo_min import kvpo, pocket
from kvpo_min.checks import naive as plain
from kvpo_min.config import TrainConfig, knob, settle, under
from kvpo_min.grpo import safety_scale
from kvpo_min.kvpo import Task
from kvpo_min.pipeline import Pipeline
from kvpo_min.policies import acting, adapter_weights, add_policies, copy_adapter
from kvpo_min.rewards import Mixture
from kvpo_min.rollout import Sampler, Stream, draw_noise, generate
from kvpo_min.tve import calibrate_tau, trajectory_energy

PHASES = ("prefix", "rollout", "decode", "reward", "replay_frozen", "replay", "backward", "optimiser", "other")
TOLERANCE = 1e-4  # relative difference of losses, and of gradients, up to which two schedules agree


@dataclass(frozen=True)
class BenchOptions:
    """Times one update against a plain one"""

    json: str = knob("", "file that the result is written to; empty: it is only printed")
    pairs: int = knob(5, "how often each is timed, one after the other; medians are reported", least=1)
    scaling: bool = knob(False, "instead: how time grows with branches, blocks, history; memory of a long stream")
    num_frames: int = knob(39, "39 for the short mode, 147 for the long one")
    num_segments: int = 1
    num_generations: int = knob(8, "branches")
    perturb_num_blocks: int = knob(5, "routed blocks after the fork")
    seed: int = 0
    model: str = knob("", "folder with autoencoder/ and student/; empty: the embedded model")

    def __post_init__(self):
        settle(self)


class Disagreement(Exception):
    """Two schedules that should give the same numbers do not."""


# ------------------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Call:
    """One call of the network, without the keys and values that it read."""

    encodes: bool
    has_graph: bool
    x: Tensor  # [B, F, C, H, W]
    sigma: Tensor | None  # [B]
    start: int | Tensor
    text: Tensor
    kv: tuple[tuple[int, ...], torch.dtype] | None  # shape [layers, 2, B, tokens, heads, D] and dtype


class Meter:
    """Seconds of each phase, and what goes through the network in it. `meter(phase)` is a context manager."""

    def __init__(self):
        self.rows = {phase: {"seconds": 0.0, "calls": 0, "forwards": 0, "tokens": 0} for phase in PHASES}
        self.phase, self.calls = "other", []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Seconds of a phase inside another one count for the inner one alone."""
        outer, self.phase = self.phase, phase
        begun, inside = time.perf_counter(), sum(row["seconds"] for row in self.rows.values())
        try:
            yield
        finally:
            inside = sum(row["seconds"] for row in self.rows.values()) - inside
            self.rows[phase]["seconds"] += time.perf_counter() - begun - inside
            self.phase = outer

    def timed(self, phase: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            with self(phase):
                return function(*args, **kwargs)

        return call

    def count(self, call: Call, tokens: int) -> None:
        """Adds a call to the phase under way. `tokens`: of one frame"""
        row = self.rows[self.phase]
        row["calls"] += 1
        row["forwards"] += len(call.x)
        row["tokens"] += len(call.x) * call.x.shape[1] * tokens
        self.calls.append(call)


class Counted:
    """A backbone whose calls are counted; everything else about it is the backbone's."""

    def __init__(self, backbone, meter: Meter):
        self.backbone, self.meter = backbone, meter

    def __getattr__(self, name: str):
        return getattr(self.backbone, name)

    def count(self, x: Tensor, sigma: Tensor | None, start, text: Tensor, kv: Tensor | None) -> None:
        read = None if kv is None else (tuple(kv.shape), kv.dtype)
        call = Call(sigma is None, torch.is_grad_enabled(), x.detach(), sigma, start, text, read)
        self.meter.count(call, self.backbone.tokens(*x.shape[-2:]))

    def velocity(self, x, sigma, start, text, kv, *mask):
        self.count(x, sigma, start, text, kv)
        return self.backbone.velocity(x, sigma, start, text, kv, *mask)

    def encode(self, x0, start, text, kv):
        with torch.no_grad():
            self.count(x0, None, start, text, kv)
        return self.backbone.encode(x0, start, text, kv)


# ------------------------------------------------------------------------------------------------------------ schedules


@dataclass(frozen=True)
class Subject:
    """What is measured: a pipeline with policies on it, and the weights that every update starts from."""

    pipeline: Pipeline
    policies: object
    rewards: Mixture
    start: Mapping[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        return adapter_weights(self.policies, "default")

    def noise(self, task: Task) -> Tensor:
        """The noise of a task in the precision of the network."""
        return task.noise.to(next(iter(self.start.values())).dtype)


def make_subject(pipeline: Pipeline, rewards: Mixture, config: TrainConfig) -> Subject:
    """Puts policies on the pipeline, as some updates leave them: `default` is not the initial policy."""
    policies = add_policies(pipeline, config)
    generator = torch.Generator().manual_seed(config.seed)
    weights = adapter_weights(policies, "default")
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return Subject(pipeline, policies, rewards, {name: w.detach().clone() for name, w in weights.items()})


def make_config(options) -> TrainConfig:
    """An update with our settings. Its loss counts whether or not a branch beats the anchor, or there would be nothing
    to measure, and its gradient is not clipped, so that it can be compared."""
    return TrainConfig(
        output_dir="", seed=options.seed, max_train_steps=1, num_frames=options.num_frames,
        num_segments=options.num_segments, num_generations=options.num_generations,
        perturb_num_blocks=options.perturb_num_blocks, unsafe_scale=1.0, max_grad_norm=1e9, tau_groups=1,
    )  # fmt: skip


def make_task(pipeline: Pipeline, config: TrainConfig, plan: routing.Plan | None = None) -> Task:
    """What a run would draw first, or a given plan with the noise that fits it."""
    generator = torch.Generator().manual_seed(config.seed)
    scripts = pipeline.sample_scripts(1, config.num_segments, config.seed)
    return kvpo.draw(pipeline, scripts, [0], config, 0, generator, plan)


@contextlib.contextmanager
def in_float64(subject: Subject) -> Iterator[Subject]:
    """The subject with network, noise and latents in float64; pixels and rewards stay in float32."""
    pipeline = subject.pipeline
    wide = replace(
        pipeline,
        decode=lambda latents: pipeline.decode(latents.float()),
        embed=lambda texts: pipeline.embed(texts).double(),
    )
    pipeline.backbone.double()
    try:
        yield replace(subject, pipeline=wide, start={name: w.double() for name, w in subject.start.items()})
    finally:
        pipeline.backbone.float()  # the same numbers as before


@contextlib.contextmanager
def measured(subject: Subject, meter: Meter) -> Iterator[Pipeline]:
    """Puts the weights back, and hands out the pipeline with a network that counts; then closes the meter."""
    with torch.no_grad():
        for name, weight in subject.weights.items():
            weight.copy_(subject.start[name])
            weight.grad = None
    begun = time.perf_counter()
    yield replace(subject.pipeline, backbone=Counted(subject.pipeline.backbone, meter))
    seconds = time.perf_counter() - begun
    meter.rows["other"]["seconds"] += seconds - sum(row["seconds"] for row in meter.rows.values())


def ours(subject: Subject, config: TrainConfig, task: Task, meter: Meter) -> float:
    """One update as `kvpo.update` and `train.train` make it, step by step. -> loss; the gradient is on the weights"""
    policies, rewards, weights = subject.policies, subject.rewards, subject.weights
    task = replace(task, noise=subject.noise(task))
    with measured(subject, meter) as pipeline:
        pipeline = replace(pipeline, decode=meter.timed("decode", pipeline.decode))
        optimizer = torch.optim.AdamW(weights.values(), lr=config.learning_rate, weight_decay=config.adam_weight_decay)
        with meter("optimiser"):
            copy_adapter(policies, "default", "old")
        with meter("prefix"), acting(policies, "old"):
            prefix = next(kvpo.make_prefixes(pipeline, config, [task]))
        with meter("rollout"):
            rollout = kvpo.roll_out(pipeline, policies, config, task, prefix)
        with meter("reward"):
            _, signals = kvpo.score_group(pipeline, rewards, task, rollout)
            advantages, safe = kvpo.compare(signals, rewards.weights, config)
        scale = safety_scale(safe, config.unsafe_scale)
        with meter("replay_frozen"):
            energies = {"initial": kvpo.energies_of(pipeline, policies, config, rollout, "initial")}
        with meter("replay"):
            energies["default"] = kvpo.energies_of(pipeline, policies, config, rollout, "default", with_graph=True)
        with meter("backward"):
            _, loss = kvpo.send_back(pipeline, config, rollout, energies, advantages, scale, config.tau)
        with meter("optimiser"):
            torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
            optimizer.step()
            copy_adapter(policies, "default", "ema", 1 - config.ema_decay)
    return loss.total.item()


def naive(subject: Subject, config: TrainConfig, task: Task, meter: Meter, context: str = "own") -> float:
    """The same update by naive.py. -> loss; the gradient is on the weights"""
    with measured(subject, meter) as pipeline:
        task = replace(task, noise=subject.noise(task))
        return plain.update(pipeline, subject.policies, subject.rewards, config, task, meter, context)


def floor(subject: Subject, calls: Sequence[Call]) -> float:
    """Seconds that the network's calls of an update take alone: same shapes and batches, on tensors that lie ready.
    Those without graph need no adapter, since it can be merged."""
    backbone = subject.pipeline.backbone
    ready = {call.kv: call.kv and torch.randn(call.kv[0]).to(call.kv[1]) for call in calls}
    for weight in subject.weights.values():
        weight.grad = None
    begun = time.perf_counter()
    with torch.no_grad(), acting(subject.policies, "initial"):
        for call in calls:
            if call.encodes:
                backbone.encode(call.x, call.start, call.text, ready[call.kv])
            elif not call.has_graph:
                backbone.velocity(call.x, call.sigma, call.start, call.text, ready[call.kv])
    total = 0.0
    for call in calls:
        if call.has_graph:
            v = backbone.velocity(call.x, call.sigma, call.start, call.text, ready[call.kv])
            total = total + v.square().mean()
    total.backward()
    return time.perf_counter() - begun


# ----------------------------------------------------------------------------------------------------------- comparison


def outcome(subject: Subject, loss: float) -> tuple[float, Tensor]:
    """Loss and gradient (one vector) of the update that was just made."""
    return loss, torch.cat([weight.grad.flatten() for weight in subject.weights.values()])


def difference(a: tuple[float, Tensor], b: tuple[float, Tensor]) -> dict[str, float]:
    """Relative difference of two losses, and of two gradients (norm of the difference over the norm)."""
    return {"loss": abs(a[0] - b[0]) / abs(b[0]), "gradient": ((a[1] - b[1]).norm() / b[1].norm()).item()}


def agree(what: str, found: dict[str, float]) -> dict[str, float]:
    """Raises Disagreement when the relative differences are too large."""
    if not all(value <= TOLERANCE for value in found.values()):  # not-a-number is no agreement
        raise Disagreement(
            f"{what}: the loss differs by {found['loss']:.1e} and the gradient by {found['gradient']:.1e}, expected at "
            f"most {TOLERANCE:.0e}; no time was taken"
        )
    return found


def has_bfloat16() -> bool:
    """Whether this processor multiplies matrices in bfloat16; where it only can be made to, that is slower."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


class InBfloat16:
    """A backbone with matrix products, keys and values in bfloat16; latents and velocities stay in float32."""

    def __init__(self, backbone):
        self.backbone = backbone

    def __getattr__(self, name: str):
        return getattr(self.backbone, name)

    def velocity(self, *call):
        with torch.autocast("cpu", torch.bfloat16):
            return self.backbone.velocity(*call).float()

    def encode(self, *call):
        with torch.autocast("cpu", torch.bfloat16):
            return self.backbone.encode(*call).to(torch.bfloat16)


def in_bfloat16(subject: Subject) -> Subject:
    return replace(subject, pipeline=replace(subject.pipeline, backbone=InBfloat16(subject.pipeline.backbone)))


def total(rows: dict[str, dict]) -> float:
    """Seconds of all phases of an update."""
    return sum(row["seconds"] for row in rows.values())


def bench(pipeline: Pipeline, rewards: Mixture, options) -> dict:
    """Compares, then times `options.pairs` interleaved pairs. `options`: `BenchOptions`. -> the content of --json
    Raises Disagreement when the schedules do not give the same numbers."""
    config = make_config(options)
    subject = make_subject(pipeline, rewards, config)
    task, authors = make_task(pipeline, config), under(config, "official")
    authors_task = make_task(pipeline, authors)
    config = replace(config, tau=calibrated(subject, config, task))
    fast = subject

    def run(name: str, who: Subject = subject, context: str = "own") -> tuple[tuple[float, Tensor], Meter]:
        meter, its_own = Meter(), (config, task) if name.endswith("default") else (authors, authors_task)
        loss = ours(who, *its_own, meter) if name.startswith("ours") else naive(who, *its_own, meter, context)
        return outcome(who, loss), meter

    with in_float64(subject) as wide:
        differences = {
            "authors": difference(run("ours", wide)[0], run("naive", wide)[0]),
            "default": difference(run("ours_default", wide)[0], run("naive_default", wide, "stored")[0]),
        }
    agree("the authors' settings", differences["authors"])
    agree("our settings, stored context", differences["default"])
    differences["authors, float32"] = difference(run("ours")[0], run("naive")[0])
    full, meter = run("ours_default")
    if has_bfloat16():
        half = in_bfloat16(subject)
        differences["default, bfloat16 against float32"] = difference(run("ours_default", half)[0], full)
        tried = [(min(total(run("ours_default", who)[1].rows) for _ in range(2)), who) for who in (subject, half)]
        fast = min(tried, key=lambda one: one[0])[1]  # measured, since a processor that can need not be faster so
        meter = run("ours_default", fast)[1]

    pairs, phases = [], {name: [] for name in ("ours", "naive", "ours_default", "naive_default")}
    for _ in range(options.pairs):
        for name, rows in phases.items():
            rows.append(run(name, fast if name == "ours_default" else subject)[1].rows)
        pairs.append({name: total(rows[-1]) for name, rows in phases.items()})
        pairs[-1]["floor"] = floor(fast, meter.calls)

    def ratio(a: str, b: str) -> float:
        return median(pair[a] / pair[b] for pair in pairs)

    peaks = {name: alone(name, options)["peak"] for name in ("nothing", "ours", "naive")}
    return {
        "ratio": ratio("naive", "ours"),
        "ratio_default": ratio("naive_default", "ours_default"),
        "floor_ratio": ratio("ours_default", "floor"),
        "seconds": {name: median(pair[name] for pair in pairs) for name in pairs[0]},
        "difference": differences,
        "phases": {name: merge(rows) for name, rows in phases.items()},
        "peak_memory": peaks,
        "pairs": pairs,
        "about": about(pipeline, config, task)
        | {"authors_fork": authors_task.plan.fork, "dtype_default": "float32" if fast is subject else "bfloat16"},
    }


def calibrated(subject: Subject, config: TrainConfig, task: Task) -> float:
    """The temperature that a run would set if this were its only group."""
    copy_adapter(subject.policies, "default", "old")
    rollout = kvpo.roll_out(subject.pipeline, subject.policies, config, task)
    energies = kvpo.energies_of(subject.pipeline, subject.policies, config, rollout)
    return calibrate_tau(trajectory_energy(energies)[None], config.tau_target)


def merge(runs: Sequence[dict]) -> dict[str, dict]:
    """Counts of one run (they are the same in all) and the median of the seconds, by phase."""
    return {phase: row | {"seconds": median(rows[phase]["seconds"] for rows in runs)} for phase, row in runs[0].items()}


def about(pipeline: Pipeline, config: TrainConfig, task: Task) -> dict:
    return {
        "model": pipeline.name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "num_frames": config.num_frames,
        "branches": config.num_generations,
        "routed_blocks": config.perturb_num_blocks,
        "steps": len(pipeline.sigmas),
        "fork": task.plan.fork,
        "replayed_blocks": (task.chunk.stop - task.plan.fork) // routing.Window().block,
        "rank": config.rank,
        "seed": config.seed,
    }


# -------------------------------------------------------------------------------------------------------------- scaling


def scaling(pipeline: Pipeline, rewards: Mixture, options) -> dict:
    """How the time of an update after its prefix grows, median of `options.pairs` runs each, and the peak memory of
    streams of 147 and 1,470 frames. -> the content of --json"""
    config = make_config(options)
    subject = make_subject(pipeline, rewards, config)
    config = replace(config, tau=1.0)
    window = routing.Window()

    def seconds(config: TrainConfig, fork: int, perturb_num_blocks: int) -> float:
        """Seconds of an update after its prefix."""
        generator = torch.Generator().manual_seed(config.seed)
        frames = routing.pool(fork, window, config.nearest, perturb_num_blocks)
        routes = routing.uniform_routes(frames, window.past - config.nearest, config.num_generations, generator)
        task = make_task(pipeline, config, routing.Plan(fork, frames, routes, perturb_num_blocks))
        times = []
        for _ in range(options.pairs):
            meter = Meter()
            ours(subject, config, task, meter)
            times.append(sum(row["seconds"] for phase, row in meter.rows.items() if phase != "prefix"))
        return median(times)

    short = replace(config, num_frames=39, num_segments=1)  # one chunk after the first: it begins at 21
    long = replace(config, num_frames=147, num_segments=1, global_frames=0)
    seconds(short, 21, 5)  # warm up
    branches = {g: seconds(replace(short, num_generations=g), 21, 5) for g in (2, 4, 8, 16)}
    blocks = {p: seconds(short, 39 - window.block * p, p) for p in (1, 2, 3, 4, 5, 6)}
    history = {fork: seconds(long, fork, 5) for fork in (21, 57, 93, 129)}
    streams = {frames: alone("stream", options, frames) for frames in (147, 1470)}
    peaks = [stream["peak"] for stream in streams.values()]
    return {
        "branches": branches,
        "blocks": blocks,
        "history": history,
        "line_of_branches": line(branches),
        "line_of_blocks": line(blocks),
        "history_ratio": max(history.values()) / min(history.values()),
        "streams": streams,
        "stream_memory_ratio": peaks[1] / peaks[0],
        "about": {"model": pipeline.name, "torch": torch.__version__, "threads": torch.get_num_threads()},
    }


def line(points: Mapping[int, float]) -> dict[str, float]:
    """The straight line through {count: seconds} (least squares), and how far the farthest point is from it."""
    x, y = (torch.tensor(list(values), dtype=torch.float64) for values in (points.keys(), points.values()))
    each = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    fixed = y.mean() - each * x.mean()
    off = ((fixed + each * x) / y - 1).abs().max()
    return {"seconds_each": each.item(), "seconds_fixed": fixed.item(), "largest_deviation": off.item()}


def stream(pipeline: Pipeline, num_frames: int, seed: int) -> dict[str, list[float]]:
    """Makes one long video chunk by chunk, as it would be shown. -> seconds a block in the second and the last chunk"""
    window, generator = routing.Window(), torch.Generator().manual_seed(seed)
    texts = [pipeline.embed(pipeline.segments(pipeline.sample_scripts(1, 1, seed)[0]))]
    shape = (window.block, *pipeline.latent_shape)
    noise = draw_noise(num_frames // window.block, len(pipeline.sigmas), shape, generator)
    it = Stream()
    sampler = Sampler(pipeline.sigmas, window)
    seconds = []
    for stop in [*routing.chunk_starts(num_frames)[1:], num_frames]:
        begun, done = time.perf_counter(), len(it.x0)
        it = generate(pipeline.backbone, it, texts, noise, stop, sampler)
        seconds.append((time.perf_counter() - begun) / (len(it.x0) - done))
        pipeline.decode(torch.cat(it.x0[done:], 1))
    return {"seconds_a_block": [seconds[1], seconds[-1]]}


# ---------------------------------------------------------------------------------------------- a process of its own


def alone(what: str, options, num_frames: int = 0) -> dict:
    """Runs `what` in a process of its own. -> what it found, and its peak memory in bytes"""
    argv = [sys.executable, "-m", "kvpo_min.checks.bench", what, json.dumps(asdict(options)), str(num_frames)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(argv[1:4])}` failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(what: str, given: str, num_frames: str) -> None:
    options = BenchOptions(**json.loads(given))
    pipeline, found = pocket.load_model(options.model), {}
    if what == "stream":
        found = stream(pipeline, int(num_frames), options.seed)
    else:
        config = replace(make_config(options), tau=1.0)
        subject, task = make_subject(pipeline, pocket.pocket_rewards(), config), make_task(pipeline, config)
        if what in ("ours", "naive"):
            {"ours": ours, "naive": naive}[what](subject, config, task, Meter())
    print(json.dumps(found | {"peak": peak_memory()}))


def peak_memory() -> int:
    """Bytes that this process had resident at most. Linux's ru_maxrss includes the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --------------------------------------------------------------------------------------------------------------- tables


def table(result: Mapping) -> str:
    """What `bench` found, for people."""
    names = list(result["phases"])
    seconds = result["seconds"]
    differences = result["difference"]
    it = result["about"]
    lines = [
        f"{it['model']}, {it['num_frames']} frames, K = {it['branches']}, P = {it['routed_blocks']}, "
        f"{it['steps']} steps, fork at {it['fork']} (authors' settings: {it['authors_fork']}), "
        f"LoRA of rank {it['rank']}, {it['threads']} thread{'s' if it['threads'] > 1 else ''}, torch {it['torch']}",
        "",
        "Relative difference from the plain update: "
        + "; ".join(f"{k}: loss {d['loss']:.1e}, gradient {d['gradient']:.1e}" for k, d in differences.items()),
        "",
        f"{'seconds':14}" + "".join(f"{name:>21}" for name in names),
    ]
    for phase in PHASES:
        lines.append(f"{phase:14}" + "".join(f"{result['phases'][name][phase]['seconds']:21.2f}" for name in names))
    lines.append(f"{'together':14}" + "".join(f"{seconds[name]:21.2f}" for name in names))
    lines += ["", f"{'network calls / forward passes / tokens':14}"]
    for phase in PHASES:
        rows = [result["phases"][name][phase] for name in names]
        if any(row["calls"] for row in rows):
            cells = ["{calls} / {forwards} / {tokens}".format(**row) for row in rows]
            lines.append(f"{phase:14}" + "".join(f"{cell:>21}" for cell in cells))
    peak = {name: bytes_ / 2**20 for name, bytes_ in result["peak_memory"].items()}
    return "\n".join([
        *lines, "",
        f"peak memory of a process: {peak['ours']:.0f} MiB ours, {peak['naive']:.0f} MiB plain, "
        f"{peak['nothing']:.0f} MiB before an update",
        f"floor: {seconds['floor']:.2f} s for the network's calls of our update ({it['dtype_default']}) alone",
        f"equal numbers (authors' settings): {result['ratio']:.2f} times faster than the plain update",
        f"our settings: {result['ratio_default']:.2f} times faster than the plain update, "
        f"{result['floor_ratio']:.2f} times the floor",
    ])  # fmt: skip


def scaling_table(result: Mapping) -> str:
    it = result["about"]
    lines = [f"{it['model']}, {it['threads']} thread(s); seconds of an update after its prefix"]
    for name, what in (("branches", "branches G"), ("blocks", "routed and replayed blocks P"), ("history", "fork")):
        cells = "  ".join(f"{count}: {seconds:.2f}" for count, seconds in result[name].items())
        lines.append(f"{what:29} {cells}")
        if f"line_of_{name}" in result:
            fit = result[f"line_of_{name}"]
            lines.append(
                f"{'':29} {fit['seconds_fixed']:.2f} + {fit['seconds_each']:.3f} each, "
                f"off by {fit['largest_deviation']:.0%} at most"
            )
    lines.append(f"{'':29} largest over smallest {result['history_ratio']:.2f}")
    for frames, it in result["streams"].items():
        first, last = (1000 * s for s in it["seconds_a_block"])
        memory = f"{it['peak'] / 2**20:.0f} MiB"
        speed = f"{first:.0f} ms a block in its second chunk, {last:.0f} in its last"
        lines.append(f"stream of {frames} frames: {memory}, {speed}")
    lines.append(f"peak memory, 1,470 frames over 147: {result['stream_memory_ratio']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
