"""What a run shows when it is over: videos, figures and a model card."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from kvpo_min import viz
from kvpo_min.chr import Window, chunk_of, routed_frames
from kvpo_min.pipeline import table
from kvpo_min.pocket import world


def set_aside(step):
    """What the pictures need of an update: its first group, without what fills a GPU."""
    group = step.groups[0]
    videos = group.rollout.videos[-1:].cpu()
    bank = group.rollout.prefix.bank  # which frames it holds is drawn
    prefix = bank and dataclasses.replace(
        group.rollout.prefix, x0=(), history=None, bank=dataclasses.replace(bank, kv=None, pending=None)
    )
    rollout = dataclasses.replace(group.rollout, prefix=prefix, trajectory=None, text=None, videos=videos)
    return dataclasses.replace(step, groups=[dataclasses.replace(group, rollout=rollout, kept=None)])


def try_video() -> None:
    """Makes a small one. Raises OSError with what keeps videos from being made."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            viz.save_video(Path(folder) / "video.mp4", torch.zeros(3, 3, 64, 64))
        except Exception as error:  # ffmpeg, and whatever is called so
            raise OSError(f"videos cannot be written: {' '.join(str(error).split())}; is ffmpeg sound?") from error


def try_pictures() -> None:
    """Makes a small one of each kind. Raises what keeps them from being made."""
    try_video()
    with tempfile.TemporaryDirectory() as folder:
        viz.reward_curve([{"step": 0, "reward": 1.0, "anchor_reward": 0.0}]).savefig(Path(folder) / "curve.png")


def draw_curves(folder: Path, logs: list[dict], last) -> None:
    if logs:
        viz.reward_curve(logs).savefig(folder / "figures" / "reward.png", dpi=120)
        viz.diagnostics(logs).savefig(folder / "figures" / "diagnostics.png", dpi=120)
    if last:
        viz.energy_plot(last).savefig(folder / "figures" / "energies.png", dpi=120)


def draw_groups(pipeline, folder: Path, config, steps: Sequence, fps: float) -> None:
    """The first group of the first and of the last update: branches and anchor as video, sheet, routes and story."""
    for step in {s.step: s for s in steps}.values():
        group = step.groups[0]
        fork, name = group.plan.fork, f"group_{step.step:04d}"
        first = chunk_of(fork, config.num_frames).start
        gained = [f"advantage {a:+.2f}" for a in group.advantages.tolist()]
        labels = [*(f"branch {g}, {text}: {group.script}" for g, text in enumerate(gained)), f"anchor: {group.script}"]
        viz.save_video(folder / "videos" / f"{name}.mp4", group.videos, fps)
        videos = smaller(group.videos)
        sheet = viz.contact_sheet(videos, labels, first=first)
        sheet.save(folder / "videos" / f"{name}.png")
        frames = routed_frames(group.plan, fork, Window(), config.nearest)
        bank = group.rollout.prefix and group.rollout.prefix.bank.held().cpu()
        routes = viz.route_grid(frames, fork, Window(), 0 if group.plan.slots else config.nearest, bank)
        routes.savefig(folder / "figures" / f"routes_{step.step:04d}.png", dpi=120)
        prefix = smaller(pipeline.decode(group.rollout.videos[:1, :fork]))[0]
        ends = zip(places(pipeline, group.videos), [*gained, ""], strict=True)
        ends = [f"{place}\n{text}".strip() for place, text in ends]
        story = viz.film_fork(prefix, frames, videos[:, fork - first :], ends)
        story.save(folder / "figures" / f"story_{step.step:04d}.png")


def places(pipeline, videos) -> list[str]:
    """The scene in which each of the pocket world's videos ends; of a real model's: nothing."""
    if pipeline.read is not world.judge:
        return [""] * len(videos)
    return [world.SCENES[scene] for scene in world.most(world.judge(videos[:, -3:]).scene).tolist()]


def draw_before_after(folder: Path, before, after, scripts: list[str], fps: float) -> None:
    """Side by side: one mp4 a prompt (before left, after right) and one sheet of all."""
    shown = scripts[: len(before)]
    for k, script in enumerate(shown):
        pair = torch.stack([before[k], after[k]])
        viz.save_video(folder / "videos" / f"before_after_{k}_{slug(script)}.mp4", pair, fps)
    viz.before_after(smaller(before), smaller(after), shown).save(folder / "videos" / "before_after.png")


def in_words(before: dict, after: dict, scripts: Sequence[str], num_frames: int) -> str:
    """The result in a sentence. before, after: from `evaluate` on these scripts."""
    was, now = before.get("judge", {}), after.get("judge", {})
    if not all(math.isfinite(judge.get("liked", math.nan)) for judge in (was, now)):
        return f"The reward went from {before['reward']:.3f} to {after['reward']:.3f}."
    n = sum(event + 3 <= num_frames for script in scripts for event in world.settlings(script))
    text = f"The hero settles in a scene you like: {was['liked'] * n:.0f} of {n} before, {now['liked'] * n:.0f} after"
    if all(math.isfinite(judge["liked anew"]) for judge in (was, now)):
        text += f" ({now['liked anew']:.0%} of those that memory leads elsewhere, {was['liked anew']:.0%} before)"
    return text + f"; its journey is in order in {was['journey']:.0%}, then {now['journey']:.0%}."


def smaller(pixels):
    """[N, T, 3, H, W], for sheets: frames of 128 pixels or less stay as they are, larger ones shrink to about that."""
    factor = max(1, pixels.shape[-2] // 128)
    return torch.nn.functional.avg_pool2d(pixels.flatten(0, 1), factor).unflatten(0, pixels.shape[:2])


def slug(script: str) -> str:
    return re.sub(r"[^a-z]+", "_", script.lower()).strip("_")[:60]


def model_card(name: str, config, options, result: dict, n_scripts: int, seen: int, wan=None, shown: str = "") -> str:
    """README.md of a run folder, in the form that the Hub reads. `shown`: the script that a real model's names."""
    before, after = result["before"], result["after"]
    measured = table({"before": before, "after": after} if after else {"before": before}, mark_down=True)
    weights = {"VQ": options.vq, "MQ": options.mq, "TA": options.ta}
    reward = " + ".join(f"{weight:g} {key}" for key, weight in weights.items() if weight)
    length = f"{config.num_frames} frames, {config.num_segments} segment{'s' if config.num_segments > 1 else ''}"
    folder = Path(config.output_dir)
    drawn = {"before and after": "videos/before_after.png", "reward over the run": "figures/reward.png"}
    pictures = [f"![{title}]({path})" for title, path in drawn.items() if (folder / path).is_file()]
    if not after:
        pictures.insert(0, "The run was stopped early: there is no measurement after it.")
    picture = "\n\n".join(pictures) or "Pictures could not be made."
    where = shlex.quote(config.output_dir)
    model = f" --model {shlex.quote(options.model)}" if options.model else ""
    judged = f""" The judge sees
pixels only and is never trained on. {seen} of these prompts also occur, word for word, among the {n_scripts} training
prompts, because the grammar is small; their noise does not."""
    script = '"a red disc moves left"'
    export = ""
    limits = """\
It knows the pocket world (a hero in six landscapes) and its grammar, nothing else. The reward holds a taste on purpose:
heroes are expected to settle in the scenes that it names (`like` in config.yaml)."""
    if wan:
        judged = f" They are the last ones of the prompts file; {seen or 'none'} of them were trained on."
        script = shlex.quote(shown)
        training = ("gradient_checkpointing", "vq_model", "mq_model", "ta_model")
        given = {f.name: getattr(wan, f.name) for f in dataclasses.fields(wan) if f.name not in training}
        given = {name: str(value) for name, value in given.items() if value not in ("", 0)}
        model += "".join(f" --{name} {shlex.quote(value)}" for name, value in given.items()
                         if wan.bank_size or name != "bank_interval")  # fmt: skip
        export = f"\nkvpo-min export --adapter {where} --layout diffusers"
        export += "".join(f" --{name} {shlex.quote(given[name])}" for name in ("lora", "merged_alpha") if name in given)
        scored = {"VQ": wan.vq_model, "MQ": wan.mq_model, "TA": wan.ta_model}
        limits = "It was trained on few prompts and on a reward that is a model itself, and that can be hacked: "
        limits += ", ".join(f"{key} by `{line}`" for key, line in scored.items() if line) + "."
        if wan.lora:
            limits += f"\nIt belongs on top of the model with `{wan.lora}` merged into it."
    return f"""---
base_model: {name}
library_name: peft
tags: [lora, wan, kvpo, text-to-video]
---
# {name}, aligned with KVPO

A LoRA of rank {config.rank} for `{name}`, trained with `kvpo_min` (KVPO, arXiv 2605.14278): {result["updates"]} updates
of {config.groups_per_update} x {config.num_generations} branches, {result["seconds"]:.0f} s, seed {config.seed}, reward
{reward}. These are the weights of the trained policy, not of its moving average.

## Results

{options.eval_prompts} held-out prompts ({length}), the same noise before and after; ± is the standard error over
prompts.{judged}

{measured}

{picture}

## Use

```bash
kvpo-min sample {script} --adapter {where}{model}{export}
```

or, on the stock transformer in Python, `peft.PeftModel.from_pretrained(transformer, "{config.output_dir}")`.

## Limits

{limits}
"""
