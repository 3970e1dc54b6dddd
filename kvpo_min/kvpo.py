"""One KVPO update, from a script to the gradient: `draw`, then `update` with its steps. Each can be called alone.

The paper's algorithm (arXiv 2605.14278, section 3), a line a step (authors: trainer/kvpo.py:985-1582 and 2833-3341):

    for every group of an update                                                                             train.py
        draw         a script, a fork, the frames that each of G branches may read, and noise                chr.py
        roll_out     the old policy makes the prefix, the branches and the anchor from that same noise       rollout.py
        score_group  rewards of the fork's chunk (local), and of what follows it (global)                    rewards.py
        compare      advantages A over the anchor, and whether any branch beats it                           grpo.py
        energies_of  replay under the ordinary context: how far a policy's velocities are from a branch's    tve.py
        send_back    Gibbs policy, clipped objective, KL to the initial policy; the gradient to the weights  grpo.py
        preserve     ours, not the paper's: the shared prefix stays as the initial policy makes it           kvpo.py
    optimizer step, moving average; every `old_policy_every` updates: old policy <- trained policy           train.py

Symbols: G branches, M members that the policy chooses among (the branches, and with `anchor_in_group` the anchor), B
blocks from the fork to the end of its chunk (or of `local_frames`), S denoising steps, F frames a block.

Memory: with `replay_batch` an update holds no graph larger than that many forwards, and its gradient is the same. The
loss depends on the weights through the energies alone. So they are computed without graph and give dL/dE; then each
piece is replayed once more, with graph, and dL/dE * E is backpropagated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo_min import chr as routing
from kvpo_min.chr import ordinary_frames
from kvpo_min.config import TrainConfig
from kvpo_min.grpo import Loss, anchor_advantages, branch_is_safe, fuse, kvpo_loss, safety_scale
from kvpo_min.pipeline import Pipeline, score
from kvpo_min.policies import acting
from kvpo_min.rewards import Mixture, check_finite
from kvpo_min.rollout import (
    Rollout,
    Sampler,
    Stream,
    draw_noise,
    fork,
    generate,
    keep_frames,
    one_of,
    pieces,
    read_together,
    replay,
    segment_at,
    switch_reach,
)
from kvpo_min.tve import energy_weights, gibbs_log_prob, step_energies, trajectory_energy

Signal = tuple[dict[str, Tensor], dict[str, Tensor]]  # of one clip: {component: [G]} and the anchor's {component: ()}


@dataclass(frozen=True)
class Task:
    """What is random in a group, and what follows from it."""

    script: str
    plan: routing.Plan
    noise: Tensor  # [1, blocks, S, F, C, H, W]; its blocks end where the last scored frame does
    chunk: range  # frames of the fork's chunk, to its end or less (`local_frames`): scored, and replayed from the fork

    @property
    def stop(self) -> int:
        """The frame after the last one of the videos."""
        return self.noise.shape[1] * self.noise.shape[3]


@dataclass(frozen=True)
class Group:
    """What one update saw of a script's branches."""

    script: str
    plan: routing.Plan
    rollout: Rollout
    videos: Tensor  # [G + 1, T, 3, H, W] pixels of the fork's chunk, anchor last
    rewards: dict[str, Tensor]  # name -> [G]; local signal
    anchor: dict[str, Tensor]  # name -> ()
    advantages: Tensor  # [G]
    loss: float
    after: Signal | None = None  # the global signal, where videos go on after the chunk
    safe: bool = True
    energies: Tensor | None = None  # [G, B, S] of the policy before the update; other methods may have none
    log_p: Tensor | None = None  # [G]
    log_p_old: Tensor | None = None
    log_p_init: Tensor | None = None
    ratio: Tensor | None = None  # [G]
    kl: float = 0.0
    entropy: float = 0.0
    clip_fraction: float = 0.0
    prefix_drift: float = 0.0  # mean squared difference to the initial policy's velocities on the prefix, if preserved
    # for `again`
    task: Task | None = None
    A: Tensor | None = None  # [M] advantages
    initial: Tensor | None = None  # [M, B, S] energies of the initial policy
    first: Tensor | None = None  # [M, B, S] those of the trained one, before the update
    kept: Tensor | None = None  # the initial policy's velocities on the prefix


def update(
    pipeline: Pipeline, policies, rewards: Mixture, config: TrainConfig, task: Task, tau: float,
    old_is_current: bool = True, prefix: Stream | None = None,
) -> Group:  # fmt: skip
    """One group, from its plan to the gradient, which is added to that of the adapter `default`.
    `policies`: from `add_policies`. `old_is_current`: the adapters `old` and `default` are alike, so the ratio is 1.
    `prefix`: as in `roll_out`. Raises FloatingPointError when a video, reward, energy or loss is not finite, and what
    the rewards raise."""
    rollout = roll_out(pipeline, policies, config, task, prefix)
    videos, signals = score_group(pipeline, rewards, task, rollout)
    advantages, safe = compare(signals, rewards.weights, config)
    scale = safety_scale(safe, config.unsafe_scale)  # 0: the loss will be 0, and no graph is needed
    energies = {"initial": energies_of(pipeline, policies, config, rollout, "initial")}
    if not old_is_current:
        energies["old"] = energies_of(pipeline, policies, config, rollout, "old")
    energies["default"] = energies_of(pipeline, policies, config, rollout, "default", with_graph=scale > 0)
    log_p, loss = send_back(pipeline, config, rollout, energies, advantages, scale, tau)
    drift, kept = preserve(pipeline, policies, config, task, rollout) if config.prefix_coef else (0.0, None)
    local, anchor = signals[0]
    after = signals[1] if len(signals) > 1 else None
    g = config.num_generations
    return Group(
        script=task.script, plan=task.plan, rollout=rollout, videos=videos,
        rewards=local, anchor=anchor, after=after,
        advantages=advantages[:g], safe=safe, energies=energies["default"].detach()[:g],
        log_p=log_p["default"].detach()[:g], log_p_old=log_p["old"][:g], log_p_init=log_p["initial"][:g],
        ratio=loss.ratio[:g],
        loss=loss.total.item(), kl=loss.kl.item(), entropy=loss.entropy.item(), clip_fraction=loss.clip_fraction.item(),
        prefix_drift=drift, task=task, A=advantages, initial=energies["initial"],
        first=energies["default"].detach(), kept=kept,
    )  # fmt: skip


def again(pipeline: Pipeline, policies, config: TrainConfig, group: Group, tau: float, done: int = 1) -> None:
    """Gradient number `done` + 1 from a group that `update` has made, for `num_iterations`: its branches and rewards
    stay, and so do all energies but those of the trained policy's steps that carry gradient (with `compat` all of its
    steps are replayed). Unlike PPO and TRL, the policy as it is now stands for the old one, so the ratio is 1 and the
    clip does nothing. Raises FloatingPointError like `update`."""
    scale = safety_scale(group.safe, config.unsafe_scale)
    if scale:
        known = group.first if config.context == "stored" else None  # "own": a block follows from all steps of the last
        energies = energies_of(pipeline, policies, config, group.rollout, with_graph=True, known=known)
        both = {"initial": group.initial, "default": energies}
        send_back(pipeline, config, group.rollout, both, group.A, scale, tau)
    if config.prefix_coef:
        preserve(pipeline, policies, config, group.task, group.rollout, group.kept, done)


def energies_for_tau(pipeline: Pipeline, policies, config: TrainConfig, task: Task) -> Tensor:  # [1, M]
    """Energies of a group that is not trained on: their spread sets tau."""
    energies = energies_of(pipeline, policies, config, roll_out(pipeline, policies, config, task))
    return trajectory_energy(energies, energy_weights(pipeline.sigmas, config.sigma_floor))[None]


# ------------------------------------------------------------------------------------------------------------ its steps


def draw(
    pipeline: Pipeline, scripts: Sequence[str], order: list[int], config: TrainConfig, step: int,
    generator: torch.Generator, plan: routing.Plan | None = None,
) -> Task:  # fmt: skip
    """Script, plan (if it is not given) and noise of one group of update `step`, from a CPU generator. `order`: indices
    of the scripts still to come, the next one last; it is used up, and drawn again when it is empty."""
    if not order:  # every script once before any comes again
        shuffled = torch.randperm(len(scripts), generator=generator).tolist()
        order[:] = reversed(range(len(scripts))) if config.in_order else shuffled
    index, window = order.pop(), routing.Window()
    plan = plan or make_plan(config, step, index, window, generator, pipeline.bank is not None)
    chunk = routing.chunk_of(plan.fork, config.num_frames)
    if config.local_frames:
        chunk = range(chunk.start, min(chunk.stop, plan.fork + config.local_frames))
    n_blocks = min(config.num_frames, chunk.stop + config.global_frames) // window.block
    noise = draw_noise(n_blocks, len(pipeline.sigmas), (window.block, *pipeline.latent_shape), generator)
    return Task(scripts[index], plan, noise, chunk)


@torch.no_grad()
def roll_out(pipeline: Pipeline, policies, config: TrainConfig, task: Task, prefix: Stream | None = None) -> Rollout:
    """Prefix, G branches and the anchor, made by the adapter `old`; with the keys and values that replays read.
    `prefix`: one of `make_prefixes` (default: made here, where nothing else holds it, so that it can be freed)."""
    sampler = pipeline.sampler(config.num_segments)
    plan = task.plan
    noise = task.noise.to(pipeline.backbone.device)
    with acting(policies, "old"):
        made = fork(
            pipeline.backbone, texts_of(pipeline, task), noise, plan, task.stop, task.chunk.stop, sampler,
            config.nearest, config.branch_batch, prefix or next(make_prefixes(pipeline, config, [task])),
        )  # fmt: skip
    if config.prefix_coef:  # `preserve` replays the prefix itself
        return made
    read = {*range(sampler.window.sink), *range(plan.fork - sampler.window.past, plan.fork)}
    return replace(made, prefix=keep_frames(made.prefix, read))


def score_group(
    pipeline: Pipeline, rewards: Mixture, task: Task, rollout: Rollout
) -> tuple[Tensor, list[Signal]]:  # fmt: skip
    """-> pixels of the fork's chunk [G + 1, T, 3, H, W], and its rewards (local signal), then, if the videos go on
    after it, those of what follows (global signal). Raises FloatingPointError when the latents are not finite."""
    check_finite("the latents of the videos are", rollout.videos)
    shown, signals = None, []
    for frames in (task.chunk, range(task.chunk.stop, rollout.videos.shape[1])):
        if len(frames):
            pixels = pipeline.decode(rollout.videos[:, frames.start : frames.stop])
            scores = score(pipeline, rewards, pixels, [task.script] * len(pixels), frames.start)
            signals.append(({name: s[:-1] for name, s in scores.items()}, {name: s[-1] for name, s in scores.items()}))
            shown = pixels if shown is None else shown
    return shown, signals


def compare(signals: Sequence[Signal], weights: Mapping[str, float], config: TrainConfig) -> tuple[Tensor, bool]:
    """-> advantages [M] over the anchor, local and global signal in one, and whether any branch beats the anchor."""
    each = [anchor_advantages(branches, anchor, weights, config.adv_eps) for branches, anchor in signals]
    if config.anchor_in_group:  # 0 over itself
        each = [torch.cat([signal, signal.new_zeros(1)]) for signal in each]
    advantages = fuse(each[0], each[1] if len(each) > 1 else None,
                      config.local_weight, config.global_weight, config.fuse_mode, config.adv_clip_max)  # fmt: skip
    return advantages, any(branch_is_safe(branches, anchor, weights) for branches, anchor in signals)


def energies_of(
    pipeline: Pipeline, policies, config: TrainConfig, rollout: Rollout, policy: str = "default",
    with_graph: bool = False, known: Tensor | None = None,
) -> Tensor:  # [M, B, S]  # fmt: skip
    """How far a policy ("default", "old", "ema" or "initial") is from each branch's velocities, under the ordinary
    context. `with_graph`: keep the graph; with `replay_batch` a leaf, whose gradient `send_back` takes further.
    `known`: energies, from which those of the steps that carry no gradient are taken."""
    n_steps = 0 if known is None else config.grad_steps  # that are replayed; 0: all
    with acting(policies, policy), torch.set_grad_enabled(with_graph and not config.replay_batch):
        if not config.replay_batch:
            steps, sampler = config.grad_steps if with_graph else 0, pipeline.sampler(config.num_segments)
            more = (steps, config.context, members(config), n_steps)
            new = replay_energies(pipeline.backbone, rollout, sampler, *more)
            return new if known is None else torch.cat([new, known[:, :, n_steps:]], 2)
        z = rollout.trajectory.z[: members(config)]  # [M, B, S, F, C, H, W]
        energies = z.new_zeros(z.shape[:3], dtype=torch.promote_types(z.dtype, torch.float32))
        if known is not None:
            energies.copy_(known)
        for where, part in energies_in_pieces(pipeline, config, rollout, n_steps):
            energies[where] = part
    return energies.requires_grad_(with_graph)


def send_back(
    pipeline: Pipeline, config: TrainConfig, rollout: Rollout, energies: Mapping[str, Tensor], advantages: Tensor,
    scale: float, tau: float,
) -> tuple[dict[str, Tensor], Loss]:  # fmt: skip
    """Loss of one group, and, unless `scale` is 0, its gradient to the weights, divided by `groups_per_update`.
    energies: [M, B, S] of the policies "default", "initial" and, where it is not the current one, "old".
    -> log pi [M] of all three, and the loss. Raises FloatingPointError when energies or loss are not finite."""
    weights = energy_weights(pipeline.sigmas, config.sigma_floor)
    log_p = {}
    for policy, each in energies.items():
        check_finite(f"the energies of the {'trained' if policy == 'default' else policy} policy are", each)
        log_p[policy] = gibbs_log_prob(trajectory_energy(each, weights), tau)
    log_p.setdefault("old", log_p["default"].detach())  # the same weights would give the same numbers: the ratio is 1
    A = advantages.to(log_p["default"].device)  # pixels and scores may live on the CPU
    loss = kvpo_loss(log_p["default"], log_p["old"], log_p["initial"], A,
                     config.clip_range_low, config.clip_range_high, config.kl_coef, scale)  # fmt: skip
    check_finite(f"the loss is {loss.total.item()}, that is,", loss.total)
    if scale:
        (loss.total / config.groups_per_update).backward()
        slope = energies["default"].grad if config.replay_batch else None  # dL/dE [M, B, S]
        if slope is not None and slope.any():
            for where, part in energies_in_pieces(pipeline, config, rollout, config.grad_steps):
                (part * slope[where]).sum().backward()
    return log_p, loss


def preserve(
    pipeline: Pipeline, policies, config: TrainConfig, task: Task, rollout: Rollout, kept: Tensor | None = None,
    done: int = 0,
) -> tuple[float, Tensor | None]:  # fmt: skip
    """Ours, not the paper's: adds the gradient of prefix_coef * mean (v_trained - v_initial)^2 on blocks of the prefix,
    noised to the first two levels (with `num_iterations` to one of them, by turns), under the ordinary context. A group
    compares its branches, so it can neither teach nor protect what they share, while the adapter acts on every block:
    without this the journey before the fork drifts unseen. Left out are blocks made under earlier words, and those
    whose context is no longer in the history.
    -> that mean, before the update, and v_initial, which another call for the same group takes as `kept`."""
    backbone, sampler, prefix = pipeline.backbone, pipeline.sampler(config.num_segments), rollout.prefix
    starts = [
        start
        for start in range(0, prefix.frame, sampler.window.block)
        if segment_at(start, sampler.switches) == prefix.segment
        and set(ordinary_frames(start, sampler.window).tolist()) <= set(prefix.history.frames)
    ]
    if not starts:
        return 0.0, None
    blocks = [start // sampler.window.block for start in starts]
    x0 = torch.stack([prefix.x0[b] for b in blocks])  # [blocks, 1, F, C, H, W]
    s = sampler.sigmas[:2, None, None, None, None]
    z = (1 - s) * x0 + s * task.noise[0, blocks, :2].to(x0.device)  # [blocks, 2, F, C, H, W]
    kv, mask = read_together(prefix.history, [ordinary_frames(start, sampler.window) for start in starts], z.shape[2])
    z, sigma, first = z.flatten(0, 1), sampler.sigmas[:2].repeat(len(starts)), torch.tensor(starts).repeat_interleave(2)
    rows, at_once = torch.arange(len(z)), config.replay_batch or len(z)

    def velocity(row: Tensor) -> Tensor:
        block = row // 2  # two levels read the same
        return backbone.velocity(z[row], sigma[row], first[row], rollout.text, kv[:, :, block], mask[block])

    if kept is None:
        with torch.no_grad(), acting(policies, "initial"):
            kept = torch.cat([velocity(row) for row in rows.split(at_once)])
    if config.num_iterations > 1:  # one of the two levels of each block, by turns
        rows = rows[(rows // 2 + rows + done) % 2 == 0]
    total = 0.0
    with acting(policies, "default"):
        for row in rows.split(at_once):  # one graph at a time
            drift = (velocity(row) - kept[row]).square().sum() / z[rows].numel()
            (config.prefix_coef * drift / config.groups_per_update).backward()
            total += drift.item()
    return total, kept


# ----------------------------------------------------------------------------------------------------- what they share


def make_plan(
    config: TrainConfig, step: int, index: int, window: routing.Window, generator: torch.Generator, bank: bool = False
):  # fmt: skip
    """Where to fork and what each branch reads: the paper's plan, or the authors' with compat="official", which with a
    memory bank is MemFlow's: slots instead of frames, and no nearest ones (their m = 3 is the block itself)."""
    slots = bool(config.compat and bank)
    nearest = 0 if slots else config.nearest
    sizes = (config.num_frames, window, nearest, config.perturb_num_blocks, config.num_generations)
    if config.compat:
        return routing.plan_official(config.seed, index, (step + 1) * 1_000_003, *sizes, slots=slots)
    return routing.plan(*sizes, generator, config.fork)


@torch.no_grad()
def make_prefixes(pipeline: Pipeline, config: TrainConfig, tasks: Sequence[Task]) -> Iterator[Stream]:
    """The videos up to their forks, by the active policy, with the keys and values that branches and replays read.
    Consecutive tasks with the same fork are generated in one batch, when the first of them is asked for."""
    sampler, bank = pipeline.sampler(config.num_segments), pipeline.bank
    if bank is not None:
        check_bank(config)
        bank = replace(bank, compat=config.compat or bank.compat)
    for start, same_fork in itertools.groupby(tasks, lambda task: task.plan.fork):
        batch = list(same_fork)
        noise = torch.cat([task.noise for task in batch]).to(pipeline.backbone.device)
        scripts = [pipeline.segments(task.script) for task in batch]
        texts = [pipeline.embed(list(segment)) for segment in zip(*scripts, strict=True)]
        made = generate(pipeline.backbone, Stream(bank=bank), texts, noise, start, sampler)
        near = range(start - switch_reach(sampler.window), start)
        for k, task in enumerate(batch):
            one = made if len(batch) == 1 else one_of(made, k)
            needed = {*range(sampler.window.sink), *routing.prefix_frames(task.plan, sampler.window), *near}
            yield one if config.prefix_coef else keep_frames(one, needed)


def texts_of(pipeline: Pipeline, task: Task) -> list[Tensor]:
    """What the model reads, [1, L, D] a segment."""
    return [pipeline.embed([text]) for text in pipeline.segments(task.script)]


def replay_energies(
    backbone, rollout: Rollout, sampler: Sampler, grad_steps: int = 0, context: str = "stored", branches: int = 0,
    n_steps: int = 0,
) -> Tensor:  # [G, B, S]  # fmt: skip
    """How far the active policy is from each branch's velocities; the first `grad_steps` steps carry gradient.
    `branches`: how many (default: all but the anchor). `n_steps`: how many (default: all)."""
    branches = branches or len(rollout.plan.routes)
    v = replay(backbone, rollout, sampler, grad_steps, context=context, branches=branches, n_steps=n_steps)
    return step_energies(v, rollout.trajectory.velocity[: len(v), :, : v.shape[2]])


def energies_in_pieces(
    pipeline: Pipeline, config: TrainConfig, rollout: Rollout, n_steps: int = 0
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Energies of the first steps (0: all) at most `replay_batch` forwards at a time, with graph where gradients are
    recorded. Yields where a piece belongs in [G, B, S], and its energies."""
    backbone, sampler = pipeline.backbone, pipeline.sampler(config.num_segments)
    g = members(config)
    for where, part, its_sampler in pieces(backbone, rollout, sampler, config.replay_batch, n_steps, config.context, g):
        steps, branches = len(its_sampler.sigmas), len(part.trajectory.z)
        yield where, replay_energies(backbone, part, its_sampler, steps, config.context, branches)


def members(config: TrainConfig) -> int:
    """How many continuations the Gibbs policy chooses among: the branches, and with `anchor_in_group` the anchor."""
    return config.num_generations + config.anchor_in_group


def check_bank(config: TrainConfig) -> None:
    """Raises ValueError for what does not go with a memory bank."""
    if config.prefix_coef:
        raise ValueError(
            f"prefix_coef must be 0 with a memory bank (bank_size), got {config.prefix_coef}: `preserve` would replay "
            f"the prefix without the bank that it was made with"
        )
