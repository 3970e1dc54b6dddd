"""The training loop: `for step in train(pipeline, scripts, rewards, config)` yields one `Step` an update.

One update (paper section 3; authors: trainer/kvpo.py:985-1582 and 2833-3341):
  plan where to fork and which frames each branch reads (chr.py) -> prefix, G branches and the anchor from the same
  noise (rollout.py) -> rewards of the fork's chunk (local) and of what follows it (global) (rewards.py) -> replay
  under the ordinary context, energies, Gibbs policy (tve.py) -> advantages, clipped objective, KL to the initial
  policy (grpo.py).

Policies are adapters on one base: `default` (trained), `old` (makes the rollouts, refreshed every `old_policy_every`
updates), `ema`; the initial policy is the base with the adapter switched off. Everything random comes from one
generator, and a checkpoint holds all of it, so a resumed run goes on as if it had not stopped, to the last bit.

Memory: with `replay_batch` the update holds no graph larger than that many forwards, and its gradient is the same. The
loss sees the weights through the energies alone, so energies without graph give dL/dE; then every piece is replayed
once more, with graph, and sent backward at once, times its dL/dE.

Several processes (torchrun): each works on its share of an update's groups. All draw the plans and noise of all groups,
so that their generators, and with them order and checkpoints, are those of one process.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from kvpo_min import chr as routing
from kvpo_min.grpo import anchor_advantages, branch_is_safe, fuse, kvpo_loss, safety_scale
from kvpo_min.reward_models import RewardError
from kvpo_min.rewards import Mixture, NotFinite
from kvpo_min.rollout import (
    Rollout,
    Sampler,
    Stream,
    draw_noise,
    fork,
    generate,
    keep_frames,
    pieces,
    replay,
    segment_at,
    switch_reach,
)
from kvpo_min.tve import calibrate_tau, energy_weights, gibbs_log_prob, schedule, step_energies, trajectory_energy

if TYPE_CHECKING:
    from kvpo_min.bank import Bank

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]  # every linear layer of a block
SKIPS = 3  # updates in a row that were skipped, after which a run stops
LORA_FROZEN = r".*\.attn2\.to_(k|v)"  # left out: the authors' get no gradient, since they cache text keys and values


@dataclass(frozen=True)
class Pipeline:
    """A generator and what surrounds it. `pocket.load_pocket` makes one."""

    backbone: torch.nn.Module  # rollout.Backbone; `.transformer` is what LoRA is put on
    decode: Callable[[Tensor], Tensor]  # latents [N, T, C, H, W] -> pixels [N, T, 3, H', W'] in [0, 1], one a frame
    embed: Callable[[list[str]], Tensor]  # texts -> [B, L, D]
    latent_shape: tuple[int, int, int]  # C, H, W
    switches: tuple[int, ...]  # frames at which the second, third, ... segment begins
    segments: Callable[[str], list[str]]  # script -> texts that the model reads, one a segment
    reward_prompts: Callable[[str], list[str]]  # script -> texts that rewards are given, one a segment
    read: Callable[[Tensor], object] | None = None  # pixels -> a dataclass of tensors [N, ...]: what the judge sees
    judge: Callable[[object, list[str]], dict[str, float]] | None = None  # of that and the scripts; never trained on
    sample_scripts: Callable[[int, int, int], list[str]] | None = None  # n, segments, seed -> scripts
    sigmas: Tensor = field(default_factory=schedule)  # [S] noise levels of the sampler
    bank: Bank | None = None  # empty memory bank that every video begins with (MemFlow: bank.py)
    name: str = "model"


@dataclass
class TrainConfig:
    """One run. Names are those of diffusers and TRL where they have one, KVPO's words for its own knobs."""

    output_dir: str = "kvpo_run"
    seed: int = 0
    max_train_steps: int = 60
    num_frames: int = 39  # length of the videos: 39 = a single prompt (short mode), 147 = four segments (long mode)
    num_segments: int = 1  # prompts a script; 1, or up to 4 in long videos
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 2
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rank: int = 16  # of the LoRA
    lora_alpha: int = 16
    ema_decay: float = 0.95
    num_generations: int = 8  # branches G
    groups_per_update: int = 1  # scripts whose gradients are averaged in one update
    old_policy_every: int = 1  # updates between refreshes of the rollouts' policy; with 1 ratio and clip never act
    nearest: int = 2  # nearest past frames that every branch keeps; the other slots of the window are routed
    perturb_num_blocks: int = 5  # routed blocks after the fork
    grad_steps: int = 4  # denoising steps of the replay that carry gradient; all of them count in the energy
    tau: float = 0.0  # temperature of the Gibbs policy; 0: from the spread of the first groups' energies, then frozen
    tau_groups: int = 8  # groups that set tau
    tau_target: float = 0.4  # spread of the log scores -E / tau in a group that tau is set for
    kl_coef: float = 1.0
    clip_range_low: float = 0.1
    clip_range_high: float = 0.2
    adv_clip_max: float = 2.5
    local_weight: float = 1.0
    global_weight: float = 0.5
    fuse_mode: str = "std"  # grpo.fuse: "std" (over the anchor), "zscore" (over the mean of the group), "none"
    global_frames: int = 36  # frames after the fork's chunk that the global reward sees, if the video goes on
    unsafe_scale: float = 0.0  # factor on the loss when no branch beats the anchor: 0 (paper) or 0.5 (authors)
    compat: str = ""  # "official": the authors' routing, energy and replay context, and the numbers below
    checkpointing_steps: int = 0  # updates between checkpoints (and one at the end); 0: one only if a run is stopped
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = ""  # "latest", or the path of a checkpoint-N folder
    branch_batch: int = 0  # branches that run at once; 0: all
    replay_batch: int = 0  # replayed steps that run at once; 0: all

    def __post_init__(self):
        for name in (
            "max_train_steps",
            "groups_per_update",
            "old_policy_every",
            "rank",
            "tau_groups",
            "perturb_num_blocks",
            "num_segments",
            "checkpoints_total_limit",
            "lora_alpha",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "max_grad_norm",
            "adv_clip_max",
            "clip_range_low",
            "clip_range_high",
            "tau_target",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in (
            "kl_coef",
            "tau",
            "unsafe_scale",
            "global_frames",
            "checkpointing_steps",
            "lr_warmup_steps",
            "nearest",
            "branch_batch",
            "replay_batch",
            "local_weight",
            "global_weight",
            "adam_weight_decay",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if self.num_frames < 3 or self.num_frames % 3:
            raise ValueError(f"num_frames must be a multiple of 3 (a block), got {self.num_frames}")
        if self.global_frames % 3:
            raise ValueError(f"global_frames must be a multiple of 3 (a block), got {self.global_frames}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must lie in -2**63 .. 2**63 - 1, got {self.seed}")
        if not 1 <= self.grad_steps <= 4:
            raise ValueError(f"grad_steps must be 1 to 4 (denoising steps), got {self.grad_steps}")
        if self.num_generations < 2:
            raise ValueError("num_generations must be at least 2: a policy over one branch has nothing to choose")
        if self.fuse_mode not in ("std", "zscore", "none"):
            raise ValueError(f'fuse_mode must be "std", "zscore" or "none", got {self.fuse_mode!r}')
        if self.compat not in ("", "official"):
            raise ValueError(f'compat must be "" or "official", got {self.compat!r}')
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.compat:  # the authors' scale, in one place (docs/paper_map.md)
            self.tau, self.kl_coef, self.unsafe_scale, self.grad_steps, self.nearest = 2.0, 10.0, 0.5, 2, 1


@dataclass(frozen=True)
class Group:
    """One script's branches in an update."""

    script: str
    plan: routing.Plan
    rollout: Rollout
    videos: Tensor  # [G + 1, T, 3, H, W] pixels of the fork's chunk, anchor last
    rewards: dict[str, Tensor]  # name -> [G]; local signal
    anchor: dict[str, Tensor]  # name -> ()
    global_rewards: dict[str, Tensor] | None
    global_anchor: dict[str, Tensor] | None
    advantages: Tensor  # [G]
    safe: bool
    energies: Tensor  # [G, B, S] of the policy before the update
    log_p: Tensor  # [G]
    log_p_old: Tensor
    log_p_init: Tensor
    ratio: Tensor  # [G]
    loss: float
    kl: float
    entropy: float
    clip_fraction: float


@dataclass(frozen=True)
class Step:
    """The record of one update; `log()` is its line in metrics.jsonl."""

    step: int
    groups: list[Group]  # those of this process
    tau: float
    grad_norm: float
    learning_rate: float
    step_time: float
    weights: dict[str, float] = field(default_factory=dict)  # of the reward's components
    elsewhere: list[dict[str, float]] = field(default_factory=list)  # `group_numbers` of the other processes' groups
    skipped: str = ""  # why there was no update: the reward model's error, or what was not finite

    def log(self) -> dict[str, float]:
        """Keys as TRL users know them, and the method's own; of a skipped update only its own numbers."""
        out = {"step": self.step, "tau": self.tau, "grad_norm": self.grad_norm}
        out |= {"learning_rate": self.learning_rate, "step_time": self.step_time}
        if self.skipped:
            return out | {"skipped": 1.0}
        lines = [*(group_numbers(g, self.weights) for g in self.groups), *self.elsewhere]
        for key in lines[0]:
            values = [line[key] for line in lines]
            out[key] = max(values) if key == "ratio/max_dev_first" else sum(values) / len(values)
        return out


def group_numbers(group: Group, weights: dict[str, float]) -> dict[str, float]:
    """What one group adds to the log."""

    def total(rewards) -> Tensor:
        return sum(weights[name] * r for name, r in rewards.items())

    reward, energy = total(group.rewards), group.energies.sum((1, 2))  # [G], [G]
    out = {
        "reward": reward.mean(),
        "reward_std": reward.std(),
        "anchor_reward": total(group.anchor),
        "frac_reward_zero_std": reward.std() < 1e-8,
        "energy/mean": energy.mean(),
        "energy/std": energy.std(),
        "ratio/max_dev_first": (group.ratio - 1).abs().max(),
        "safe": group.safe,
        "advantage/abs_mean": group.advantages.abs().mean(),
        "loss": group.loss,
        "kl": group.kl,
        "entropy": group.entropy,
        "clip_ratio/region_mean": group.clip_fraction,
    } | {f"rewards/{name}/mean": r.mean() for name, r in group.rewards.items()}
    return {key: float(value) for key, value in out.items()}


# ------------------------------------------------------------------------------------------------------------- policies


def add_policies(pipeline: Pipeline, config: TrainConfig):
    """Puts the adapters `default`, `old` and `ema` on the backbone's transformer, all equal to the initial policy.
    -> the peft model; the base's weights stay as they are. Raises ValueError for a model that has adapters already."""
    from peft import LoraConfig, get_peft_model

    if any("lora_" in name for name, _ in pipeline.backbone.transformer.named_parameters()):
        raise ValueError(
            "the model has adapters already: give train(policies=...) what add_policies made, or load it anew"
        )
    if not any(name.endswith(tuple(LORA_TARGETS)) for name, _ in pipeline.backbone.transformer.named_modules()):
        raise ValueError(
            f"no layer of the model ends with one of {LORA_TARGETS}, diffusers' names: name them so, or give "
            "train(policies=...) a peft model of the transformer with the adapters default, old and ema, all alike"
        )
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.lora_alpha, lora_dropout=0.0, bias="none",
        target_modules=LORA_TARGETS, exclude_modules=LORA_FROZEN,
    )  # fmt: skip
    device = torch.device(pipeline.backbone.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # peft draws the A matrices from the global generator
        policies = get_peft_model(pipeline.backbone.transformer, lora)
        for name in ("old", "ema"):
            policies.add_adapter(name, lora)
    for name in ("old", "ema"):
        copy_adapter(policies, "default", name)
    for weight in adapter_weights(policies, "ema").values():
        if weight.is_cuda:  # it is kept and saved, and does not act: the GPU's memory is for the others
            weight.data = weight.data.cpu()
    policies.set_adapter("default")
    return policies


def adapter_weights(policies, name: str) -> dict[str, Tensor]:
    """The live tensors of one adapter, keyed by the parameter's name without the adapter's."""
    return {key.replace(f".{name}.", "."): weight for key, weight in policies.named_parameters() if f".{name}." in key}


@torch.no_grad()
def copy_adapter(policies, source: str, target: str, weight: float = 1.0) -> None:
    """target <- (1 - weight) * target + weight * source, tensor by tensor."""
    ours, theirs = adapter_weights(policies, target), adapter_weights(policies, source)
    for key in ours:
        ours[key].lerp_(theirs[key].to(ours[key].device), weight)


@contextlib.contextmanager
def acting(policies, name: str):
    """Lets one policy act: "default", "old", "ema" (which a GPU run keeps on the CPU), or "initial" (adapters off)."""
    if name == "initial":
        with policies.disable_adapter():
            yield
        return
    policies.set_adapter(name)
    try:
        yield
    finally:
        policies.set_adapter("default")


# -------------------------------------------------------------------------------------------------------------- rewards


def score(
    pipeline: Pipeline, rewards: Mixture, pixels: Tensor, scripts: Sequence[str], first: int
) -> dict[str, Tensor]:
    """Scores videos segment by segment with that segment's words, then averages over the segments in view.
    pixels [N, T, 3, H, W] begin at frame `first`; one script a video, all with the same number of segments.
    -> {component: [N]} (authors: kvpo.py:1769-1930 score one clip a segment)."""
    prompts = [pipeline.reward_prompts(script) for script in scripts]
    if not prompts or pixels.shape[1] < 3:
        raise ValueError(
            f"a score needs a script and 3 frames of it at least, got {len(prompts)} and {pixels.shape[1]}"
        )
    switches = pipeline.switches[: len(prompts[0]) - 1]
    last = first + pixels.shape[1]
    borders = [first, *[s for s in switches if first < s < last], last]
    clips = []
    for begin, end in zip(borders, borders[1:], strict=False):
        if end - begin >= 3:  # motion needs three frames
            texts = [p[segment_at(begin, switches)] for p in prompts]
            clips.append(rewards.scores(pixels[:, begin - first : end - first], texts))
    return {name: torch.stack([clip[name] for clip in clips]).mean(0) for name in clips[0]}


@torch.no_grad()
def sample(
    pipeline: Pipeline, scripts: Sequence[str], num_frames: int, seed: int = 99999, batch: int = 32,
    sigmas: Tensor | None = None, eta: float = 1.0, bar: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """Generates one video a script, unrouted; video i's noise comes from a generator of its own, seed + 10000 i, so
    it does not depend on the batch. `sigmas`, `eta`: another sampler than the 4-step one.
    Yields latents [b, T, C, H, W]."""
    from tqdm import tqdm

    sigmas = pipeline.sigmas if sigmas is None else sigmas
    n_segments = {len(pipeline.segments(script)) for script in scripts}
    if len(n_segments) != 1:
        raise ValueError(f"scripts of one call must have the same number of segments, got {sorted(n_segments)}")
    switches = pipeline.switches[: n_segments.pop() - 1]
    window = routing.Window()
    window = replace(window, history=window.sink + switch_reach(window))  # nothing is routed
    sampler = Sampler(sigmas, window, switches=switches, eta=eta)
    for begin in tqdm(range(0, len(scripts), batch), desc="sample", disable=not bar, leave=False):
        part = scripts[begin : begin + batch]
        texts = [pipeline.embed(list(t)) for t in zip(*[pipeline.segments(s) for s in part], strict=True)]
        noise = [
            draw_noise(num_frames // window.block, len(sigmas) if eta else 1, (window.block, *pipeline.latent_shape),
                       torch.Generator().manual_seed(seed + 10000 * (begin + i)))
            for i in range(len(part))
        ]  # fmt: skip
        noise = torch.cat(noise).to(pipeline.backbone.device)  # drawn on the CPU: the same on every device
        yield generate(pipeline.backbone, Stream(bank=pipeline.bank), texts, noise, num_frames, sampler).latents


def evaluate(
    pipeline: Pipeline, scripts: Sequence[str], rewards: Mixture, num_frames: int, seed: int = 99999, batch: int = 32,
    sigmas: Tensor | None = None, eta: float = 1.0, bar: bool = False,
) -> dict:  # fmt: skip
    """Mean rewards of unrouted videos, their standard errors over prompts, and the held-out judge."""
    scores, readings = [], []
    begin = 0
    for latents in sample(pipeline, scripts, num_frames, seed, batch, sigmas, eta, bar):
        part = scripts[begin : begin + len(latents)]
        pixels = pipeline.decode(latents)
        scores.append(score(pipeline, rewards, pixels, part, 0))
        if pipeline.judge:
            readings.append(pipeline.read(pixels))
        begin += len(part)
    scores = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    total = rewards.total(scores)
    out = {name: s.mean().item() for name, s in scores.items()} | {"reward": total.mean().item()}
    for name, each in (scores | {"reward": total}).items():
        out[f"{name}_sem"] = (each.std() / len(each) ** 0.5).item() if len(each) > 1 else float("nan")
    if readings:  # pooled over all frames, so that the shares do not depend on the batches
        names = [f.name for f in fields(readings[0])]
        pooled = {name: torch.cat([getattr(reading, name) for reading in readings]) for name in names}
        out["judge"] = pipeline.judge(type(readings[0])(**pooled), list(scripts))
    return out


# ------------------------------------------------------------------------------------------------------------ processes


def join_processes() -> None:
    """Under torchrun: joins the other processes and takes the GPU that is this one's. Otherwise nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=12))  # one process evaluates while the others wait


def processes() -> tuple[int, int]:
    """-> the rank of this process, and how many there are; (0, 1) without torchrun"""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def check_share(config: TrainConfig) -> None:
    """Raises ValueError when the groups of an update cannot be shared out evenly."""
    groups, world = config.groups_per_update, processes()[1]
    if groups % world:
        raise ValueError(f"{world} processes cannot share groups_per_update {groups}: give a multiple of {world}")


def told_by_all(value) -> list:
    """The value that each process gives, in the order of their ranks."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


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


# ----------------------------------------------------------------------------------------------------------------- loop


def check_finite(what: str, numbers: Tensor) -> None:
    """Raises FloatingPointError: the update is skipped, and no NaN reaches a weight."""
    if not numbers.isfinite().all():
        raise FloatingPointError(f"{what} not finite")


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


def make_plan(
    config: TrainConfig, step: int, index: int, window: routing.Window, generator: torch.Generator, bank: bool = False
):  # fmt: skip
    """Where to fork and what each branch reads: the paper's plan, or the authors' with compat="official", which with a
    memory bank is MemFlow's: slots instead of frames, and none kept near the block (their m of 3 counts it)."""
    if config.compat and bank:
        sizes = (config.num_frames, window, 0, config.perturb_num_blocks, config.num_generations)
        return routing.plan_slots(config.seed, index, (step + 1) * 1_000_003, *sizes)
    sizes = (config.num_frames, window, config.nearest, config.perturb_num_blocks, config.num_generations)
    if config.compat:
        return routing.plan_official(config.seed, index, (step + 1) * 1_000_003, *sizes)
    return routing.plan(*sizes, generator)


def replay_energies(
    backbone, rollout: Rollout, sampler: Sampler, grad_steps: int = 0, context: str = "stored"
) -> Tensor:  # [G, B, S]
    """How far the policy that acts is from each branch's velocities; the first `grad_steps` steps carry gradient."""
    v = replay(backbone, rollout, sampler, grad_steps, context=context, branches=len(rollout.plan.routes))
    return step_energies(v, rollout.trajectory.velocity[: len(v)])


def train(
    pipeline: Pipeline, scripts: Sequence[str], rewards: Mixture, config: TrainConfig, policies=None,
    save_when_stopped: bool = False,
) -> Iterator[Step]:  # fmt: skip
    """Trains in place and yields one `Step` an update. `policies`: from `add_policies` (made here if not given).

    Raises ValueError before the first update when the scripts do not fit the mode. When a reward model fails
    (RewardError), or a reward, video, energy, loss or gradient is not finite (FloatingPointError), the update is
    skipped: weights, optimizer and moving average stay as they are. After the third in a row that error is raised.

    Whatever ends the run early, Ctrl-C included, a checkpoint of the last whole update is written on the way out, if
    there are checkpoints at all or with `save_when_stopped`. A caller who takes no more updates (`break`) gets none."""
    n_segments = {len(pipeline.segments(script)) for script in scripts}
    if n_segments != {config.num_segments}:
        raise ValueError(f"num_segments is {config.num_segments}, but the scripts have {sorted(n_segments)} segments")
    begins = (0, *pipeline.switches)[: config.num_segments]
    if len(begins) < config.num_segments or begins[-1] >= config.num_frames:
        raise ValueError(
            f"num_frames is {config.num_frames} and segments begin at {[0, *pipeline.switches]}: "
            f"not all of {config.num_segments} segments would be shown"
        )
    check_share(config)
    rank, world = processes()
    policies = policies if policies is not None else add_policies(pipeline, config)
    weights = adapter_weights(policies, "default")
    optimizer = torch.optim.AdamW(weights.values(), lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    state = {"step": 0, "tau": config.tau, "order": [], "skips": 0, "logs": []}
    if config.resume_from_checkpoint:
        state = load_checkpoint(find_checkpoint(config), policies, optimizer, generator)
        state["order"] = [k for k in state["order"] if k < len(scripts)]  # there may be fewer now
    if world > 1:  # GPUs of different kinds may have drawn different A matrices
        for name in ("default", "old", "ema"):
            for weight in adapter_weights(policies, name).values():
                dist.broadcast(weight.data, 0)

    window, sigmas, device = routing.Window(), pipeline.sigmas, pipeline.backbone.device
    sampler = Sampler(sigmas, window, switches=pipeline.switches[: config.num_segments - 1])
    energy_weight = energy_weights(sigmas, 1.0 if config.compat else 0.0)
    context = "own" if config.compat else "stored"
    bank = pipeline.bank and replace(pipeline.bank, compat=config.compat or pipeline.bank.compat)

    def energies_in_pieces(rollout: Rollout, n_steps: int = 0) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
        """Energies of the first steps (0: all), a piece at a time; with graph where gradients are recorded."""
        for where, part, its_sampler in pieces(
            pipeline.backbone, rollout, sampler, config.replay_batch, n_steps, context
        ):
            yield where, replay_energies(pipeline.backbone, part, its_sampler, len(its_sampler.sigmas), context)

    @torch.no_grad()
    def energies_of(rollout: Rollout) -> Tensor:  # [G, B, S]
        """Under the policy that acts, without graph."""
        if not config.replay_batch:
            return replay_energies(pipeline.backbone, rollout, sampler, 0, context)
        z = rollout.trajectory.z[: config.num_generations]
        energies = z.new_zeros(z.shape[:3], dtype=torch.promote_types(z.dtype, torch.float32))
        for where, part in energies_in_pieces(rollout):
            energies[where] = part
        return energies

    def log_prob(energies: Tensor, policy: str) -> Tensor:  # [G]
        check_finite(f"the energies of the {policy} policy are", energies)
        return gibbs_log_prob(trajectory_energy(energies, energy_weight), state["tau"])

    def draw(step: int) -> tuple[str, routing.Plan, Tensor, int]:
        """What is random in a group: script, plan and noise [1, blocks, S, F, C, H, W]; and the end of its chunk."""
        if not state["order"]:  # every script once before any comes again
            state["order"] = torch.randperm(len(scripts), generator=generator).tolist()
        index = state["order"].pop()
        plan = make_plan(config, step, index, window, generator, bank is not None)
        chunk_end = routing.chunk_of(plan.fork, config.num_frames).stop
        stop = min(config.num_frames, chunk_end + config.global_frames)
        noise = draw_noise(stop // window.block, len(sigmas), (window.block, *pipeline.latent_shape), generator)
        return scripts[index], plan, noise, chunk_end

    @torch.no_grad()
    def roll_out(script: str, plan: routing.Plan, noise: Tensor, chunk_end: int) -> Rollout:
        noise, stop = noise.to(device), noise.shape[1] * window.block
        texts = [pipeline.embed([text]) for text in pipeline.segments(script)]
        near = range(plan.fork - switch_reach(window), plan.fork)
        needed = {*range(window.sink), *routing.prefix_frames(plan, window), *near}
        with acting(policies, "old"):  # no name for the prefix here: if `fork` encodes it again, it must be freed
            made = fork(
                pipeline.backbone, texts, noise, plan, stop, chunk_end, sampler, config.nearest,
                config.branch_batch or None,
                keep_frames(generate(pipeline.backbone, Stream(bank=bank), texts, noise, plan.fork, sampler), needed),
            )  # fmt: skip
        read = {*range(window.sink), *near[-window.past :]}  # by replays
        return replace(made, prefix=keep_frames(made.prefix, read))

    def one_group(script: str, plan: routing.Plan, noise: Tensor, chunk_end: int, old_is_current: bool) -> Group:
        """Rollout, rewards, loss and, on the weights, its gradient."""
        rollout = roll_out(script, plan, noise, chunk_end)
        check_finite("the latents of the videos are", rollout.videos)
        chunk = routing.chunk_of(plan.fork, config.num_frames).start
        local, rest = pipeline.decode(rollout.videos[:, chunk:chunk_end]), rollout.videos[:, chunk_end:]
        several = [script] * len(local)
        signals = [score(pipeline, rewards, local, several, chunk)]
        if rest.shape[1]:
            signals.append(score(pipeline, rewards, pipeline.decode(rest), several, chunk_end))
        branches = [{name: s[:-1] for name, s in signal.items()} for signal in signals]
        anchors = [{name: s[-1] for name, s in signal.items()} for signal in signals]
        advantages = [anchor_advantages(b, a, rewards.weights) for b, a in zip(branches, anchors, strict=True)]
        A = fuse(advantages[0], advantages[1] if rest.shape[1] else None,
                 config.local_weight, config.global_weight, config.fuse_mode, config.adv_clip_max)  # fmt: skip
        A = A.to(device)  # pixels and scores may live on the CPU
        safe = any(branch_is_safe(b, a, rewards.weights) for b, a in zip(branches, anchors, strict=True))

        scale = safety_scale(safe, config.unsafe_scale)
        with acting(policies, "initial"):
            log_p_init = log_prob(energies_of(rollout), "initial")
        if not scale:  # the loss will be 0: a replay with gradient would be for nothing
            energies = energies_of(rollout)
        elif config.replay_batch:  # a leaf: backward stops at dL/dE, and the pieces below go on from there
            energies = energies_of(rollout).requires_grad_()
        else:
            energies = replay_energies(pipeline.backbone, rollout, sampler, config.grad_steps, context)
        log_p = log_prob(energies, "trained")
        log_p_old = log_p.detach()  # the same weights: their replay would give the same numbers, so the ratio is 1
        if not old_is_current:
            with acting(policies, "old"):
                log_p_old = log_prob(energies_of(rollout), "old")
        loss = kvpo_loss(log_p, log_p_old, log_p_init, A, config.clip_range_low, config.clip_range_high,
                         config.kl_coef, scale)  # fmt: skip
        check_finite(f"the loss is {loss.total.item()}, that is,", loss.total)
        if scale:
            (loss.total / config.groups_per_update).backward()
        if scale and config.replay_batch and energies.grad.any():  # every piece once more, with graph, times its dL/dE
            for where, part in energies_in_pieces(rollout, config.grad_steps):
                (part * energies.grad[where]).sum().backward()
        return Group(
            script=script, plan=plan, rollout=rollout, videos=local,
            rewards=branches[0], anchor=anchors[0],
            global_rewards=branches[1] if rest.shape[1] else None,
            global_anchor=anchors[1] if rest.shape[1] else None,
            advantages=A, safe=safe, energies=energies.detach(),
            log_p=log_p.detach(), log_p_old=log_p_old, log_p_init=log_p_init, ratio=loss.ratio,
            loss=loss.total.item(), kl=loss.kl.item(), entropy=loss.entropy.item(),
            clip_fraction=loss.clip_fraction.item(),
        )  # fmt: skip

    if not state["tau"]:
        # tau from the spread of the first groups' energies; these groups are not trained on
        spread = torch.zeros(config.tau_groups, config.num_generations)
        for k in range(config.tau_groups):
            drawn = draw(state["step"])
            if k % world == rank:
                spread[k] = trajectory_energy(energies_of(roll_out(*drawn)), energy_weight)
        state["tau"] = calibrate_tau(sum_over_all(spread), config.tau_target)

    whole, saved = (generator.get_state(), list(state["order"])), state["step"]

    def checkpoint() -> None:
        """Saves the last whole update, as if nothing had been drawn since."""
        nonlocal saved
        generator.set_state(whole[0])
        state["order"] = list(whole[1])
        save_checkpoint(config, policies, optimizer, generator, state)
        saved = state["step"]

    try:
        while state["step"] < config.max_train_steps:
            begun, step, groups, failure = time.perf_counter(), state["step"], [], None
            old_is_current = step % config.old_policy_every == 0
            if old_is_current:
                copy_adapter(policies, "default", "old")
            learning_rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.zero_grad()
            for k in range(config.groups_per_update):
                drawn = draw(step)
                if k % world == rank and not failure:
                    try:
                        groups.append(one_group(*drawn, old_is_current))
                    except (RewardError, FloatingPointError) as error:
                        failure = type(error)(str(error))  # anew: the frames of the other hold the group's tensors
            told = told_by_all((failure, [group_numbers(g, rewards.weights) for g in groups] if world > 1 else []))
            failure = next((theirs for theirs, _ in told if theirs), None)
            elsewhere = [line for r, (_, lines) in enumerate(told) if r != rank for line in lines]
            grad_norm = 0.0
            if not failure:
                sum_gradients(list(weights.values()))
                grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm).item()
                if not math.isfinite(grad_norm):  # the sum's, so all processes skip alike
                    failure, grad_norm = FloatingPointError(f"the gradient's norm is {grad_norm}, not finite"), 0.0
            with uninterrupted():
                random, whole = (generator.get_state(), list(state["order"])), None
                if grad_norm:  # all groups unsafe: no update, not even a step of the optimizer's momentum
                    optimizer.step()
                    copy_adapter(policies, "default", "ema", 1 - config.ema_decay)
                state["step"], state["skips"] = step + 1, state["skips"] + 1 if failure else 0
                stop = state["skips"] == SKIPS
                state["skips"] %= SKIPS  # whoever resumes has mended it
                seconds = time.perf_counter() - begun
                record = Step(step, [] if failure else groups, state["tau"], grad_norm, learning_rate, seconds,
                              dict(rewards.weights), [] if failure else elsewhere, str(failure or ""))  # fmt: skip
                state["logs"].append(record.log())
                whole = random
            due = state["step"] == config.max_train_steps or state["step"] % max(1, config.checkpointing_steps) == 0
            if rank == 0 and config.checkpointing_steps and due:
                checkpoint()
            yield record
            record = None  # what it holds would stay in memory during the next update
            if stop:
                raise too_many_skips(failure, step)
    except (Exception, KeyboardInterrupt):
        if rank == 0 and whole and state["step"] > saved and (config.checkpointing_steps or save_when_stopped):
            checkpoint()
        raise


def too_many_skips(failure: Exception, step: int) -> Exception:
    """What ends a run after the skipped update `step`, with what was wrong in it and what to do."""
    if isinstance(failure, RewardError):
        return RewardError(f"the rewards of {SKIPS} updates in a row could not be had; {failure}")
    what_to_do = (
        "the weights have diverged: start again with a lower learning_rate or a higher kl_coef (or, if you gave tau, "
        "with a larger one)"
    )
    if isinstance(failure, NotFinite):
        what_to_do = "mend that reward or leave it out, then go on"
    return type(failure)(f"updates {step + 1 - SKIPS} to {step} were skipped; in update {step} {failure}: {what_to_do}")


# ---------------------------------------------------------------------------------------------------------- checkpoints


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


def discard(folder: Path) -> None:
    """Deletes a checkpoint: under another name, so that none that is half deleted can be taken for a whole one."""
    aside = folder.with_name(f"{folder.name}.old.aside")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def save_checkpoint(config: TrainConfig, policies, optimizer, generator: torch.Generator, state: dict) -> Path:
    """Writes `checkpoint-N` aside and renames it once it is on the disk; older ones beyond the limit are deleted only
    afterwards, and what an interrupted call left. Raises OSError naming the file; the earlier checkpoints are then as
    they were."""
    from safetensors.torch import save_file

    output_dir = Path(config.output_dir)
    folder = output_dir / f"checkpoint-{state['step']}"
    aside, before = folder.with_name(folder.name + ".aside"), folder.with_name(folder.name + ".old.aside")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(aside):
            aside.mkdir(parents=True)
        for name in ("default", "old", "ema"):
            tensors = {key: weight.detach().contiguous() for key, weight in adapter_weights(policies, name).items()}
            with writing(aside / f"{name}.safetensors") as path:
                save_file(tensors, path)
        training = io.BytesIO()  # torch.save to a file does not say when the disk is full
        torch.save({"optimizer": optimizer.state_dict(), "generator": generator.get_state()}, training)
        with writing(aside / "training_state.pt") as path:
            path.write_bytes(training.getbuffer())
        with writing(aside / "state.json") as path:
            path.write_text(json.dumps({"config": asdict(config), **state}))
        with writing(folder):
            sync(aside)
            if folder.exists():  # of a run that came this far before: kept until the new one has its name
                shutil.rmtree(before, ignore_errors=True)
                os.replace(folder, before)
            os.replace(aside, folder)
            sync(output_dir)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)  # the space it took
        whole = checkpoints(output_dir)
        then = "there is no earlier checkpoint"
        if whole:
            then = f"checkpoint-{whole[-1]} is whole, so then go on with --resume_from_checkpoint latest"
        raise OSError(f"{error}; {then}") from error
    older = [step for step in checkpoints(output_dir) if step != state["step"]]
    for step in older[: max(0, len(older) + 1 - config.checkpoints_total_limit)]:
        discard(folder.with_name(f"checkpoint-{step}"))
    for left in output_dir.glob("checkpoint-*.aside"):
        shutil.rmtree(left, ignore_errors=True)
    return folder


def checkpoints(output_dir: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder."""
    found = [p.name.removeprefix("checkpoint-") for p in output_dir.glob("checkpoint-*") if (p / "state.json").exists()]
    return sorted(int(number) for number in found if number.isdigit())


def find_checkpoint(config: TrainConfig) -> Path:
    """The folder that `resume_from_checkpoint` names; an error when there is none (never a silent fresh start)."""
    if config.resume_from_checkpoint != "latest":
        folder = Path(config.resume_from_checkpoint)
        if not (folder / "state.json").exists():
            raise FileNotFoundError(f"{folder} is not a checkpoint: it has no state.json")
        return folder
    steps = checkpoints(Path(config.output_dir))
    if not steps:
        raise FileNotFoundError(
            f"there is no checkpoint in {config.output_dir}, so nothing to resume: start the run without "
            f"--resume_from_checkpoint, with --overwrite_output_dir if it left files, and with --checkpointing_steps N "
            f"for a checkpoint every N updates"
        )
    return Path(config.output_dir) / f"checkpoint-{steps[-1]}"


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint: {config, step, tau, order, skips, logs (a line for every update so far)}.
    Raises ValueError naming the folder."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return {key: state[key] for key in ("config", "step", "tau", "order", "skips", "logs")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from None


def damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder} is damaged, or comes from another version ({type(error).__name__}: {' '.join(str(error).split())}): "
        f"delete it and resume from an earlier checkpoint, or start again"
    )


def load_checkpoint(folder: Path, policies, optimizer, generator: torch.Generator) -> dict:
    """Restores all policies, the optimizer and the generator; -> {step, tau, order, skips, logs}. Raises ValueError
    naming the folder before anything is changed."""
    from safetensors.torch import load_file

    try:
        saved = {name: load_file(folder / f"{name}.safetensors") for name in ("default", "old", "ema")}
        training = torch.load(folder / "training_state.pt", weights_only=True, map_location="cpu")
        training = training["optimizer"], training["generator"]
    except Exception as error:  # a damaged file can raise nearly anything
        raise damaged(folder, error) from None
    state = read_state(folder)
    for name, tensors in saved.items():
        shapes = {key: tuple(weight.shape) for key, weight in adapter_weights(policies, name).items()}
        if shapes != {key: tuple(weight.shape) for key, weight in tensors.items()}:
            raise ValueError(f"{folder}: the saved adapter does not fit; use the rank and model it was trained with")
    with torch.no_grad():
        for name, tensors in saved.items():
            for key, weight in adapter_weights(policies, name).items():
                weight.copy_(tensors[key])
    optimizer.load_state_dict(training[0])
    generator.set_state(training[1])
    return {key: state[key] for key in ("step", "tau", "order", "skips", "logs")}
