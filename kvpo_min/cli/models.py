"""The model, prompts and rewards that the options name: a pocket model, or a real Wan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kvpo_min import pocket
from kvpo_min.cli.options import flags_of
from kvpo_min.pocket.world import liked_scenes
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


def run_rewards(options, wan=None):
    """What the videos are scored with: formulas on the pocket world, or the models that `wan` names. `options`: the
    weights vq, mq and ta, and the taste `like`."""
    weights = {"vq": options.vq, "mq": options.mq, "ta": options.ta}
    if wan and options.like != type(options).like:
        raise ValueError(f"like names scenes of the pocket world, and {options.model} is no pocket model: leave it out")
    if wan:
        return real.load_rewards(wan, **weights)
    return pocket.pocket_rewards(**weights, like=liked_scenes(options.like))
