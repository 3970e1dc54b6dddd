"""A generator and what surrounds it: sampling, scoring and evaluating videos. No policy gradient in here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpo_min.chr import Window
from kvpo_min.rewards import Mixture, check_finite
from kvpo_min.rollout import Sampler, Stream, draw_noise, generate, switch_reach
from kvpo_min.system import gather, processes
from kvpo_min.tve import schedule

if TYPE_CHECKING:
    from kvpo_min.bank import Bank


@dataclass(frozen=True)
class Pipeline:
    """A generator and what surrounds it. `pocket.load_pocket` makes one."""

    backbone: torch.nn.Module  # rollout.Backbone; `.transformer` is what LoRA is put on
    decode: Callable[[Tensor], Tensor]  # latents [N, T, C, H, W] -> pixels [N, T, 3, H', W'] in [0, 1], one a frame
    embed: Callable[[list[str]], Tensor]  # texts -> [B, L, D]
    latent_shape: tuple[int, int, int]  # C, H, W
    switches: tuple[int, ...]  # frames at which the second, third, ... segment begins
    segments: Callable[[str], list[str]]  # script -> texts that the model reads, one a segment
    reward_prompts: Callable[[str, range], str]  # script, frames of one segment -> the text that rewards are given
    read: Callable[[Tensor], object] | None = None  # pixels -> a dataclass of tensors [N, ...]: what the judge sees
    judge: Callable[[object, list[str]], dict[str, float]] | None = None  # of that and the scripts; never trained on
    sample_scripts: Callable[[int, int, int], list[str]] | None = None  # n, segments, seed -> scripts
    sigmas: Tensor = field(default_factory=schedule)  # [S] noise levels of the sampler
    bank: Bank | None = None  # empty memory bank that every video begins with (MemFlow: bank.py)
    name: str = "model"

    def sampler(self, num_segments: int = 1, routed: bool = True) -> Sampler:
        """The sampler of videos of so many segments. Where nothing is routed, less of the past is kept."""
        window = Window()
        if not routed:
            window = replace(window, history=window.sink + switch_reach(window))
        return Sampler(self.sigmas, window, self.switches[: num_segments - 1])


def score(
    pipeline: Pipeline, rewards: Mixture, pixels: Tensor, scripts: Sequence[str], first: int
) -> dict[str, Tensor]:
    """Scores videos segment by segment with that segment's words, then averages over the segments in view.
    pixels [N, T, 3, H, W] begin at frame `first`; one script a video, all with the same number of segments.
    -> {component: [N]} (authors: kvpo.py:1769-1930 score one clip a segment)."""
    if not scripts or pixels.shape[1] < 3:
        raise ValueError(
            f"a score needs a script and 3 frames of it at least, got {len(scripts)} and {pixels.shape[1]}"
        )
    switches = pipeline.switches[: len(pipeline.segments(scripts[0])) - 1]
    last = first + pixels.shape[1]
    borders = [first, *[s for s in switches if first < s < last], last]
    clips = []
    for begin, end in zip(borders, borders[1:], strict=False):
        if end - begin >= 3:  # motion needs three frames
            texts = [pipeline.reward_prompts(script, range(begin, end)) for script in scripts]
            clips.append(rewards.scores(pixels[:, begin - first : end - first], texts))
    return {name: torch.stack([clip[name] for clip in clips]).mean(0) for name in clips[0]}


@torch.no_grad()
def sample(
    pipeline: Pipeline, scripts: Sequence[str], num_frames: int, seed: int = 99999, batch: int = 32,
    sigmas: Tensor | None = None, eta: float = 1.0, bar: bool = False, first: int = 0,
) -> Iterator[Tensor]:  # fmt: skip
    """Generates one video a script, unrouted; video i's noise comes from a generator of its own, seed + 10000 i, so
    it does not depend on the batch. `sigmas`, `eta`: another sampler than the 4-step one. `first`: number of the first
    script, where these are a part of more. Yields latents [b, T, C, H, W]. Raises FloatingPointError when they are not
    finite."""
    from tqdm import tqdm

    sigmas = pipeline.sigmas if sigmas is None else sigmas
    n_segments = {len(pipeline.segments(script)) for script in scripts}
    if len(n_segments) != 1:
        raise ValueError(f"scripts of one call must have the same number of segments, got {sorted(n_segments)}")
    sampler = replace(pipeline.sampler(n_segments.pop(), routed=False), sigmas=sigmas, eta=eta)
    block = sampler.window.block
    for begin in tqdm(range(0, len(scripts), batch), desc="sample", disable=not bar, leave=False):
        part = scripts[begin : begin + batch]
        texts = [pipeline.embed(list(t)) for t in zip(*[pipeline.segments(s) for s in part], strict=True)]
        noise = [
            draw_noise(num_frames // block, len(sigmas) if eta else 1, (block, *pipeline.latent_shape),
                       torch.Generator().manual_seed(seed + 10000 * (first + begin + i)))
            for i in range(len(part))
        ]  # fmt: skip
        noise = torch.cat(noise).to(pipeline.backbone.device)  # drawn on the CPU: the same on every device
        latents = generate(pipeline.backbone, Stream(bank=pipeline.bank), texts, noise, num_frames, sampler).latents
        check_finite("the latents of the videos are", latents)
        yield latents


def observe(
    pipeline: Pipeline, scripts: Sequence[str], rewards: Mixture, videos: Iterable[Tensor]
) -> tuple[list[dict[str, Tensor]], list]:
    """What is measured of whole videos, latents [b, T, C, H, W] in any batches, one a script. -> for each batch the
    rewards {component: [b]}, and where there is a judge, what it sees (`pipeline.read`); `pooled` joins them"""
    scores, readings = [], []
    begin = 0
    for latents in videos:
        pixels = pipeline.decode(latents)
        found = score(pipeline, rewards, pixels, scripts[begin : begin + len(pixels)], 0)
        scores.append({name: each.cpu() for name, each in found.items()})
        if pipeline.judge:
            readings.append(pipeline.read(pixels))
        begin += len(pixels)
    return scores, readings


def pooled(parts: Sequence[tuple[list, list]]) -> tuple[dict[str, Tensor], object | None]:
    """What calls of `observe` found, as if all their videos had been one batch; None where there is no judge."""
    scores, readings = (sum(lists, []) for lists in zip(*parts, strict=True))
    scores = {name: torch.cat([each[name] for each in scores]) for name in scores[0]}
    if not readings:
        return scores, None
    names = [f.name for f in fields(readings[0])]
    return scores, type(readings[0])(**{name: torch.cat([getattr(r, name) for r in readings]) for name in names})


def evaluate(
    pipeline: Pipeline, scripts: Sequence[str], rewards: Mixture, num_frames: int, seed: int = 99999, batch: int = 32,
    sigmas: Tensor | None = None, eta: float = 1.0, bar: bool = False, head: int = 0,
) -> dict:  # fmt: skip
    """Mean rewards of unrouted videos, their standard errors over prompts, and the held-out judge; under "head" those
    of the first `head` prompts alone. Of several processes each makes its share of the videos; all must call this, and
    get the same."""
    if not scripts:
        raise ValueError("expected at least one script to evaluate, got none")
    rank, world = processes()
    first, end = (len(scripts) * r // world for r in (rank, rank + 1))
    own = scripts[first:end]
    videos = sample(pipeline, own, num_frames, seed, batch, sigmas, eta, bar, first) if own else ()
    scores, reading = pooled(gather(observe(pipeline, own, rewards, videos)))
    out = summary(pipeline, scripts, rewards, scores, reading)
    return out | {"head": summary(pipeline, scripts[:head], rewards, scores, reading)} if head else out


def summary(pipeline: Pipeline, scripts: Sequence[str], rewards: Mixture, scores: Mapping, reading) -> dict:
    """Of what `pooled` gave, the part that belongs to the first len(scripts) videos, as `evaluate` returns it."""
    n = len(scripts)
    scores = {name: each[:n] for name, each in scores.items()}
    total = rewards.total(scores)
    out = {name: s.mean().item() for name, s in scores.items()} | {"reward": total.mean().item()}
    for name, each in (scores | {"reward": total}).items():
        out[f"{name}_sem"] = (each.std() / n**0.5).item() if n > 1 else float("nan")
    if reading is not None:  # pooled over all frames, so that the shares do not depend on the batches
        out["judge"] = pipeline.judge(
            replace(reading, **{f.name: getattr(reading, f.name)[:n] for f in fields(reading)}), list(scripts)
        )
    return out


CURVE = 16  # held-out prompts of a point of the curve


def held_out_curve(
    pipeline, scripts: list[str], rewards, config, every: int, batch: int = 32
) -> Callable[[int], dict] | None:
    """-> a function of the number of updates done that measures, every so many of them, the active policy on the
    first held-out prompts, always with the same noise: {"eval/reward": ..., "eval/seconds": ...}, else {}. `found`:
    numbers that `evaluate` has measured already (its "head"), which make a point at any update."""
    if not every:
        return None

    def measured(done: int, found: dict | None = None) -> dict:
        if done % every and not found:
            return {}
        begun = time.perf_counter()
        found = dict(found or evaluate(pipeline, scripts[:CURVE], rewards, config.num_frames, batch=batch))
        found |= found.pop("judge", {})
        seconds = time.perf_counter() - begun
        return {f"eval/{name}": x for name, x in found.items() if math.isfinite(x)} | {"eval/seconds": seconds}

    return measured


def table(columns: Mapping[str, dict], mark_down: bool = False) -> str:
    """Results of `evaluate` side by side; with two columns, their difference."""
    names = {"vq": "VQ", "mq": "MQ", "ta": "TA", "reward": "reward"}
    results = list(columns.values())

    def cell(result: dict, key: str) -> str:
        value, error = result.get(key), result.get(f"{key}_sem")
        if value is None or math.isnan(value):
            return "-"
        return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None and math.isfinite(error) else "")

    def row(name: str, parts: Sequence[dict], key: str) -> list[str]:
        cells = [name, *(cell(part, key) for part in parts)]
        if len(parts) == 2:
            a, b = (part.get(key) for part in parts)
            known = None not in (a, b) and math.isfinite(a) and math.isfinite(b)
            cells.append(f"{b - a:+.3f}" if known else "-")
        return cells

    rows = [row(label, results, key) for key, label in names.items()]
    judges = [result.get("judge", {}) for result in results]
    rows += [row(f"judge: {key}", judges, key) for key in judges[0]]
    header = ["", *columns, *(["change"] if len(results) == 2 else [])]
    if mark_down:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    lines = [header, *rows]
    first, *widths = (max(len(line[k]) for line in lines) for k in range(len(header)))

    def aligned(line: list[str]) -> str:
        return "  ".join([line[0].ljust(first), *(text.rjust(w) for text, w in zip(line[1:], widths, strict=True))])

    return "\n".join(map(aligned, lines))


def check_positions(pipeline, num_frames: int) -> None:
    """Raises ValueError when the model has no positions for so many frames, before the first one is made."""
    most = len(pipeline.backbone.transformer.rope.freqs_cos)
    if num_frames > most:
        raise ValueError(f"num_frames must be at most {most} with {pipeline.name}, got {num_frames}")
