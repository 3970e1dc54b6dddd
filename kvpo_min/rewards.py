"""Rewards: what a branch is worth. A reward model of any kind fits in, from forty lines on pixels to a 7B judge.

Here are what a reward must be and may raise, and weighted mixtures that keep their parts. The paper (section 5) mixes
three: VQ = HPSv3, MQ and TA = VideoAlign (`reward_models/`); small analytic ones are in `pocket/rewards.py`.

Deviation: the authors' defaults train on HPSv3 alone (configs/train_kvpo_longlive.yaml:138-140); the paper and we mix
three. Torch only; copy this file alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class RewardError(RuntimeError):
    """A reward model failed: its worker died, was silent for too long, or gave no usable scores. Training can skip the
    update and go on; the next call starts the worker anew."""


class NotFinite(FloatingPointError, ValueError):
    """A reward gave NaN or infinity. A training run skips the update."""


class Reward(Protocol):
    """Anything that scores videos: `reward(videos [N, F, 3, H, W] in [0, 1], prompts list of N) -> [N]`, higher is
    better."""

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor: ...


def check_finite(what: str, numbers: Tensor) -> None:
    """Raises FloatingPointError: a training run skips the update, and every other command ends with it."""
    if not numbers.isfinite().all():
        raise FloatingPointError(f"{what} not finite")


def check_videos(videos: Tensor, prompts: list[str], least: int = 1) -> Tensor:
    """-> the videos [N, F, 3, H, W], in float32 or better. Raises ValueError for what cannot be scored, such as fewer
    frames than `least`."""
    if videos.ndim != 5 or videos.shape[2] != 3 or 0 in videos.shape or len(prompts) != len(videos):
        raise ValueError(
            f"a reward takes videos [N, F, 3, H, W] and N prompts, got {list(videos.shape)} and {len(prompts)} prompts"
        )
    if not videos.is_floating_point():
        raise ValueError(f"a reward takes videos of floats in [0, 1], got {videos.dtype}")
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"a reward takes a list of prompts, got {prompts!r}")
    check_finite("the pixels of the videos are", videos)  # a formula on NaN can give any number
    if videos.min() < -0.5 or videos.max() > 1.5:  # bytes, or -1 to 1; a little over the edge is a decoder's
        raise ValueError(f"a reward takes videos in [0, 1], got {videos.min():.3g} to {videos.max():.3g}: rescale them")
    if videos.shape[1] < least:
        raise ValueError(f"this reward needs at least {least} frames, got {videos.shape[1]}")
    return videos.to(torch.promote_types(videos.dtype, torch.float32))


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of rewards that keeps its parts: `scores(...)` -> {name: [N]}; calling it -> [N]."""

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]

    def __post_init__(self):
        if set(self.rewards) != set(self.weights):
            raise ValueError(f"weights for {sorted(self.rewards)} are needed, got weights for {sorted(self.weights)}")
        for name, weight in self.weights.items():
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"the weight of reward '{name}' must be a finite number, got {weight!r}")

    def scores(self, videos: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Each component's own scores; a component that returns anything but N numbers is a ValueError naming it, and
        NotFinite if they are not finite."""
        check_finite("the pixels of the videos are", videos)
        out = {}
        for name, reward in self.rewards.items():
            given, wanted = reward(videos, prompts), f"reward '{name}' must give {len(videos)} finite numbers"
            try:
                score = torch.as_tensor(given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{wanted}, got a {type(given).__name__} ({error})") from None
            if score.shape != (len(videos),) or score.is_complex():
                raise ValueError(f"{wanted}, got shape {list(score.shape)} of {score.dtype}")
            if not score.float().isfinite().all():
                raise NotFinite(f"{wanted}, got {score.tolist()}")
            out[name] = score.float()
        return out

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [N] of such scores. Raises NotFinite."""
        if not scores:
            raise ValueError("there is no reward to sum: the mixture is empty")
        total = sum(self.weights[name] * score for name, score in scores.items())
        if not total.isfinite().all():
            raise NotFinite(
                f"the weighted sum of the rewards is not finite; are the weights right? {dict(self.weights)}"
            )
        return total

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        return self.total(self.scores(videos, prompts))
