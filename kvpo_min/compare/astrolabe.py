"""Astrolabe (arXiv 2603.17051): reinforcement learning on the forward process, for the same generator as KVPO.

Where KVPO scores how well the policy explains the steps a branch took, Astrolabe needs only the clean end of each
candidate clip. It is noised again to one of the sampler's levels, x = (1 - sigma) x0 + sigma eps with the target
velocity u = eps - x0, and two implicit policies are contrasted (its equations 1 and 2):

    v+ = (1 - beta) v_old + beta v_theta        v- = (1 + beta) v_old - beta v_theta
    L  = mean over candidates of  r |v+ - u|^2 + (1 - r) |v- - u|^2,   r = clip(A / A_max, -1, 1) / 2 + 1/2

At v_theta = v_old its gradient is 2 beta (2 r - 1) (v_old - u): good candidates are copied, bad ones avoided. For a
given noisy input its minimum is v_old + (2 alpha / beta) (v_r - v_old) + (v_old - m) / beta, with alpha the mean of r
there, v_r the mean of u weighted by r and m its plain mean: v_old = m after flow matching, not after distillation.

One update (`train`): a long video is streamed once and forgotten up to the active window; G candidates of the window
start from that frozen prefix; the loss lives in the window alone, so memory does not depend on the video's length. A KL
term holds those candidates near a reference whose rewards disagree in rank.

The authors' released code differs from their paper in many places; `AstrolabeConfig(compat="official")` is the code's
side, docs/paper_map.md the table. Their streaming module is not in their repository, so streaming here is our reading
of the paper (section 3.3, algorithm 2). TN: scripts/train_nft_wan.py of their repository.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo_min.chr import Plan, Window
from kvpo_min.config import knob, settle
from kvpo_min.pipeline import score
from kvpo_min.policies import acting, adapter_weights, add_policies, copy_adapter
from kvpo_min.rewards import Mixture
from kvpo_min.rollout import Rollout, Sampler, Stream, fork, generate, replay
from kvpo_min.tve import Trajectory, schedule

EPS = 1e-4  # added to a standard deviation, as the authors do


# ------------------------------------------------------------------------------------------------------------ objective


def advantages(rewards: Mapping[str, Tensor], weights: Mapping[str, float], spread: str = "global") -> Tensor:
    """A [N, G]: the weighted sum of rewards, minus its mean over the candidates of a group.

    rewards: name -> [N, G], N groups of G candidates; weights: name -> number, the same names. spread="none" is the
    paper's equation 4. spread="global" also divides by the standard deviation over all N * G sums, as its Table S1 and
    TN do: with rewards in [0, 1] and A_max = 5 the r of equation 4 would hardly leave 1/2. Raises KeyError, ValueError.
    """
    if set(rewards) != set(weights):
        raise KeyError(f"weights for {sorted(rewards)} are needed, got weights for {sorted(weights)}")
    total = sum(weights[name] * r.float() for name, r in rewards.items())
    if total.ndim != 2 or not total.isfinite().all():
        raise ValueError(f"rewards must be finite and [N, G], got {list(total.shape)}: mend or drop that candidate")
    A = total - total.mean(1, keepdim=True)
    return A if spread == "none" else A / (total.std(correction=0) + EPS)


def positive_share(A: Tensor, clip: float = 5.0) -> Tensor:
    """r in [0, 1], like A: 1 is a purely positive candidate, 0 a purely negative one, 1/2 says nothing (TN:943-946)."""
    return A.clamp(-clip, clip) / (2 * clip) + 0.5


def contrast(
    v: Tensor, v_old: Tensor, target: Tensor, r: Tensor, beta: float = 1.0, weight: Tensor | float = 1.0
) -> Tensor:
    """L_policy (). v, v_old, target [G, ...]; r [G]; only v carries gradient.

    weight: () or [G]; sigma^2 makes it the same contrast of x0 predictions (an x0 residual is sigma times a velocity
    residual), as in TN:949-956. No self-normalising weight: DiffusionNFT's is in baselines.py."""
    if not v.shape == v_old.shape == target.shape or r.shape != v.shape[:1]:
        raise ValueError(
            "v, v_old and target must be alike [G, ...] and r [G], got "
            f"{list(v.shape)}, {list(v_old.shape)}, {list(target.shape)} and {list(r.shape)}"
        )
    v_old, target, r = v_old.detach(), target.detach(), r.detach()
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    dims = tuple(range(1, v.ndim))
    positive = ((1 - beta) * v_old + beta * v - target).square().mean(dims)  # [G]
    negative = ((1 + beta) * v_old - beta * v - target).square().mean(dims)
    return (weight * (r * positive + (1 - r) * negative)).mean()


# --------------------------------------------------------------------------------------------------------- selective KL


def ranks(values: Tensor) -> Tensor:
    """Ranks [n] of values [n]: 1 the lowest, n the highest; equal values share their mean rank."""
    below = (values[None] < values[:, None]).sum(1)
    same = (values[None] == values[:, None]).sum(1)
    return below + (same + 1) / 2


def rank_disagreement(primary: Tensor, others: Sequence[Tensor], best: str = "last") -> Tensor:
    """Delta [n] = rank of the primary reward - mean rank of the other rewards, over n candidates.

    best="last" (the best candidate has rank n): Delta is high where the primary reward alone is fond of a candidate,
    which the paper calls likely hacking. best="first" is TN:823-831: the best has rank 1, so the sign turns round and
    the candidates are found of which the primary reward thinks less than the others do.
    """
    if not others or any(o.shape != primary.shape or o.ndim != 1 for o in others):
        raise ValueError("rank disagreement needs a primary reward [n] and at least one other of that shape")
    delta = ranks(primary) - torch.stack([ranks(o) for o in others]).mean(0)
    return delta if best == "last" else -delta


@dataclass(frozen=True)
class Risk:
    """How many candidates are held near the reference: the share `rho` of those with Delta >= 0 (TN:196-216)."""

    rho: float = 0.1
    seen: tuple[float, ...] = ()  # mean nonnegative Delta of past updates, the last 20

    def update(self, delta: Tensor) -> Risk:
        """rho grows by a tenth when rewards disagree more than in any update seen, shrinks when less, in [.02, .2].
        The paper leaves the rule open (UpdateRiskRatio in its algorithm 1); this is the released code's."""
        mean = delta[delta >= 0].mean().item()
        factor = 1.0
        if self.seen and mean > max(self.seen):
            factor = 1.1
        elif self.seen and mean < min(self.seen):
            factor = 0.9
        return Risk(min(max(self.rho * factor, 0.02), 0.2), (*self.seen, mean)[-20:])

    def mask(self, delta: Tensor) -> Tensor:
        """[n] bool: Delta above the (1 - rho) quantile of the nonnegative ones."""
        return delta > torch.quantile(delta[delta >= 0].float(), 1 - self.rho)


def selective_kl(v: Tensor, v_ref: Tensor, mask: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean squared velocity distance () to the reference, over the masked candidates alone; 0 if there are none.
    v, v_ref [G, ...], mask [G] bool."""
    if not mask.any():
        return v.new_zeros(())
    dims = tuple(range(1, v.ndim))
    return (weight * (v - v_ref.detach()).square().mean(dims))[mask].mean()


def refresh_due(kl: float, age: int, tau_kl: float, k_max: int) -> bool:
    """Is the reference to be replaced by the policy: it has drifted too far, or `age` updates is too long ago."""
    return kl > tau_kl or age > k_max


# -------------------------------------------------------------------------------------------------- streaming, windowed


@dataclass(frozen=True)
class StreamedNoise:
    """The noise of a video of any length, drawn when a block asks for it, so that it is never held whole. Stands where
    `generate` and `fork` take a tensor [B, blocks, S, F, C, H, W]; each video and block has its own generator."""

    seed: int
    n_blocks: int
    block_shape: tuple[int, ...]  # S, F, C, H, W
    rows: Tensor  # [B] numbers of the videos
    device: torch.device | str = "cpu"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), self.n_blocks, *self.block_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key):
        if not isinstance(key, tuple):  # [members]: other rows, nothing drawn
            return replace(self, rows=self.rows[key])
        rows, block = key  # [:, block]: drawn now
        out = []
        for row in self.rows[rows].tolist():
            seed = ((self.seed * 1_000_003 + row) * 1_000_003 + block) % 2**63
            out.append(
                torch.randn(self.block_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            )
        return torch.stack(out).to(self.device)


def forget(stream: Stream, window: Window) -> Stream:
    """The same stream without the latents that nothing will ask for again; a prompt switch reads the last 12 frames."""
    keep = -(-window.attended // window.block)
    old = len(stream.x0) - keep
    return replace(stream, x0=tuple(x[:, :0].clone() if i < old else x for i, x in enumerate(stream.x0)))


def stream_prefix(backbone, texts: Sequence[Tensor], noise, start: int, sampler: Sampler) -> Stream:
    """Streams a video up to frame `start` in constant memory, without gradient: the detached history of the active
    window. noise: `StreamedNoise` or [1, blocks, S, F, C, H, W]; the last row is used, as `fork` does."""
    stream, block = Stream(), sampler.window.block
    for stop in [*range(6 * block, start, 6 * block), start]:
        stream = forget(generate(backbone, stream, texts, noise[-1:], stop, sampler), sampler.window)
    return stream


def sample_group(
    backbone, texts: Sequence[Tensor], noise, start: int, stop: int, sampler: Sampler, branch_batch: int | None = None
) -> Rollout:
    """G candidates of the window [start, stop) from one frozen prefix, each from its own noise (paper: section 3.2).

    noise [G, blocks, ...] or `StreamedNoise` with G rows; the last one makes the prefix. Nothing is routed and there is
    no anchor: all G rows of the rollout are candidates. Its videos end with the window and begin at most 12 frames
    before it."""
    if len(noise) < 2 or not 0 <= start < stop:
        raise ValueError(f"expected 2 candidates or more and 0 <= start < stop, got {len(noise)}, {start} and {stop}")
    plan = Plan(start, range(0), torch.empty(len(noise) - 1, 0, dtype=torch.long), 0)
    prefix = stream_prefix(backbone, texts, noise, start, sampler) if start else None
    return fork(backbone, texts, noise, plan, stop, stop, sampler, 0, branch_batch, prefix)


def noised(rollout: Rollout, sampler: Sampler, sigma: Tensor, eps: Tensor) -> tuple[Rollout, Sampler]:
    """The rollout's clean ends at one noise level: what `replay` is given. `rollout.trajectory.velocity` of the result
    is the target eps - x0. sigma (); eps like the ends [G, B, F, C, H, W], G rows (fewer leave out the last ones)."""
    x0 = rollout.trajectory.x0[: len(eps), :, -1:]  # [G, B, 1, F, C, H, W]
    z = (1 - sigma) * x0 + sigma * eps[:, :, None]
    return replace(rollout, trajectory=Trajectory(z, x0, sigma[None])), replace(sampler, sigmas=sigma[None])


def noisy_velocities(backbone, rollout: Rollout, sampler: Sampler, eps: Tensor, generator: torch.Generator) -> Tensor:
    """As TN:906-941: no history of keys; the whole video at one noise level, a block seeing the 12 frames that end with
    it, noisy as they are, and no sink. rollout, sampler: from `noised`. -> [G, B, 1, F, C, H, W], of the window.
    Needs `WanBackbone`, which takes a mask."""
    sigma, window = sampler.sigmas[0], sampler.window
    x0 = rollout.videos[: len(eps)]
    stop = rollout.prefix.frame + eps.shape[1] * window.block
    shared = x0.shape[1] - eps.shape[1] * window.block
    before = torch.randn(len(eps), shared, *x0.shape[2:], generator=generator, dtype=torch.float32).to(x0)
    x = torch.cat([(1 - sigma) * x0[:, :shared] + sigma * before, rollout.trajectory.z.flatten(1, 3)], 1)
    frames = torch.arange(stop - x.shape[1], stop)
    end = (frames // window.block + 1) * window.block
    mask = (frames[None] < end[:, None]) & (frames[None] >= end[:, None] - window.attended)  # [query, key]
    mask = mask.to(x.device).expand(len(x), -1, -1)
    v = backbone(x, sigma.expand(len(x)), frames, rollout.text, None, mask)
    return v[:, shared:].unflatten(1, (eps.shape[1], 1, window.block))


# ----------------------------------------------------------------------------------------------------------------- loop


@dataclass(frozen=True)
class AstrolabeConfig:
    """One run. The defaults are the paper's (Table S1), but for learning_rate, rank, num_generations, the lengths and
    the advantage's spread, which are sized for the pocket model. compat="official": the released code's side."""

    seed: int = knob(0, least=-(2**63), below=2**63)
    max_train_steps: int = knob(60, least=1)
    num_frames: int = knob(39, least=3, multiple=3)
    window_frames: int = knob(18, least=3, multiple=3)  # active window; the paper's 21 is a whole short video
    fork: int = knob(0, least=0, multiple=3)  # ours: where the window begins; 0: drawn
    num_generations: int = knob(8, least=2)  # candidates G; paper 24
    groups_per_update: int = knob(2, least=1)  # prompts; paper 48
    levels_per_group: int = knob(1, least=1, most=4)  # noise levels a group is trained at in an update
    learning_rate: float = knob(2e-4, above=0)  # paper 1e-5
    adam_weight_decay: float = knob(1e-4, least=0)
    max_grad_norm: float = knob(1.0, above=0)
    rank: int = knob(16, least=1)  # of the LoRA; paper 256
    lora_alpha: int = knob(16, least=1)
    beta: float = knob(1.0, official=0.1, above=0)
    adv_clip_max: float = knob(5.0, above=0)
    spread: str = knob("global", of=("none", "global"))
    kl_coef: float = knob(1e-4, least=0)
    primary: str = "vq"  # the reward whose lone enthusiasm is distrusted
    selective: bool = True  # False: all candidates are held near the reference
    old_decay: float = knob(0.9, least=0, most=1)  # share that the old policy keeps in every update
    ema_decay: float = knob(0.9, least=0, most=1)
    tau_kl: float = knob(0.15, least=0)  # the released code's first value; the paper names none
    k_max: int = knob(15, least=0)
    branch_batch: int = knob(0, least=0)  # candidates that run at once; 0: all
    replay_batch: int = knob(0, least=0)
    compat: str = knob("", of=("", "official"))
    space: str = knob("velocity", official="x0", of=("velocity", "x0"))  # of the contrast and the KL; official: "x0"
    levels: str = knob("sampler", official="even", of=("sampler", "even"))  # even: 1, .75, .5, .25
    context: str = knob("clean", official="noisy", of=("clean", "noisy"))  # noisy: a video's own noisy past
    best: str = knob("last", official="first", of=("last", "first"))  # rank of the best candidate; official: "first"

    def __post_init__(self):
        settle(self)
        if self.window_frames > self.num_frames:
            raise ValueError(f"window_frames must be at most num_frames {self.num_frames}, got {self.window_frames}")
        if self.compat and self.old_decay != type(self).old_decay:
            raise ValueError(f"old_decay is not read with compat official, whose old policy keeps min(step / 1000, "
                             f"1/2), got {self.old_decay}: leave one of them out")  # fmt: skip
        if self.context == "noisy" and self.replay_batch:
            raise ValueError(f"replay_batch must be 0: a noisy context is replayed at once, got {self.replay_batch}")


def old_policy_decay(config: AstrolabeConfig, step: int) -> float:
    """How much of the old policy stays: gamma (paper), or min(step / 1000, 1/2) (TN:158-178 with decay_type 1)."""
    return min(0.001 * step, 0.5) if config.compat else config.old_decay


def next_tau_kl(config: AstrolabeConfig, tau_kl: float, age: int) -> float:
    """The threshold after a refresh: constant (paper); in TN:684-690 it falls to .05 after an early refresh."""
    if config.compat:
        tau_kl = max(tau_kl - 0.01, 0.1) if age > 15 else tau_kl
        tau_kl = min(tau_kl + 0.01, 0.05) if age < 5 else tau_kl
    return tau_kl


def window_starts(config: AstrolabeConfig, window: Window, switches: Sequence[int]) -> list[int]:
    """Where the active window may begin: at a block, after the frames of a full attention window (all blocks of the
    window run as one batch; with context="noisy" anywhere), and without a prompt switch inside. Raises ValueError when
    there is no such place."""
    first = 0 if config.context == "noisy" else window.sink + window.past
    starts = range(first, config.num_frames - config.window_frames + 1, window.block)
    starts = [s for s in starts if not any(s < switch < s + config.window_frames for switch in switches)]
    starts = [s for s in starts if config.fork in (0, s)]
    if not starts:
        raise ValueError(
            f"no window of {config.window_frames} frames fits {config.num_frames} frames with prompt switches at "
            f"{list(switches)} and a fork at {config.fork or 'any'}: make window_frames smaller "
            f"({first} frames come before it)"
        )
    return starts


def group_loss(policies, backbone, rollout: Rollout, r: Tensor, mask: Tensor, sampler: Sampler, sigma: Tensor,
               config: AstrolabeConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """L_policy + kl_coef * L_KL of one group at one noise level -> total (with gradient), policy, kl; all ().
    r [G], mask [G] bool. `policies` holds the adapters `default`, `old` and `ref`."""
    eps = torch.randn(rollout.trajectory.x0[:, :, 0].shape, generator=generator, dtype=torch.float32).to(rollout.videos)
    at, level = noised(rollout, sampler, sigma, eps)
    state = generator.get_state()

    def velocities(name: str, grad: bool) -> Tensor:
        generator.set_state(state)  # the same noise for all three
        with acting(policies, name), torch.set_grad_enabled(grad):
            if config.context == "noisy":
                return noisy_velocities(backbone, at, level, eps, generator)
            return replay(backbone, at, level, int(grad), config.replay_batch, branches=len(eps))

    v_old, v = velocities("old", False), velocities("default", True)
    weight = sigma.square() if config.space == "x0" else 1.0
    policy = contrast(v, v_old, at.trajectory.velocity, r, config.beta, weight)
    kl = policy.new_zeros(())
    if config.kl_coef and mask.any():
        kl = selective_kl(v, velocities("ref", False), mask, weight)
    return policy + config.kl_coef * kl, policy.detach(), kl.detach()


def train(pipeline, scripts: Sequence[str], rewards: Mixture, config: AstrolabeConfig, policies=None) -> Iterator[dict]:
    """Trains in place and yields one record (keys as train.py's) an update. `policies`: from `train.add_policies`.

    Raises FloatingPointError when a loss or gradient is not finite, ValueError when no window fits or `primary` is not
    a reward."""
    policies = policies if policies is not None else add_policies(pipeline, config)
    if "ref" not in policies.peft_config:
        policies.add_adapter("ref", policies.peft_config["default"])
    for name in ("old", "ref"):
        copy_adapter(policies, "default", name)
    policies.set_adapter("default")
    weights = adapter_weights(policies, "default")
    optimizer = torch.optim.AdamW(weights.values(), lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    generator = torch.Generator().manual_seed(config.seed)

    sigmas = pipeline.sigmas
    device = pipeline.backbone.device
    sampler = pipeline.sampler(len(pipeline.segments(scripts[0])), routed=False)
    window = sampler.window
    levels = sigmas if config.levels == "sampler" else schedule(len(sigmas), shift=1.0)
    starts = window_starts(config, window, sampler.switches)
    if config.selective and (config.primary not in rewards.rewards or len(rewards.rewards) < 2):
        raise ValueError(
            f"selective KL compares the reward {config.primary!r} with others, got {sorted(rewards.rewards)}; "
            "name one of them as `primary`, add another reward, or set selective=False"
        )
    risk = Risk()
    tau_kl = config.tau_kl
    age = 0
    G = config.num_generations

    for step in range(config.max_train_steps):
        begun, order = time.perf_counter(), torch.randperm(len(scripts), generator=generator)
        start = starts[int(torch.randint(len(starts), (1,), generator=generator))]  # the same for all prompts
        stop = start + config.window_frames
        groups, scores = [], []
        for i in range(config.groups_per_update):  # 1: candidates, by the old policy
            script = scripts[order[i % len(scripts)]]
            seed = int(torch.randint(2**31, (1,), generator=generator))
            shape = (len(sigmas), window.block, *pipeline.latent_shape)
            noise = StreamedNoise(seed, stop // window.block, shape, torch.arange(G), device)
            texts = [pipeline.embed([text]) for text in pipeline.segments(script)]
            with torch.no_grad(), acting(policies, "old"):
                made = sample_group(pipeline.backbone, texts, noise, start, stop, sampler, config.branch_batch)
            clips = pipeline.decode(made.videos[:, -config.window_frames :])
            scores.append(score(pipeline, rewards, clips, [script] * G, start))
            groups.append(made)

        each = {name: torch.stack([s[name] for s in scores]) for name in scores[0]}  # [N, G]
        A = advantages(each, rewards.weights, config.spread)
        r = positive_share(A, config.adv_clip_max)
        mask = torch.ones_like(r, dtype=torch.bool)
        if config.selective:
            others = [s.flatten() for name, s in each.items() if name != config.primary]
            delta = rank_disagreement(each[config.primary].flatten(), others, config.best)
            risk = risk.update(delta)
            mask = risk.mask(delta).view_as(r)

        optimizer.zero_grad()
        losses, kls = [], []
        for made, r_g, mask_g in zip(groups, r, mask, strict=True):  # 2: forward process, window by window
            for k in torch.randperm(len(levels), generator=generator)[: config.levels_per_group].tolist():
                total, policy, kl = group_loss(policies, pipeline.backbone, made, r_g.to(device), mask_g.to(device),
                                               sampler, levels[k].to(device), config, generator)  # fmt: skip
                if not total.isfinite():
                    raise FloatingPointError(f"update {step}: the loss is {total.item()}; lower learning_rate")
                (total / (len(groups) * config.levels_per_group)).backward()
                losses.append(policy.item())
                if mask_g.any():
                    kls.append(kl.item())
        grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"update {step}: the gradient's norm is {grad_norm}; lower learning_rate")
        optimizer.step()
        kl = sum(kls) / max(1, len(kls))
        age += 1
        refreshed = refresh_due(kl, age, tau_kl, config.k_max)
        if refreshed:
            copy_adapter(policies, "default", "ref")
            tau_kl = next_tau_kl(config, tau_kl, age)
            age = 0
        copy_adapter(policies, "default", "old", 1 - old_policy_decay(config, step))
        copy_adapter(policies, "default", "ema", 1 - config.ema_decay)
        total = rewards.total(each)
        yield {
            "step": step + 1,
            "reward": total.mean().item(),
            "reward_std": total.std(1).mean().item(),
            **{f"rewards/{name}/mean": s.mean().item() for name, s in each.items()},
            "advantage/abs_mean": A.abs().mean().item(),
            "loss": sum(losses) / len(losses),
            "kl": kl,
            "kl/share_held": mask.float().mean().item(),
            "kl/rho": risk.rho,
            "kl/refreshed": float(refreshed),
            "grad_norm": grad_norm,
            "learning_rate": config.learning_rate,
            "window_start": start,
            "step_time": time.perf_counter() - begun,
        }
