"""What an update leaves in the log."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kvpo_min.kvpo import Group


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
        """Keys as TRL users know them, and the method's own. A skipped update has only its number, tau, norm, rate and
        time."""
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

    reward = total(group.rewards)  # [G]
    out = {
        "reward": reward.mean(),
        "reward_std": reward.std(),
        "anchor_reward": total(group.anchor),
        "frac_reward_zero_std": reward.std() < 1e-8,
    }
    if group.energies is not None:
        energy = group.energies.sum((1, 2))  # [G]
        out |= {"energy/mean": energy.mean(), "energy/std": energy.std()}
        out |= {"ratio/max_dev_first": (group.ratio - 1).abs().max()}
    out |= {"safe": group.safe, "advantage/abs_mean": group.advantages.abs().mean(), "loss": group.loss}
    if group.energies is not None:
        out |= {"kl": group.kl, "entropy": group.entropy, "clip_ratio/region_mean": group.clip_fraction}
    out |= {"prefix_drift": group.prefix_drift}
    out |= {f"rewards/{name}/mean": r.mean() for name, r in group.rewards.items()}
    return {key: float(value) for key, value in out.items()}
