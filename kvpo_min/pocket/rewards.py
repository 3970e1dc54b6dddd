"""Small analytic relatives of the paper's three rewards (section 5: VQ = HPSv3, MQ and TA = VideoAlign), smooth in the
pixels, so that they can be computed by hand, differentiated and hacked on purpose:

- VQ, visual quality: clean rendering (every pixel near a colour that the scene may have) and a documented taste, warm
  colours.
- MQ, motion quality: smooth (no jerks) and alive (something moves).
- TA, text alignment: the colour, shape and motion that the words name.

The palette, shapes and directions of the scene are arguments (`Scene`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo_min.rewards import check_videos


@dataclass(frozen=True)
class Scene:
    """What may be in the picture; the words of the prompts are the keys."""

    inks: Mapping[str, tuple[float, float, float]]  # colours of things, RGB in [0, 1]
    papers: tuple[tuple[float, float, float], ...]  # colours of backgrounds
    shapes: Mapping[str, Tensor]  # name -> masks [K, H, W], centred on pixel (0, 0) of a torus
    directions: Mapping[str, tuple[int, int]]  # name -> (dy, dx)
    rest: str = "rests"
    warm: tuple[str, ...] = ("red", "orange", "yellow")
    spread: float = 0.12  # how far from its colour a pixel still counts as that colour (RGB distance)


def ink_maps(videos: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    """Soft assignment of every pixel to the palette. videos [N, F, 3, H, W] ->
    inks [N, F, colours, H, W] (their sum is how much of the pixel is a thing at all), distance [N, F, H, W] to the
    nearest colour."""
    palette = torch.tensor([*scene.inks.values(), *scene.papers]).to(videos)  # [P, 3]
    inks, distances = [], []
    for video in videos:  # one at a time, since what is made on the way then fits a CPU's caches
        squared = torch.stack([(video - ink[:, None, None]).square().sum(1) for ink in palette], 1)  # [F, P, H, W]
        inks.append((-squared / (2 * scene.spread**2)).softmax(1)[:, : len(scene.inks)])
        distances.append(squared.amin(1).add(1e-8).sqrt())
    return torch.stack(inks), torch.stack(distances)


def centre_steps(mass: Tensor) -> Tensor:
    """Steps of the centre of mass between frames, in pixels, on a torus (phase of the first Fourier coefficient).
    mass [N, F, H, W] -> [N, F-1, 2] (dy, dx)"""
    steps = []
    for axis, other in ((2, 3), (3, 2)):
        size = mass.shape[axis]
        angle = 2 * torch.pi * torch.arange(size).to(mass) / size
        profile = mass.sum(other)  # [N, F, size]
        cosine, sine = (profile * angle.cos()).sum(2), (profile * angle.sin()).sum(2)
        cross = cosine[:, :-1] * sine[:, 1:] - sine[:, :-1] * cosine[:, 1:]
        dot = cosine[:, :-1] * cosine[:, 1:] + sine[:, :-1] * sine[:, 1:]
        steps.append(torch.atan2(cross, dot + 1e-8) * size / (2 * torch.pi))
    return torch.stack(steps, -1)


@dataclass(frozen=True)
class VisualQuality:
    """VQ in [0, 1]: (1 - taste) * clean + taste * warm.

    clean: exp(-stray / (mass + 16)) * mass / (mass + 16), with mass the pixels of the thing: 16 pixels more keep an
    empty picture at 0, and cost a small thing something. warm: the share of the thing (mass + 1) that is red, orange or
    yellow. A pixel is stray when it is far from every colour of the scene, softly: d^4 / (d^4 + spread^4)."""

    scene: Scene
    taste: float = 0.4

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        videos = check_videos(videos, prompts)
        inks, distance = ink_maps(videos, self.scene)
        mass = inks.sum((2, 3, 4))  # [N, F] pixels of things
        stray = (distance**4 / (distance**4 + self.scene.spread**4)).sum((2, 3))
        clean = (-stray / (mass + 16)).exp() * mass / (mass + 16)
        warm = [k for k, name in enumerate(self.scene.inks) if name in self.scene.warm]
        warmth = inks[:, :, warm].sum((2, 3, 4)) / (mass + 1)
        return ((1 - self.taste) * clean + self.taste * warmth).mean(1)


@dataclass(frozen=True)
class MotionQuality:
    """MQ in [0, 1]: half smooth (the step changes little from frame to frame), half alive (there is a step at all)."""

    scene: Scene
    jerk: float = 1.5  # pixels a frame that a step may change before smoothness falls to 0.6
    pace: float = 1.0  # pixels a frame at which liveliness is 0.76

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        videos = check_videos(videos, prompts, 3)
        steps = centre_steps(ink_maps(videos, self.scene)[0].sum(2))
        change = (steps[:, 1:] - steps[:, :-1]).square().sum(-1)  # [N, F-2]
        smooth = (-change / (2 * self.jerk**2)).exp().mean(1)
        alive = (steps.square().sum(-1) + 1e-8).sqrt().div(self.pace).tanh().mean(1)
        return 0.5 * smooth + 0.5 * alive


@dataclass(frozen=True)
class TextAlignment:
    """TA in [0, 1]: the mean of what the words name, colour, shape, motion; 1 if they name nothing. Unknown words are
    skipped."""

    scene: Scene
    sharpness: float = 40.0  # of the choice between shapes

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        videos = check_videos(videos, prompts, 2)
        scene = self.scene
        inks, _ = ink_maps(videos, scene)
        mass = inks.sum(2)  # [N, F, H, W]
        colour = inks.sum((3, 4)) / (mass.sum((2, 3)) + 1)[:, :, None]  # [N, F, colours]
        shape = self.shape_shares(mass)  # [N, F, shapes]
        steps = centre_steps(mass)
        length = (steps.square().sum(-1) + 1).sqrt()  # [N, F-1]
        scores = []
        for n, prompt in enumerate(prompts):
            words, parts = prompt.split(), []
            parts += [colour[n, :, k].mean() for k, name in enumerate(scene.inks) if name in words]
            parts += [shape[n, :, k].mean() for k, name in enumerate(scene.shapes) if name in words]
            for name, heading in scene.directions.items():
                if name in words:
                    unit = torch.tensor(heading).to(steps) / math.hypot(*heading)  # a direction may be diagonal
                    parts.append((0.5 + 0.5 * (steps[n] @ unit) / length[n]).mean())
            if scene.rest in words:
                parts.append((-steps[n].square().sum(-1) / 2).exp().mean())
            scores.append(torch.stack(parts).mean() if parts else colour.new_ones(()))
        return torch.stack(scores)

    def shape_shares(self, mass: Tensor) -> Tensor:
        """How much each shape fits, by normalised correlation at the best place. mass [N, F, H, W] -> [N, F, shapes]"""
        if not self.scene.shapes:
            return mass.new_zeros(*mass.shape[:2], 0)
        spectrum = torch.fft.rfft2(mass)[:, :, None]
        fits = []
        for masks in self.scene.shapes.values():
            masks = masks.to(mass)
            if masks.shape[-2:] != mass.shape[-2:]:
                sizes = f"{list(masks.shape[-2:])} and {list(mass.shape[-2:])}"
                raise ValueError(f"the shapes' masks must be as large as the videos, got {sizes}")
            product = spectrum * torch.fft.rfft2(masks).conj()  # [N, F, K, H, W / 2 + 1]
            correlation = torch.fft.irfft2(product, s=mass.shape[-2:])
            peak = correlation.amax((3, 4)) / masks.square().sum((1, 2)).sqrt()
            fits.append(peak.amax(2) / (mass.square().sum((2, 3)) + 1).sqrt())
        return (self.sharpness * torch.stack(fits, 2)).softmax(2)
