"""Trajectory velocity energy (TVE) and the Gibbs policy over branches. KVPO, arXiv 2605.14278, energy section.

Branches of a group share their noise and differ in the past they read, so the sampler's noise gives a branch no
likelihood. KVPO scores a branch by how well the policy explains it: its stored noisy inputs z are replayed under the
ordinary, unrouted history, and the policy's velocity is compared with the one the branch was made with:

    E_g = sum over blocks b and steps s of  w_s * mean over (F, C, H, W) of (v_theta - v_branch)^2
    pi(g) = exp(-E_g / tau) / sum over h of exp(-E_h / tau)

Conventions: v = noise - x0, z = (1 - sigma) * x0 + sigma * noise, hence x0 = z - sigma * v.

Paper / authors' code / this file:
1. Energy. Paper: velocity residual, w = 1. Authors: x0 residual of the same z, which is sigma times the velocity
   residual, so w = sigma^2 (sigma floor 1; floor 0 would be the paper's). Here: `energy_weights(sigma, sigma_floor)`.
2. Temperature. Paper: tau, no value known. Authors: l = -sum mse / 2, that is tau = 2. Here: any tau;
   `calibrate_tau` finds the one at which the energies of a group matter.
3. Precision. Authors: subtract in bfloat16. Here: in float32 or better, since residuals are small differences.
4. sigma. Authors look up sigma at int(timestep): .9375 becomes .9369, which counts only below their floor. Here: exact.
Which steps carry gradient (authors: the first 2 of 4, all count in the sum) is up to whoever replays.
Symbols: G branches, B blocks, S steps, F frames. KV, SC, WW: trainer/kvpo.py, utils/scheduler.py and
utils/wan_wrapper.py of the authors' LongLive variant.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHIFT = 5.0  # timestep shift of Wan2.1 and of the few-step models distilled from it


def schedule(steps: int = 4, shift: float = SHIFT) -> Tensor:
    """Noise levels sigma [S], descending from 1; the 4-step default is 1, .9375, .8333, .625 (KV:382-386, SC:118-133).

    Even levels t = 1, 1 - 1/S, ..., 1/S are shifted towards noise: sigma = shift * t / (1 + (shift - 1) * t).
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"expected steps >= 1 and shift > 0, got steps {steps} and shift {shift}")
    t = 1 - torch.arange(steps) / steps  # [S]
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Trajectory:
    """What the branches did, kept for the replay. `trajectory[2:4]` is the trajectory of branches 2 and 3."""

    z: Tensor  # [G, B, S, F, C, H, W] noisy input of every denoising step
    x0: Tensor  # [G, B, S, F, C, H, W] clean prediction the rollout made from it
    sigma: Tensor  # [S] noise levels

    def __post_init__(self):
        if self.z.ndim != 7 or self.z.shape != self.x0.shape:
            raise ValueError(
                "z and x0 must both be [G, B, S, F, C, H, W] (one branch: [g:g+1], not [g]), "
                f"got {list(self.z.shape)} and {list(self.x0.shape)}"
            )
        if self.sigma.shape != self.z.shape[2:3] or not (self.sigma > 0).all():
            raise ValueError(f"sigma must be S = {self.z.shape[2]} levels above 0, got {self.sigma.tolist()}")

    @property
    def velocity(self) -> Tensor:  # [G, B, S, F, C, H, W]
        return x0_to_velocity(self.z, self.x0, self.sigma)

    def __getitem__(self, branches) -> "Trajectory":
        return Trajectory(self.z[branches], self.x0[branches], self.sigma)


def x0_to_velocity(z: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """v = (z - x0) / sigma. z, x0: [..., F, C, H, W]; sigma > 0: a number or [...], one level for each (F, C, H, W)."""
    sigma = _per_latent(sigma, z)
    return (z.to(sigma) - x0.to(sigma)) / sigma


def velocity_to_x0(z: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """x0 = z - sigma * v (WW:282-306). Shapes as in `x0_to_velocity`."""
    return z - _per_latent(sigma, z) * v


def step_energies(v_theta: Tensor, v_branch: Tensor) -> Tensor:
    """Mean squared velocity residual of every denoising step: [..., F, C, H, W] twice -> [...], such as [G, B, S].

    Worth looking at before it is summed: which block and which step tell the branches apart?
    """
    if v_theta.shape != v_branch.shape or v_theta.ndim < 4:
        raise ValueError(
            "expected two velocities of one shape [..., F, C, H, W], "
            f"got {list(v_theta.shape)} and {list(v_branch.shape)}"
        )
    wide = torch.promote_types(v_theta.dtype, torch.float32)
    return (v_theta.to(wide) - v_branch.to(wide)).square().mean(dim=(-4, -3, -2, -1))


def energy_weights(sigma: Tensor, sigma_floor: float = 0.0) -> Tensor:
    """Weight [S] of each step's velocity residual, (sigma / max(sigma, sigma_floor))^2 (KV:2257-2393).

    Floor 0 is the paper's velocity energy (all weights 1). Floor 1 is the authors' default, the x0 residual
    (weights sigma^2); with tau = 2 that is their log score exactly.
    """
    return (sigma / sigma.clamp(min=sigma_floor)).square()


def trajectory_energy(energies: Tensor, weights: Tensor | None = None) -> Tensor:
    """E [G]: the `step_energies` [G, B, S] summed over blocks and steps, times `weights` [S] (None: all 1)."""
    if energies.ndim != 3 or (weights is not None and weights.shape != energies.shape[2:]):
        got = None if weights is None else list(weights.shape)
        raise ValueError(f"expected energies [G, B, S] and weights [S], got {list(energies.shape)} and {got}")
    return (energies if weights is None else energies * weights.to(energies)).sum(dim=(1, 2))


def gibbs_log_prob(E: Tensor, tau: float) -> Tensor:
    """log pi [G] = log_softmax(-E / tau): branches that the policy explains well are likely. Unchanged by E + c."""
    if not tau > 0:
        raise ValueError(f"the temperature tau must be above 0, got {tau}")
    return torch.log_softmax(-E / tau, dim=-1)


def calibrate_tau(E_groups: Tensor, tau_target: float = 1.0) -> float:
    """tau at which log scores -E / tau spread by `tau_target` inside a group; from the energies [N, G] of N groups.

    The spread is the population standard deviation over the branches of a group, averaged over groups. Raw energies
    of one group differ by far less than the authors' tau of 2 (by .01 to .1 on the pocket model), and there the
    policy is nearly uniform, the ratio hardly leaves 1, and neither the clip nor the KL acts. Call it once, on the
    first groups, and keep the result: a tau that follows the energies would change the objective while it is being
    optimised. Raises ValueError if the energies do not differ.
    """
    if E_groups.ndim != 2 or E_groups.shape[1] < 2 or not tau_target > 0:
        raise ValueError(
            "expected energies [N, G] with 2 branches or more and tau_target > 0, "
            f"got {list(E_groups.shape)} and {tau_target}"
        )
    spread = E_groups.std(dim=1, correction=0).mean().item()
    if not 0 < spread < math.inf:
        raise ValueError(f"energies of a group must differ and be finite, got a spread of {spread}: were they routed?")
    return spread / tau_target


def gibbs_entropy(log_p: Tensor) -> Tensor:
    """Entropy () of log pi [G], in nats: log G when the branches are equally likely, 0 when one has taken over."""
    return -(log_p.exp() * log_p.clamp(min=-1e3)).sum(dim=-1)  # finite, with its gradient, also where pi is 0


def _per_latent(sigma: Tensor | float, z: Tensor) -> Tensor:
    # [...] -> [..., 1, 1, 1, 1], in float32 or better: bfloat16 would cost more than the residual is worth
    wide = torch.promote_types(z.dtype, torch.float32)
    each = torch.as_tensor(sigma, dtype=wide, device=z.device)[..., None, None, None, None]
    if z.ndim < 4 or torch.broadcast_shapes(each.shape, z.shape) != z.shape:
        levels = list(each.shape[:-4])
        raise ValueError(f"expected latents [..., F, C, H, W] and sigma [...], got {list(z.shape)} and {levels}")
    return each
