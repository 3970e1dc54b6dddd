"""The pocket world's rewards: small analytic relatives of the paper's three components (section 5: VQ = HPSv3, MQ and
TA = VideoAlign), smooth in the pixels, so that they can be computed by hand, differentiated and hacked on purpose.

- VQ, visual quality: clean rendering, and a taste: scenes that the user likes.
- MQ, motion quality: smooth (no jerks) and alive (something moves).
- TA, text alignment: the colour, shape, motion and scenes that the words name.

Deviation: the authors' defaults train on HPSv3 alone (configs/train_kvpo_longlive.yaml:138-140); the paper and we mix
three. Inks, landscapes, shapes and directions are arguments (`Look`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kvpo_min.rewards import check_videos


@dataclass(frozen=True)
class Look:
    """What may be in the picture; the words of the prompts are the keys."""

    inks: Mapping[str, tuple[float, float, float]]  # colours of heroes, RGB in [0, 1]
    rim: tuple[float, float, float]  # colour of their outline
    scenes: Mapping[str, Tensor]  # name -> landscape [3, H, W]
    shapes: Mapping[str, Tensor]  # name -> masks [K, H, W], centred on pixel (0, 0) of a torus
    directions: Mapping[str, tuple[int, int]]  # name -> (dy, dx)
    sides: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name -> (axis, which half of the picture)
    rest: str = "rests"
    spread: float = 0.06  # how far from its colour a pixel still counts as that colour (RGB distance)
    tolerance: float = 0.3  # how far from all that may be there a pixel still counts as clean


@dataclass(frozen=True)
class Seen:
    """What every reward looks at, from `look_at`."""

    inks: Tensor  # [N, F, colours, H, W] how much of a pixel is a hero of that ink
    stray: Tensor  # [N, F, H, W] how far a pixel is from all that may be there, 0 to 1
    scenes: Tensor  # [N, F, scenes] shares of a frame, sum 1


_seen = WeakIdKeyDictionary()  # videos -> their version, the look, and what was seen; goes when they go


def look_at(videos: Tensor, look: Look) -> Seen:
    """`read_pixels`, but once for all rewards that look at the same videos in turn."""
    if videos.requires_grad or videos.is_inference():  # a graph serves one backward, and inference counts no versions
        return read_pixels(videos, look)
    version, known, seen = _seen.get(videos, (None, None, None))
    if version != videos._version or known is not look:
        seen = read_pixels(videos, look)
        _seen[videos] = (videos._version, look, seen)
    return seen


def read_pixels(videos: Tensor, look: Look) -> Seen:
    """Soft reading of every pixel: landscape, rim or ink. videos [N, F, 3, H, W]

    A frame's scene is a softmax over its distances to the landscapes; a pixel's ink is a softmax over its distances to
    the inks, to the rim and to the landscape at that place. A pixel is stray when it is far from all of them and from
    what lies between: rim and ink, or rim and landscape, are mixed in the pixels of a clean edge."""
    inks, rim = torch.tensor(list(look.inks.values())).to(videos), torch.tensor(look.rim).to(videos)  # [K, 3], [3]
    pictures = torch.stack(list(look.scenes.values())).to(videos)  # [S, 3, H, W]
    found, stray, shares = [], [], []
    for video in videos:  # one at a time, since what is made on the way then fits a CPU's caches
        behind = torch.stack([(video - picture).square().sum(1) for picture in pictures], 1)  # [F, S, H, W]
        apart = (behind / (behind + 0.1)).mean((2, 3))  # [F, S]: bounded, so that a hero weighs no more than its pixels
        share = (-apart / 0.03).softmax(1)
        nearest = (behind * share[:, :, None, None]).sum(1, keepdim=True)  # [F, 1, H, W]
        colours = [(video - colour[:, None, None]).square().sum(1) for colour in [*inks, rim]]
        squared = torch.cat([torch.stack(colours, 1), nearest], 1)  # [F, K + 2, H, W]
        found.append((-squared / (2 * look.spread**2)).softmax(1)[:, : len(inks)])
        away = video - rim[:, None, None]
        lines = [ink - rim for ink in inks]  # from the rim to what it is mixed with, [3]
        lines = [line[:, None, None] for line in lines] + [pictures[share.argmax(1)] - rim[:, None, None]]
        edges = []
        for line in lines:
            along = ((away * line).sum(1, keepdim=True) / line.square().sum(-3, keepdim=True)).clamp(0, 1)
            edges.append((away - along * line).square().sum(1))
        far = torch.minimum(torch.stack(edges, 1).amin(1), nearest[:, 0]).square()
        stray.append(far / (far + look.tolerance**4))
        shares.append(share)
    return Seen(torch.stack(found), torch.stack(stray), torch.stack(shares))


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
    """VQ in [0, 1]: (1 - taste) * clean + taste * liked.

    clean: exp(-stray / 64) * (1 - exp(-mass / 20)), with `mass` the pixels of the hero and `stray` those far from all
    that may be there (softly: d^4 / (d^4 + tolerance^4)): an empty landscape has 0, and a small hero as much as a large
    one. liked: the share of the scenes in `like`, or how much of the hero is on the side that `like` names."""

    look: Look
    like: tuple[str, ...]
    taste: float = 0.5

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        seen = look_at(check_videos(videos, prompts), self.look)
        mass, stray = seen.inks.sum((2, 3, 4)), seen.stray.sum((2, 3))  # [N, F]
        clean = (-stray / 64).exp() * (1 - (-mass / 20).exp())
        if self.like[0] in self.look.sides:
            axis, half = self.look.sides[self.like[0]]
            along = seen.inks.sum((2, 4 - axis))  # [N, F, H or W]
            liked = along.chunk(2, 2)[half].sum(2) / along.sum(2).clamp(min=1e-6)
        else:
            liked = seen.scenes[:, :, [name in self.like for name in self.look.scenes]].sum(2)
        return ((1 - self.taste) * clean + self.taste * liked).mean(1)


@dataclass(frozen=True)
class MotionQuality:
    """MQ in [0, 1]: half smooth (the step changes little from frame to frame), half alive (there is a step at all)."""

    look: Look
    jerk: float = 1.5  # pixels a frame that a step may change before smoothness falls to 0.6
    pace: float = 1.0  # pixels a frame at which liveliness is 0.76

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        steps = centre_steps(look_at(check_videos(videos, prompts, 3), self.look).inks.sum(2))
        change = (steps[:, 1:] - steps[:, :-1]).square().sum(-1)  # [N, F-2]
        smooth = (-change / (2 * self.jerk**2)).exp().mean(1)
        alive = (steps.square().sum(-1) + 1e-8).sqrt().div(self.pace).tanh().mean(1)
        return 0.5 * smooth + 0.5 * alive


PLACES = re.compile(r"(\d+) frames (?:anywhere|at the ([a-z]+(?: or [a-z]+)*))(?= ,|$)")
TURNS = re.compile(r"(\d+) frames (?:of any colour|(?!anywhere)([a-z]+))(?= ,|$)")


@dataclass(frozen=True)
class TextAlignment:
    """TA in [0, 1]: the mean of what the words name, colour, shape, motion, scenes; 1 if they name nothing. Unknown
    words are skipped. What changes is named frame by frame, in order: ", 6 frames red , 12 frames blue", ", 6 frames at
    the forest , 12 frames at the beach or night"."""

    look: Look
    sharpness: float = 40.0  # of the choice between shapes

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        videos = check_videos(videos, prompts, 2)
        look, seen = self.look, look_at(videos, self.look)
        mass = seen.inks.sum(2)  # [N, F, H, W]
        colour = seen.inks.sum((3, 4)) / (mass.sum((2, 3)) + 1)[:, :, None]  # [N, F, colours]
        shape = self.shape_shares(mass)  # [N, F, shapes]
        steps = centre_steps(mass)
        length = (steps.square().sum(-1) + 1).sqrt()  # [N, F-1]
        scores = []
        for n, prompt in enumerate(prompts):
            words, parts = prompt.split(" , ")[0].split(), []
            parts += [colour[n, :, k].mean() for k, name in enumerate(look.inks) if name in words]
            parts += self.frame_by_frame(colour[n], list(look.inks), TURNS, prompt)
            parts += [shape[n, :, k].mean() for k, name in enumerate(look.shapes) if name in words]
            for name, heading in look.directions.items():
                if name in words:
                    unit = torch.tensor(heading).to(steps) / math.hypot(*heading)  # a direction may be diagonal
                    parts.append((0.5 + 0.5 * (steps[n] @ unit) / length[n]).mean())
            if look.rest in words:
                parts.append((-steps[n].square().sum(-1) / 2).exp().mean())
            parts += self.frame_by_frame(seen.scenes[n], list(look.scenes), PLACES, prompt)
            scores.append(torch.stack(parts).mean() if parts else colour.new_ones(()))
        return torch.stack(scores)

    def frame_by_frame(self, shares: Tensor, names: list[str], clause: re.Pattern, prompt: str) -> list[Tensor]:
        """How much of the frames is as clauses like "6 frames blue" say. shares [F, names]
        -> a list of one score, or an empty one where the prompt has no such clause"""
        begin, there = 0, []
        for count, wanted in clause.findall(prompt):
            frames = shares[begin : begin + int(count)]
            if wanted:
                there.append(frames[:, [name in wanted.split(" or ") for name in names]].sum(1))
            begin += int(count)
        return [torch.cat(there).mean()] if there else []

    def shape_shares(self, mass: Tensor) -> Tensor:
        """How much each shape fits, by normalised correlation at the best place. mass [N, F, H, W] -> [N, F, shapes]"""
        if not self.look.shapes:
            return mass.new_zeros(*mass.shape[:2], 0)
        spectrum = torch.fft.rfft2(mass)[:, :, None]
        fits = []
        for masks in self.look.shapes.values():
            masks = masks.to(mass)
            if masks.shape[-2:] != mass.shape[-2:]:
                sizes = f"{list(masks.shape[-2:])} and {list(mass.shape[-2:])}"
                raise ValueError(f"the shapes' masks must be as large as the videos, got {sizes}")
            product = spectrum * torch.fft.rfft2(masks).conj()  # [N, F, K, H, W / 2 + 1]
            correlation = torch.fft.irfft2(product, s=mass.shape[-2:])
            peak = correlation.amax((3, 4)) / masks.square().sum((1, 2)).sqrt()
            fits.append(peak.amax(2) / (mass.square().sum((2, 3)) + 1).sqrt())
        return (self.sharpness * torch.stack(fits, 2)).softmax(2)
