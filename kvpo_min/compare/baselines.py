"""What a user would pick instead of KVPO, on the same fork, with the same rewards: Best-of-N, reward-weighted
regression, Flow-GRPO, DanceGRPO, CM-GRPO, Neighbor GRPO / AR-CoPO, DiffusionNFT.

All but Best-of-N are two independent choices, so a `Method` names both. `train.train(..., method=METHODS["rwr"])`
trains it as it trains KVPO: the same scripts, forks, noise, optimizer and preservation of the prefix.

- exploration, what makes the branches of a group differ (`explore`): "fresh" noise from the fork on, the "initial"
  noise of the forked blocks, the "consistency" noise of their re-noising steps, "routing" of the history (KVPO);
- policy, what a branch's probability is (`policy_loss`): the "gaussian" step of a stochastic sampler, the "distance" of
  the anchor's prediction from the branch's, the "energy" of the branch's own replay (KVPO), the "nft" contrast.

| exploration | gaussian | distance | energy | nft |
|---|---|---|---|---|
| fresh | CM-GRPO, Flow-GRPO | refused | refused | DiffusionNFT, Astrolabe |
| initial | refused | Neighbor GRPO, AR-CoPO | refused | yes |
| consistency | CM-GRPO, DanceGRPO | yes | refused | yes |
| routing | refused | yes (the paper's ablation) | KVPO | yes |

Reward-weighted regression trains on the samples of fresh x nft, without the contrast. Why six cells are refused says
`REFUSED`. Symbols: G branches, B blocks, S steps; v = noise - x0,
z = (1 - sigma) x0 + sigma noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo_min import kvpo
from kvpo_min.chr import Plan
from kvpo_min.compare.astrolabe import contrast, positive_share
from kvpo_min.config import TrainConfig
from kvpo_min.grpo import clipped_objective
from kvpo_min.policies import acting
from kvpo_min.rewards import Mixture, check_finite
from kvpo_min.rollout import Rollout, Sampler, Stream, fork, generate, one_of, replay
from kvpo_min.tve import Trajectory, gibbs_log_prob, step_energies, trajectory_energy, velocity_to_x0

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x, v, sigma, next sigma -> mean, std

EXPLORATIONS = ("fresh", "initial", "consistency", "routing")
POLICIES = ("gaussian", "distance", "energy", "nft")
_SELF = (
    "the branch was made under the very history it is replayed under, so at equal weights its energy is 0 and so is "
    "the gradient: nothing is ever learned"
)
REFUSED = {
    ("initial", "gaussian"): "all branches share the noise of every step, so the group's mean reward takes away just "
    "the effect that the log-probability of a step would be credited for; the initial noise itself is no action of the "
    "policy, its density does not depend on the weights",
    ("routing", "gaussian"): "the branches were drawn under a routed history, both log-probabilities are taken under "
    "the ordinary one, so their quotient is not an importance ratio",
    ("fresh", "distance"): "distances are between neighbours, made by a noise strength below 1; between independent "
    "videos they measure the noise, and pulling the anchor towards them blurs it",
    ("fresh", "energy"): _SELF,
    ("initial", "energy"): _SELF,
    ("consistency", "energy"): _SELF,
}


def check_cell(exploration: str, policy: str) -> None:
    """ValueError, with the reason, for a cell of the grid that makes no sense or does not exist."""
    if exploration not in EXPLORATIONS or policy not in POLICIES:
        raise ValueError(f"exploration must be one of {EXPLORATIONS} and policy one of {POLICIES}, "
                         f"got {exploration!r} and {policy!r}")  # fmt: skip
    if reason := REFUSED.get((exploration, policy)):
        raise ValueError(f"exploration {exploration!r} with policy {policy!r} makes no sense: {reason}")


# ---------------------------------------------------------------------------------------------------------- exploration


def explore(
    kind: str, plan: Plan, noise: Tensor, generator: torch.Generator, block: int = 3, strength: float = 0.5
) -> tuple[Tensor, Plan]:
    """What `rollout.fork` is given so that its branches differ by `kind` alone: noise [G + 1 or 1, blocks, S, F, C, H,
    W] and the plan. noise [1, ...] is the anchor's; it stays as it is for the last row and before the fork.

    fresh: all noise from the fork on is each branch's own.
    initial: eps = sqrt(1 - s^2) eps* + s delta for the initial noise of the plan's routed blocks (Neighbor GRPO,
      arXiv 2511.16955, s 0.3; AR-CoPO, 2603.17461, one pivot block, s 0.5).
    consistency: the re-noising of those blocks, mixed likewise; s = 1 is the sampler's own randomness (CM-GRPO).
    routing: nothing but the plan (KVPO). `strength` s in (0, 1] is not used by fresh and routing.
    """
    if kind not in EXPLORATIONS:
        raise ValueError(f"exploration must be one of {EXPLORATIONS}, got {kind!r}")
    if len(noise) != 1:
        raise ValueError(f"expected the anchor's noise [1, blocks, S, F, C, H, W], got {list(noise.shape)}")
    if kind == "routing":
        return noise, plan
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    num_generations, first = len(plan.routes), plan.fork // block
    out = noise.repeat(num_generations + 1, *[1] * (noise.ndim - 1))
    last = noise.shape[1] if kind == "fresh" else first + plan.perturb_num_blocks
    steps = {"fresh": slice(None), "initial": slice(0, 1), "consistency": slice(1, None)}[kind]
    s = 1.0 if kind == "fresh" else strength
    shared = out[:-1, first:last, steps]
    delta = torch.randn(shared.shape, generator=generator, dtype=torch.float32).to(noise)
    out[:-1, first:last, steps] = (1 - s**2) ** 0.5 * shared + s * delta
    return out, replace(plan, perturb_num_blocks=0)  # nothing is routed


# -------------------------------------------------------------------------------------------------------------- kernels


def consistency_kernel(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """CM-GRPO (RAVEN, arXiv 2605.15190): the distilled sampler is already a Gaussian policy,
    N((1 - sigma') x0_hat, sigma'^2); no noise is added to what it does anyway."""
    return (1 - sigma_next) * (x - sigma * v), sigma_next


def flow_sde_kernel(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, a: float = 0.7) -> tuple[Tensor, Tensor]:
    """Flow-GRPO (arXiv 2505.05470): the ODE made an SDE of the same marginals, s = a sqrt(sigma / (1 - sigma)),
    mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt, std = s sqrt(-dt), dt = sigma' - sigma.
    At sigma = 1 the root takes the next level, as its code does (sd3_sde_with_logprob.py). A shifted schedule may begin
    at .99999994 instead, which is meant to be 1: taken as it is, the std there would be 1,171."""
    dt = sigma_next - sigma
    s = a * (sigma / (1 - torch.where(sigma.float() > 1 - 1e-4, sigma_next, sigma))).sqrt()
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, s * (-dt).sqrt()


def dance_kernel(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float = 0.3) -> tuple[Tensor, Tensor]:
    """DanceGRPO (arXiv 2505.07818): mean = x + v dsigma - eta^2 score dsigma / 2 with the score
    -(x - (1 - sigma) x0_hat) / sigma^2, std = eta sqrt(sigma - sigma')."""
    d = sigma_next - sigma
    score_ = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    return x + v * d - 0.5 * eta**2 * score_ * d, eta * (-d).sqrt()


def gaussian_log_prob(trajectory: Trajectory, v: Tensor, kernel: Kernel) -> Tensor:
    """log N(z[s + 1]; mean(z[s], v[s]), std^2) of every step but the last, which draws nothing in a few-step sampler.

    v like trajectory.z [G, B, S, F, C, H, W] -> [G, B, S - 1], a MEAN over the elements of a block as in the Flow-GRPO
    and DanceGRPO codes (why their clip is 1e-4)."""
    wide = torch.promote_types(v.dtype, torch.float32)  # ratios leave 1 by 1e-4: bfloat16 would not see it
    z, v, sigma = trajectory.z.to(wide), v.to(wide), trajectory.sigma.to(wide)[:, None, None, None, None]
    mean, std = kernel(z[:, :, :-1], v[:, :, :-1], sigma[:-1], sigma[1:])
    squared = ((z[:, :, 1:] - mean) / std).square()
    return (-0.5 * squared - std.log() - 0.5 * math.log(2 * math.pi)).mean((-4, -3, -2, -1))


# ----------------------------------------------------------------------------------------------------------- advantages


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A [G] = (r - mean) / (std + eps), GRPO's (arXiv 2402.03300); population standard deviation."""
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + eps)


def quasi_norm_advantages(A: Tensor, p: float = 0.8) -> Tensor:
    """Neighbor GRPO's reweighting against flat rewards: A_i / (sum_k |A_k|^p)^(1/p) (arXiv 2511.16955); 0 stays 0.
    With p = 2 it is the standardised advantage over sqrt(G)."""
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    return A / A.abs().pow(p).sum().pow(1 / p).clamp(min=1e-12)


# --------------------------------------------------------------------------------------------------------------- losses


def _check_alike(A: Tensor, n: int, **tensors: Tensor) -> None:
    # a shape that broadcasts would give a number, and the wrong one
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    if A.shape != (n,) or len(set(map(tuple, shapes.values()))) != 1:
        raise ValueError(f"expected tensors of one shape and A [{n}], got {shapes} and A {list(A.shape)}")


def flow_grpo_loss(
    trajectory: Trajectory, v: Tensor, v_old: Tensor, A: Tensor, kernel: Kernel = flow_sde_kernel,
    clip: float = 1e-4, steps: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """PPO on the steps of a stochastic sampler: Flow-GRPO, DanceGRPO and CM-GRPO differ by `kernel` only.

    trajectory, v, v_old [G, B, S, ...]; A [G]. -mean over branches, blocks and `steps` (default all but the last) of
    min(rho A, clip(rho) A). DanceGRPO: a random 60% of the steps."""
    steps = list(range(len(trajectory.sigma) - 1)) if steps is None else list(steps)
    if not steps or not all(0 <= s < len(trajectory.sigma) - 1 for s in steps):
        raise ValueError(f"steps must be among 0..{len(trajectory.sigma) - 2} (the last has no noise), got {steps}")
    _check_alike(A, len(trajectory.z), z=trajectory.z, v=v, v_old=v_old)
    log_p, log_p_old = (gaussian_log_prob(trajectory, u, kernel)[:, :, steps] for u in (v, v_old.detach()))
    return clipped_objective(log_p, log_p_old, A[:, None, None].expand_as(log_p), clip, clip)[0]


def cm_grpo_regression(trajectory: Trajectory, v: Tensor, A: Tensor, A_max: float = 5.0) -> Tensor:
    """CM-GRPO as its authors write it, a regression with a fixed target whose gradient is the policy gradient:
    |x0_hat - sg(x0_hat + A (1 - s) / (2 s^2) (x' - (1 - s) x0_hat))|^2, s the next level (RAVEN, arXiv 2605.15190).
    Its gradient is that of -A log N(x'; (1 - s) x0_hat, s^2), mean over elements.
    trajectory, v [G, B, S, ...]; A [G]"""
    _check_alike(A, len(trajectory.z), z=trajectory.z, v=v)
    sigma = trajectory.sigma[:, None, None, None, None]
    x0 = velocity_to_x0(trajectory.z, v, trajectory.sigma)[:, :, :-1]
    s = sigma[1:]
    A = A.clamp(-A_max, A_max)[:, None, None, None, None, None, None]
    target = (x0 + A * (1 - s) / (2 * s**2) * (trajectory.z[:, :, 1:] - (1 - s) * x0)).detach()
    return (x0 - target).square().mean()


def distance_log_prob(anchor_x0: Tensor, candidates_x0: Tensor, tau: float) -> Tensor:
    """log pi(i) = log_softmax over candidates of -mean squared distance / tau; [G, B, S, a].

    anchor_x0 [a, B, S, F, C, H, W] are predictions of the active policy, candidates_x0 [G, ...] of the one that made
    them (AR-CoPO, arXiv 2603.17461: clean predictions for consistency samplers). An anchor that is itself a candidate
    has distance 0 there and nearly all the mass unless tau is of the order of the distances."""
    d = (candidates_x0[:, None] - anchor_x0[None]).square().mean((-4, -3, -2, -1))  # [G, a, B, S]
    return gibbs_log_prob(d.permute(1, 2, 3, 0), tau).permute(3, 1, 2, 0)


def neighbor_loss(
    anchor: Trajectory, v: Tensor, v_old: Tensor, candidates: Tensor, A: Tensor, tau: float, clip: float = 0.2
) -> Tensor:
    """Neighbor GRPO (arXiv 2511.16955) and AR-CoPO: one prediction, the anchor's, is pulled towards good candidates and
    away from bad ones. PPO on the distance softmax, per block, step and anchor. anchor, v, v_old [a, B, S, ...];
    candidates: their x0_hat [G, B, S, ...]; A [G]."""
    _check_alike(A, len(candidates), z=anchor.z, v=v, v_old=v_old)
    _check_alike(A, len(candidates), anchor=anchor.z[0], candidate=candidates[0])
    candidates = candidates.detach()
    log_p, log_p_old = (
        distance_log_prob(velocity_to_x0(anchor.z, u, anchor.sigma), candidates, tau) for u in (v, v_old.detach())
    )
    return clipped_objective(log_p, log_p_old, A[:, None, None, None].expand_as(log_p), clip, clip)[0]


def energy_loss(trajectory: Trajectory, v: Tensor, v_old: Tensor, A: Tensor, tau: float, clip: float = 0.2) -> Tensor:
    """KVPO's: PPO on the Gibbs policy of the branches' own replay (tve.py, grpo.py). trajectory, v, v_old [G, ...]"""
    log_p, log_p_old = (
        gibbs_log_prob(trajectory_energy(step_energies(u, trajectory.velocity)), tau) for u in (v, v_old.detach())
    )
    return clipped_objective(log_p, log_p_old, A, clip / 2, clip)[0]


def rwr_loss(v: Tensor, target: Tensor, A: Tensor, tau: float = 1.0, w_max: float = 20.0) -> Tensor:
    """Reward-weighted regression: flow matching on the model's own clips, weighted by w = min(exp(A / tau), w_max),
    normalised to mean 1. Weights as in Peters & Schaal 2007 and AWR (arXiv 1910.00177); Lee et al. (arXiv 2302.12192)
    weight a generator's likelihood by the reward itself. No clip is pushed away. v, target = eps - x0 [G, ...]; A [G].
    As plain flow matching it can undo the distillation (blur): watch the sharpness."""
    _check_alike(A, len(v), v=v, target=target)
    w = (A.detach() / tau).clamp(max=math.log(w_max)).softmax(0)  # [G] w / sum of w
    return (w * (v - target.detach()).square().mean(tuple(range(1, v.ndim)))).sum()


def diffusion_nft_loss(
    z: Tensor, sigma: Tensor, v: Tensor, v_old: Tensor, x0: Tensor, A: Tensor, beta: float = 1.0, clip: float = 5.0
) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117, its code): the contrast of clean predictions x0+- = z - sigma v+-, each squared
    residual over its own mean absolute residual w+- (detached, floor 1e-5), over beta, times the advantage clip.

    z, v, v_old, x0 [G, ...]; sigma (); A [G]. At v = v_old its gradient is clip / (beta w) times that of
    `astrolabe.contrast(..., weight=sigma^2)`."""
    _check_alike(A, len(v), z=z, v=v, v_old=v_old, x0=x0)
    r, dims = positive_share(A.detach(), clip), tuple(range(1, v.ndim))
    v_old, total = v_old.detach(), 0.0
    for share, u in ((r, (1 - beta) * v_old + beta * v), (1 - r, (1 + beta) * v_old - beta * v)):
        residual = z - sigma * u - x0
        w = residual.detach().double().abs().mean(dims).clamp(min=1e-5).to(residual)
        total = total + share * residual.square().mean(dims) / (beta * w)
    return clip * total.mean()


# ------------------------------------------------------------------------------------------------------------ Best-of-N


def best_of_n(
    backbone, texts: Sequence[Tensor], noise: Tensor, borders: Sequence[int], sampler: Sampler,
    judge: Callable[[Tensor, int], Tensor],
) -> tuple[Stream, list[int], list[Tensor]]:  # fmt: skip
    """No training: N candidates, the best is kept. One border, the video's end: Best-of-N of whole videos. Several, the
    chunks' ends: the best chunk is kept and all N candidates of the next one go on from it.

    noise [N, blocks, S, F, C, H, W]; judge(latents [N, frames, C, H, W] of the chunk, its first frame) -> [N], higher
    is better. -> the video, the winners' numbers and all rewards [N], one a chunk. The reward of the winner overstates
    what was gained (it was chosen for it): report a held-out one too."""
    stream = Stream()
    winners = []
    rewards = []
    for begin, end in zip([0, *borders], borders, strict=False):
        if end <= begin:
            raise ValueError(f"borders must ascend from above 0, got {list(borders)}")
        tried = generate(backbone, stream, texts, noise, end, sampler)
        r = judge(tried.latents[:, begin:], begin)
        if r.shape != (len(noise),) or not r.isfinite().all():
            raise ValueError(f"judge must give {len(noise)} finite numbers, got {r.tolist()}")
        winners.append(int(r.argmax()))
        rewards.append(r)
        stream = one_of(tried, winners[-1])
    return stream, winners, rewards


# ------------------------------------------------------------------------------------------------------------- one loop


@dataclass(frozen=True)
class Method:
    """A cell of the grid and its numbers."""

    exploration: str
    policy: str
    kernel: Kernel = consistency_kernel  # gaussian: the sampler of the branches; another one replaces the ordinary
    clip: float = 0.2
    strength: float = 0.5  # of initial or consistency noise
    pivot_blocks: int | None = None  # blocks that differ; None: as many as the caller's plan routes
    beta: float = 1.0  # nft
    adaptive: bool = False  # nft: DiffusionNFT's own weights instead of Astrolabe's contrast
    weighted: bool = False  # nft: reward-weighted regression instead of a contrast
    regression: bool = False  # gaussian: CM-GRPO's regression instead of PPO
    quasi_norm: float | None = None  # Neighbor GRPO's p
    step_share: float = 1.0  # DanceGRPO: share of the noisy steps trained on
    scale: float = 1.0  # of the loss, against the preservation of the prefix

    def __post_init__(self):
        check_cell(self.exploration, self.policy)

    def update(
        self, pipeline, policies, rewards: Mixture, config: TrainConfig, task: kvpo.Task, tau: float,
        old_is_current: bool = True, prefix: Stream | None = None,
    ) -> Branches:  # fmt: skip
        """One group, from its plan to the gradient, as `kvpo.update`: fork, reward of the fork's chunk, replay, loss.
        Raises FloatingPointError for a video, reward or loss that is not finite."""
        made, at, rows, steps = explored(self, pipeline, policies, config, task, prefix)
        videos, ((each, anchor),) = kvpo.score_group(pipeline, rewards, task, made)
        A = group_advantages(rewards.total(each), config.adv_eps).to(pipeline.backbone.device)
        v_old = None
        if not old_is_current:
            with torch.no_grad(), acting(policies, "old"):
                v_old = replay(pipeline.backbone, at, pipeline.sampler(config.num_segments), branches=rows)
        group = Branches(
            script=task.script, plan=task.plan, rollout=made, videos=videos, rewards=each, anchor=anchor, advantages=A,
            loss=0.0, task=task, at=at, rows=rows, steps=steps, v_old=v_old,
        )  # fmt: skip
        loss, v = self.send_back(pipeline, policies, config, group, tau)
        drift, kept = 0.0, None
        if config.prefix_coef:
            drift, kept = kvpo.preserve(pipeline, policies, config, task, made)
        v_old = v if v_old is None else v_old
        return replace(group, loss=loss, v_first=v, v_old=v_old, prefix_drift=drift, kept=kept)

    def again(self, pipeline, policies, config: TrainConfig, group: Branches, tau: float, done: int = 1) -> None:
        """One more gradient from the same branches, against the velocities of the policy that made them. As in
        `kvpo.again`, only the steps that carry gradient are replayed anew."""
        self.send_back(pipeline, policies, config, group, tau)
        if config.prefix_coef:
            kvpo.preserve(pipeline, policies, config, group.task, group.rollout, group.kept, done)

    def send_back(self, pipeline, policies, config: TrainConfig, group: Branches, tau: float) -> tuple[float, Tensor]:
        """Adds the gradient of the loss, divided by `groups_per_update`; -> the loss, and the velocities."""
        n_steps = len(pipeline.sigmas)
        grad_steps = min(config.grad_steps, n_steps - 1 if self.policy == "gaussian" else n_steps)
        sampler = pipeline.sampler(config.num_segments)
        with acting(policies, "default"):
            only = 0 if group.v_first is None else grad_steps
            v = replay(pipeline.backbone, group.at, sampler, grad_steps, branches=group.rows, n_steps=only)
        if only:
            v = torch.cat([v, group.v_first[:, :, only:]], 2)
        v_old = v.detach() if group.v_old is None else group.v_old
        loss = policy_loss(self, group.rollout, group.at, v, v_old, group.advantages, tau, group.steps)
        check_finite(f"the loss is {loss.item()}, that is,", loss)
        (self.scale * loss / config.groups_per_update).backward()
        return loss.item(), v.detach()

    @torch.no_grad()
    def energies_for_tau(self, pipeline, policies, config: TrainConfig, task: kvpo.Task) -> Tensor:
        """Energies or distances of a group that is not trained on, one row for each softmax; those of steps before the
        branches part say nothing."""
        made, at, rows, _ = explored(self, pipeline, policies, config, task)
        with acting(policies, "old"):
            v = replay(pipeline.backbone, at, pipeline.sampler(config.num_segments), branches=rows)
        energies = log_scores(self, made, at, v)
        return energies[energies.std(1) > 1e-12]


@dataclass(frozen=True)
class Branches(kvpo.Group):
    """A group, and what the next gradient from it needs."""

    at: Rollout | None = None  # where the policy is asked for velocities
    rows: int = 0  # for how many rows of it
    steps: list[int] | None = None  # those that the loss sees; None: all
    v_old: Tensor | None = None  # velocities at `at` of the policy that made the branches
    v_first: Tensor | None = None  # those of the trained one, before the update


# The papers' numbers, but without a KL term; clips act from an update's second iteration on. Neighbor GRPO has one
# anchor, the unperturbed video, not several that are candidates too; AR-CoPO no replay adapter; DiffusionNFT no old
# policy that lags (at first its own hardly does), so that beta cancels in its gradient. "kvpo" and "astrolabe" are the
# bare cells, for comparison: with their anchor, safety rule, KL and reference they are kvpo.py and astrolabe.py.
METHODS = {
    "kvpo": Method("routing", "energy"),
    "cm_grpo": Method("consistency", "gaussian", strength=1.0, regression=True),
    "flow_grpo": Method("fresh", "gaussian", kernel=flow_sde_kernel, clip=1e-4),
    "dance_grpo": Method("consistency", "gaussian", kernel=dance_kernel, clip=1e-4, strength=1.0, step_share=0.6),
    "neighbor_grpo": Method("initial", "distance", strength=0.3, quasi_norm=0.8),
    "ar_copo": Method("initial", "distance", strength=0.5, pivot_blocks=1),
    "diffusion_nft": Method("fresh", "nft", adaptive=True),
    "astrolabe": Method("fresh", "nft"),
    "rwr": Method("fresh", "nft", weighted=True),
}


@torch.no_grad()
def explored(
    method: Method, pipeline, policies, config: TrainConfig, task: kvpo.Task, prefix: Stream | None = None
) -> tuple[Rollout, Rollout, int, list[int] | None]:
    """-> the branches up to the end of the fork's chunk, made by the adapter `old`; what `replay_points` gives; and the
    steps that the loss sees. What is random beside the task comes from a generator that the task's noise seeds, so that
    several processes and a resumed run draw alike."""
    generator = torch.Generator().manual_seed(int(task.noise.flatten()[:2].contiguous().view(torch.int64)))
    backbone, sampler, n_steps = pipeline.backbone, pipeline.sampler(config.num_segments), len(pipeline.sigmas)
    block, stop = sampler.window.block, task.chunk.stop
    plan = replace(task.plan, perturb_num_blocks=method.pivot_blocks or task.plan.perturb_num_blocks)
    # blocks that the loss sees: those whose noise is the branch's own; routing acts on to the end of the chunk
    whole = method.pivot_blocks is None and method.exploration in ("fresh", "routing")
    recorded = stop if whole else min(stop, plan.fork + plan.perturb_num_blocks * block)
    noise, plan = explore(
        method.exploration, plan, task.noise[:, : stop // block], generator, block, method.strength
    )  # fmt: skip
    with acting(policies, "old"):
        prefix = prefix or next(kvpo.make_prefixes(pipeline, config, [task]))
        made = fork(
            backbone, kvpo.texts_of(pipeline, task), noise.to(backbone.device), plan, stop, recorded,
            replace(sampler, kernel=method.kernel), config.nearest, config.branch_batch, prefix,
        )  # fmt: skip
    steps = None
    if method.step_share < 1:
        many = max(1, round(method.step_share * (n_steps - 1)))
        steps = torch.randperm(n_steps - 1, generator=generator)[:many].tolist()
    return made, *replay_points(method, made, generator), steps


def replay_points(method: Method, rollout: Rollout, generator: torch.Generator) -> tuple[Rollout, int]:
    """Where the policy is asked for velocities -> a Rollout for `replay`, and how many rows.
    gaussian, energy: the branches' own steps; distance: the anchor's; nft: the branches' clean ends, re-noised to
    every level (DiffusionNFT's trainer too goes through all timesteps before a step of the optimizer).
    """
    trajectory, G = rollout.trajectory, len(rollout.trajectory.z) - 1
    if method.policy == "distance":
        return replace(rollout, trajectory=trajectory[G:]), 1
    if method.policy == "nft":
        x0 = trajectory.x0[:G, :, -1:].expand_as(trajectory.x0[:G])  # [G, B, S, F, C, H, W]
        sigma = trajectory.sigma[:, None, None, None, None]
        z = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float32).to(x0)
        return replace(rollout, trajectory=Trajectory(z, x0, trajectory.sigma)), G
    return rollout, G


def log_scores(method: Method, rollout: Rollout, at: Rollout, v: Tensor) -> Tensor:
    """Energies or distances, one row for each softmax over the G branches: what tau is calibrated on. [n, G]"""
    if method.policy == "energy":
        return trajectory_energy(step_energies(v, at.trajectory.velocity[: len(v)]))[None]
    x0 = velocity_to_x0(at.trajectory.z, v, at.trajectory.sigma)
    d = (rollout.trajectory.x0[: len(rollout.trajectory.x0) - 1] - x0).square().mean((-4, -3, -2, -1))  # [G, B, S]
    return d.flatten(1).T


def policy_loss(
    method: Method, rollout: Rollout, at: Rollout, v: Tensor, v_old: Tensor, A: Tensor, tau: float = 0.0,
    steps: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The loss () of a recorded group. rollout: from `fork`, anchor last; at: from `replay_points`; v, v_old:
    velocities there, of the policy and of the one that made the rollout; A [G]; tau for distance and energy."""
    n = len(rollout.trajectory.z) - 1
    if A.shape != (n,):
        raise ValueError(f"A must be [G] with G = {n} branches, got {list(A.shape)}")
    if method.quasi_norm:
        A = quasi_norm_advantages(A, method.quasi_norm)
    if method.policy == "distance":
        return neighbor_loss(at.trajectory, v, v_old, rollout.trajectory.x0[:-1], A, tau, method.clip)
    trajectory = at.trajectory[:n]
    if method.policy == "gaussian" and method.regression:
        return cm_grpo_regression(trajectory, v, A)
    if method.policy == "gaussian":
        return flow_grpo_loss(trajectory, v, v_old, A, method.kernel, method.clip, steps=steps)
    if method.policy == "energy":
        return energy_loss(trajectory, v, v_old, A, tau, method.clip)
    if method.weighted:
        return rwr_loss(v, trajectory.velocity, A)
    if method.adaptive:
        levels = zip(trajectory.sigma, *(t.unbind(2) for t in (trajectory.z, v, v_old, trajectory.x0)), strict=True)
        losses = [diffusion_nft_loss(z, sigma, u, u_old, x0, A, method.beta) for sigma, z, u, u_old, x0 in levels]
        return torch.stack(losses).mean()
    return contrast(v, v_old, trajectory.velocity, positive_share(A), method.beta)
