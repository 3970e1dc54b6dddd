"""Anchor-relative advantages, the safety rule and the clipped objective. KVPO, arXiv 2605.14278, objective section.

Each branch has a reward and, from its energy, a probability under the policy (see tve.py). The anchor is one more video
from the same noise with ordinary history: what the model would have done anyway. Branches better than the anchor should
become likelier. Where the ratio is 1 and without KL, the whole method is one formula, with p = pi and A the advantages:

    dL/dE_g = (A_g - p_g * sum(A)) / (G * tau)

A good branch has its energy lowered, that is, its velocities are copied; a bad one is pushed away. The entries sum to
0: a contrast between branches. So a constant added to A, such as the anchor's reward, cancels as long as p is uniform;
the anchor acts through the standard deviation, the clamp, the clip, the safety rule and a p that is not uniform.

Paper / authors' code / this file:
1. Advantage. Paper: standardised inside the group (wording unclear). Authors and here: relative to the anchor, for each
   reward component, then local and global signal fused and clamped.
2. Safety. Paper: no update if no branch beats the anchor. Authors' default: a softmax with the anchor whose value is
   always one half, so the loss is halved. Here: a number, 0 (paper) or 0.5 (authors).
3. KL weight. Paper: 5 is best of {0, 5, 20}. Authors' config: 10. Here: 5 (config.py: 1; with compat 10).
4. KL. Authors add 1e-10 inside one logarithm. Here: log probabilities throughout, nothing to guard.
5. Entropy. Authors report that of the halved probabilities when unsafe. Here: always that of pi.
Symbols: G branches. KV: trainer/kvpo.py of the authors' LongLive variant.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8  # keeps 0 / 0 at 0; also the spread below which a signal is left as it is


@dataclass(frozen=True)
class Loss:
    """`total` is what to call backward on; the rest is detached, for the log."""

    total: Tensor  # () scale * (policy + kl_coef * kl)
    policy: Tensor  # () clipped objective
    kl: Tensor  # () KL(pi || pi_init)
    ratio: Tensor  # [G] pi / pi_old
    clip_fraction: Tensor  # () share of the ratios outside the clip range
    entropy: Tensor  # () of pi, in nats


def anchor_advantages(
    rewards: Mapping[str, Tensor], anchor: Mapping, weights: Mapping[str, float], adv_eps: float = EPS
) -> Tensor:
    """Advantages [G] = sum over components c of w_c * (r_c - anchor_c) / (std_c + adv_eps) (KV:534-538, 574-593).

    rewards: name -> [G]; anchor: name -> number; weights: name -> number; all three must name the same components.
    std_c is the unbiased standard deviation of the G rewards together with the anchor's, so components of different
    scale weigh alike. A component that is the same everywhere adds exactly 0. Ours: an `adv_eps` of the size of a
    reward's noise; with the authors' 1e-8 a component that hardly differs is blown up, noise and all. Raises KeyError
    and ValueError.
    """
    _check_components(rewards, anchor, weights)
    total = 0.0
    for name, r in rewards.items():
        r = r.detach().to(torch.promote_types(r.dtype, torch.float32))  # [G]
        r_anchor = torch.as_tensor(anchor[name]).detach().to(r).reshape(1)
        std = torch.cat([r, r_anchor]).std()  # over G + 1 videos
        total = total + weights[name] * (r - r_anchor) / (std + adv_eps)
    return total


def fuse(
    local: Tensor,
    global_: Tensor | None,
    local_weight: float = 1.0,
    global_weight: float = 0.5,
    fuse_mode: str = "std",
    adv_clip_max: float = 2.5,
) -> Tensor:
    """A [G] = clamp(local_weight * n(local) + global_weight * n(global_), -adv_clip_max, adv_clip_max) (KV:617-668).

    local [G]: advantages for the chunk that was forked; global_ [G]: for what follows it (authors: one clip a segment),
    None if there is just one signal.
    n by fuse_mode: "none" leaves a signal as it is, "std" divides it by its population standard deviation over the
    branches, "zscore" first subtracts its mean, which takes the anchor out. A signal without spread is left as it is.
    With "std" all branches can end on one side of the clamp and differ no more.
    """
    if fuse_mode not in ("none", "std", "zscore"):
        raise ValueError(f'fuse_mode must be "none", "std" or "zscore", got {fuse_mode!r}')

    if local.ndim != 1 or (global_ is not None and global_.shape != local.shape):
        shape = None if global_ is None else list(global_.shape)
        raise ValueError(f"local and global_ must be [G] alike, got {list(local.shape)} and {shape}")

    def n(signal):
        std = signal.std(correction=0)
        if fuse_mode == "none" or std <= EPS:
            return signal
        return (signal - signal.mean() if fuse_mode == "zscore" else signal) / (std + EPS)

    A = local_weight * n(local) + (0.0 if global_ is None else global_weight * n(global_))
    return A.clamp(-adv_clip_max, adv_clip_max)


def branch_is_safe(rewards: Mapping[str, Tensor], anchor: Mapping, weights: Mapping[str, float]) -> bool:
    """Does any branch's weighted raw reward beat the anchor's? Arguments as in `anchor_advantages`.

    A group is safe if this holds for the local or for the global rewards: join the two with `or` (KV:2899-2905).
    """
    _check_components(rewards, anchor, weights)
    r = {name: r.to(torch.promote_types(r.dtype, torch.float32)) for name, r in rewards.items()}  # name -> [G]
    return bool(sum(w * (r[name] - torch.as_tensor(anchor[name]).to(r[name])) for name, w in weights.items()).max() > 0)


def safety_scale(safe: bool, unsafe_scale: float = 0.0) -> float:
    """Factor on the loss: 1 for a safe group, else `unsafe_scale`: 0 is the paper's, 0.5 the authors' (KV:545-572)."""
    return 1.0 if safe else unsafe_scale


def log_ratio(log_p: Tensor, log_p_old: Tensor) -> Tensor:
    """log(pi / pi_old) [G], held within +-20 so that its exponential stays finite. No gradient reaches pi_old."""
    wide = torch.promote_types(log_p.dtype, torch.float32)  # exp(20) is too much for float16
    return (log_p.to(wide) - log_p_old.detach().to(wide)).clamp(-20, 20)


def clipped_objective(
    log_p: Tensor, log_p_old: Tensor, A: Tensor, clip_range_low: float = 0.1, clip_range_high: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO loss -mean(min(rho * A, clip(rho) * A)), ratio rho [G], share of the rho that clip changes.

    clip(rho): rho held within 1 - clip_range_low and 1 + clip_range_high.

    All inputs [G]. Once a branch has moved far enough in its own good direction, its term is flat and pulls no more.
    """
    if not log_p.shape == log_p_old.shape == A.shape:
        raise ValueError(
            "log_p, log_p_old and A must be [G] alike, got "
            f"{list(log_p.shape)}, {list(log_p_old.shape)} and {list(A.shape)}"
        )
    A, ratio = A.detach(), log_ratio(log_p, log_p_old).exp()  # [G], [G]
    clipped = ratio.clamp(1 - clip_range_low, 1 + clip_range_high)
    return -torch.minimum(ratio * A, clipped * A).mean(), ratio, (ratio != clipped).to(ratio).mean()


def branch_kl(log_p: Tensor, log_p_ref: Tensor) -> Tensor:
    """KL(pi || pi_ref) = sum over g of pi_g * (log pi_g - log pi_ref_g), () in nats. No gradient reaches pi_ref."""
    return (log_p.exp() * (log_p - log_p_ref.detach())).sum()


def kvpo_loss(
    log_p: Tensor,
    log_p_old: Tensor,
    log_p_init: Tensor,
    A: Tensor,
    clip_range_low: float = 0.1,
    clip_range_high: float = 0.2,
    kl_coef: float = 5.0,
    scale: float = 1.0,
) -> Loss:
    """scale * (clipped objective + kl_coef * KL(pi || pi_init)) of one group of branches (KV:2699-2831).

    log_p, log_p_old, log_p_init: log pi [G] of the policy, of the one that made the branches, of the released model;
    A: advantages [G]; scale: from `safety_scale`. Only log_p carries gradient.
    """
    if log_p.ndim != 1 or log_p_init.shape != log_p.shape:
        raise ValueError(f"log_p_init must be [G] like log_p, got {list(log_p_init.shape)} and {list(log_p.shape)}")
    policy, ratio, clip_fraction = clipped_objective(log_p, log_p_old, A, clip_range_low, clip_range_high)
    kl = branch_kl(log_p, log_p_init)
    total = scale * (policy + kl_coef * kl)
    entropy = torch.special.entr(log_p.exp()).sum()
    return Loss(total, *(t.detach() for t in (policy, kl, ratio, clip_fraction, entropy)))


def _check_components(rewards: Mapping, anchor: Mapping, weights: Mapping) -> None:
    if not rewards:
        raise ValueError("expected at least one reward component, got none")
    for other, label in ((anchor, "anchor"), (weights, "weights")):
        if missing := sorted(set(rewards) - set(other)):
            raise KeyError(f"{label} lacks the reward components {missing}; rewards has {sorted(rewards)}")
        if unknown := sorted(set(other) - set(rewards)):
            raise KeyError(f"{label} names {unknown}, which rewards lacks; rewards has {sorted(rewards)}")
    for name, r in rewards.items():
        if r.ndim != 1 or not len(r) or len(r) != len(next(iter(rewards.values()))):
            raise ValueError(f"rewards[{name!r}] must be [G] like the others, got {list(r.shape)}")
        for number, label in ((anchor[name], "anchor"), (weights[name], "weights")):
            if torch.as_tensor(number).numel() != 1:
                raise ValueError(f"{label}[{name!r}] must be one number, got {list(torch.as_tensor(number).shape)}")
        if not r.isfinite().all():
            raise ValueError(f"rewards[{name!r}] must be finite, got {r.tolist()}: mend or drop that branch")
        if not torch.as_tensor(anchor[name]).isfinite().all():
            raise ValueError(f"anchor[{name!r}] must be finite, got {float(anchor[name])}: mend it or drop the group")
        if not torch.as_tensor(weights[name]).isfinite().all():
            raise ValueError(f"weights[{name!r}] must be finite, got {float(weights[name])}")
