"""The model, prompts and rewards that the options name: a pocket model, or a real Wan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from kvpo_min import pocket
from kvpo_min.cli.options import RunOptions, flags_of
from kvpo_min.pocket.world import liked_scenes
from kvpo_min.system import say
from kvpo_min.wan import real


def is_pocket(model: str) -> bool:
    """Whether this is a pocket model: the embedded one, or a folder in its layout. All else is a real Wan."""
    return not model or any((Path(model) / part).is_dir() for part in ("autoencoder", "student"))


def load_real(model: str, scripts: Sequence[str], prompts: str | Path, wan):
    """The pipeline of a real Wan that can be asked for these scripts, whose encodings are kept beside `prompts`."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    texts = [text for script in scripts for text in script.split(real.BETWEEN)]
    return real.load_wan(model, list(dict.fromkeys(texts)), real.text_cache(prompts), wan)


def real_options(argv: Sequence[str], model: str, wan):
    """The options of a real model, or None when `model` is a pocket model, for which giving one is an error; a config
    file may hold them as they are by default, as `--print_config` writes them."""
    if not is_pocket(model):
        return wan
    flags = flags_of(argv)
    fields = dataclasses.fields(wan)
    unused = [f.name for f in fields if f.name in flags or getattr(wan, f.name) != f.default]
    if unused:
        raise ValueError(
            f"{unused[0]} is an option of a real model, but {model or 'the embedded one'} is a pocket model: leave it "
            f"out, or give the real one with --model"
        )
    return None


def real_prompts(config, options: RunOptions) -> tuple[list[str], list[str]]:
    """Training scripts of a real model, and the last of its prompts file, which are held out. Raises ValueError."""
    if not 1 <= config.num_segments <= len(real.SWITCHES) + 1:
        raise ValueError(f"num_segments must be 1 to {len(real.SWITCHES) + 1}, got {config.num_segments}")
    if not options.prompts:
        raise ValueError(
            f"{options.model} is no pocket model (it has no student/), so it is taken for a real one, and that needs "
            f"--prompts FILE"
        )
    if options.event:
        raise ValueError("event chooses among scripts that the pocket world draws; a real model's come from --prompts")
    scripts = real.read_prompts(options.prompts, config.num_segments)
    if len(scripts) <= options.eval_prompts:
        raise ValueError(
            f"{options.prompts} has {len(scripts)} scripts, of which the last {options.eval_prompts} would be held "
            f"out: give more, or a smaller --eval_prompts"
        )
    scripts, held_out = scripts[: -options.eval_prompts], scripts[-options.eval_prompts :]
    most = config.max_train_steps * config.groups_per_update + (0 if config.tau else config.tau_groups)
    return scripts[:most], held_out  # the run meets no more, so no more are encoded


def run_rewards(options, wan=None):
    """What the videos are scored with: formulas on the pocket world, or the models that `wan` names. `options`: the
    weights vq, mq and ta, and the taste `like`."""
    weights = {"vq": options.vq, "mq": options.mq, "ta": options.ta}
    if wan and options.like != type(options).like:
        raise ValueError(f"like names scenes of the pocket world, and {options.model} is no pocket model: leave it out")
    if wan:
        return real.load_rewards(wan, **weights)
    return pocket.pocket_rewards(**weights, like=liked_scenes(options.like))


def try_rewards(rewards, wan) -> None:
    """Scores one clip of noise: what is missing in a reward model's environment shows now, not after an hour."""
    say("rewards: one clip of noise, to see that they answer")
    clip = torch.rand(1, 9, 3, wan.height, wan.width, generator=torch.Generator().manual_seed(0))
    rewards(clip, ["a red disc moves left"])


def check_positions(pipeline, num_frames: int) -> None:
    """Raises ValueError when the model has no positions for so many frames, before the first one is made."""
    most = len(pipeline.backbone.transformer.rope.freqs_cos)
    if num_frames > most:
        raise ValueError(f"num_frames must be at most {most} with {pipeline.name}, got {num_frames}")
