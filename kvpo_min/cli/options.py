"""Options of the commands: the fields of dataclasses, read by jsonargparse from flags and from a YAML file (`--config`,
`--print_config`). An unknown name is an error that names the nearest known one."""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
import os
import re
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpo_min.config import check_seed, check_weights, is_open, nearest_known

POSITIONAL = "script"  # the one option that is given without a flag
COMMANDS = {
    "demo": "Aligns the embedded model in a few minutes: before and after, videos, curves and a LoRA adapter.",
    "train": "A run of your own: the same engine with your prompts, length and reward.",
    "sample": "Makes videos: an mp4 and a contact sheet a script.",
    "eval": "Measures a model or an adapter on a prompts file: rewards, standard errors, judge.",
    "export": "Writes an adapter for other programs: diffusers, peft or the authors' layout.",
    "distill": "Makes the pocket model from nothing: autoencoder, teacher, 4-step student.",
    "arena": "Compares KVPO with other methods at equal cost: one row of a CSV for each measurement.",
    "bench": "Times one update against a plain one and its floor, if their numbers agree.",
    "doctor": "Runs one update and prints every invariant with PASS or FAIL and the usual cause.",
    "parity": "Compares this code with numbers recorded from the authors': the largest differences.",
}


def check_taste(like: str) -> None:
    """Raises ValueError for scenes that the pocket world does not have."""
    from kvpo_min.pocket.world import liked_scenes  # here, so that --help need not wait for torch

    liked_scenes(like)


@dataclass(frozen=True)
class RunOptions:
    """Data, reward and bookkeeping of a run"""

    prompts: str = ""  # file with one training script a line; empty: 256 scripts drawn with the run's seed
    event: str = ""  # words that every drawn script must hold, such as 'settles', where memory decides what comes
    eval_prompts: int = 64  # held-out scripts, measured before and after: drawn, or of a real model's file the last
    eval_every: int = 0  # updates between measurements of the first 16 of them, the held-out curve; 0: none
    like: str = "beach,meadow,forest"  # scenes of the pocket world that visual quality prefers, commas between
    vq: float = 1.0  # weight of visual quality in the reward
    mq: float = 1.0  # weight of motion quality
    ta: float = 1.0  # weight of text alignment
    model: str = ""  # folder that `kvpo-min distill` left, or a real Wan (folder, file, Hub); empty: the embedded model
    report_to: str = "none"  # none or tensorboard; metrics.jsonl is always written
    overwrite_output_dir: bool = False  # replace the files of an earlier run in output_dir

    def __post_init__(self):
        if self.eval_prompts < 1 or self.eval_every < 0:
            raise ValueError(
                "eval_prompts must be at least 1 and eval_every 0 or more, got "
                f"{self.eval_prompts} and {self.eval_every}"
            )
        check_taste(self.like)
        if self.report_to not in ("none", "tensorboard"):
            raise ValueError(f"report_to must be none or tensorboard, got {self.report_to!r}")
        check_weights(self.vq, self.mq, self.ta)


@dataclass(frozen=True)
class SampleOptions:
    """Makes one video a script"""

    script: str = ""  # the words, segments separated by " | ", for example "a red disc moves left | it turns blue"
    prompts: str = ""  # file with one script a line, instead of the words
    adapter: str = ""  # folder of a trained adapter, such as the output_dir of a run; empty: none
    num_frames: int = 0  # length of the videos; 0: 39 for one segment, and 75, 111, 147 for two, three, four
    seed: int = 99999  # of the noise
    output_dir: str = "kvpo_samples"
    model: str = ""  # folder with autoencoder/ and student/, or a real Wan; empty: the embedded model
    overwrite_output_dir: bool = False  # replace the files of an earlier call in output_dir

    def __post_init__(self):
        if bool(self.script.strip()) == bool(self.prompts):
            raise ValueError("give either a script in quotes, or --prompts FILE")
        check_seed(self.seed)


@dataclass(frozen=True)
class EvalOptions:
    """Measures a model, with or without an adapter, on a prompts file"""

    prompts: str = ""  # file with one script a line, all with the same number of segments
    json: str = ""  # file that the result is written to
    adapter: str = ""  # folder of a trained adapter; empty: none
    num_frames: int = 0  # length of the videos; 0: 39 for one segment, and 75, 111, 147 for two, three, four
    seed: int = 99999  # of the noise
    vq: float = 1.0  # weight of visual quality in the reward
    mq: float = 1.0  # weight of motion quality
    ta: float = 1.0  # weight of text alignment
    like: str = "beach,meadow,forest"  # scenes of the pocket world that visual quality prefers, commas between
    model: str = ""  # folder with autoencoder/ and student/, or a real Wan; empty: the embedded model

    def __post_init__(self):
        for name in ("prompts", "json"):
            if not getattr(self, name):
                raise ValueError(f"--{name} FILE is required")
        check_weights(self.vq, self.mq, self.ta)
        check_taste(self.like)
        check_seed(self.seed)


@dataclass(frozen=True)
class ExportOptions:
    """Writes a trained adapter for other programs"""

    adapter: str = ""  # folder of a trained adapter, such as the output_dir of a run
    layout: str = "diffusers"  # diffusers (WanPipeline.load_lora_weights), peft, or authors (their lora.pt)
    lora_alpha: float = 0.0  # the adapter's alpha; 0: the one that is written with it, else its rank
    lora: str = ""  # the released LoRA that the run had merged: both in one, for programs that load only one
    merged_alpha: float = 0.0  # that LoRA's alpha, likewise
    output_dir: str = "kvpo_export"

    def __post_init__(self):
        if not self.adapter:
            raise ValueError("--adapter FOLDER is required")
        if min(self.lora_alpha, self.merged_alpha) < 0:
            raise ValueError(
                f"lora_alpha and merged_alpha must be 0 (as it is written) or more, got {self.lora_alpha} and "
                f"{self.merged_alpha}"
            )
        if self.layout not in ("diffusers", "peft", "authors"):
            raise ValueError(f"layout must be diffusers, peft or authors, got {self.layout!r}")


def field_comments(config_class: type) -> dict[str, str]:
    """The comment beside each field of a dataclass: the help of its flag, written once."""
    comments, name = {}, ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(config_class)).readline):
        if token.type == tokenize.NAME and token.start[1] == 4:  # the first word of a line in the class's body
            name = token.string
        elif token.type == tokenize.COMMENT and token.start[1] > 4:
            comments[name] = token.string.lstrip("# ")
    return comments


def parse_options(command: str, classes: Sequence[type], argv: Sequence[str], defaults: Mapping | None = None) -> dict:
    """Flags and YAML -> {name: value} for all fields of `classes`; `defaults` replace those of the fields.
    Raises ValueError naming an option that is unknown or has a bad value."""
    import argparse
    import typing

    from jsonargparse import ArgumentParser

    summary = COMMANDS[command]
    parser = ArgumentParser(prog=f"kvpo-min {command}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; flags win over it")
    kinds, defaults = {}, defaults or {}
    for config_class in classes:
        group = parser.add_argument_group(config_class.__doc__.split(".")[0].strip())
        hints, comments = typing.get_type_hints(config_class), field_comments(config_class)
        for field in dataclasses.fields(config_class):
            kinds[field.name] = hints[field.name] | None if is_open(field) else hints[field.name]
            kind = {"action": "store_true"} if hints[field.name] is bool else {"type": kinds[field.name]}
            flag = f"--{field.name}"
            if field.name == POSITIONAL:
                flag, kind["nargs"] = field.name, "?"
            default = defaults.get(field.name, field.default)
            text = comments.get(field.name, field.name.replace("_", " "))  # without a text, no default would be shown
            if is_open(field):
                ours, theirs = field.metadata["ours"], field.metadata["official"]
                text += f" [null: {ours}, or {theirs} with compat official]"
            group.add_argument(flag, default=default, help=text, **kind)
    known = list(kinds)
    flags = [name for name in known if name != POSITIONAL]
    for token in argv:
        name = token.split("=")[0].removeprefix("--")
        if token.startswith("--") and name not in (*flags, "config", "print_config", "help"):
            raise ValueError(f"unknown flag --{name}{nearest_known(name, flags)}")
    files, rest = split_config(argv)
    files = map(os.path.expanduser, files)
    files = [f"--config={path}" for path in files if check_yaml(path, known)]  # jsonargparse refuses an empty one
    try:
        values = parser.parse_args([*files, *rest])  # of two values it takes the later: flags win wherever they stand
    except argparse.ArgumentError as error:
        message = re.sub(r"<class '(\w+)'>", r"\1", str(error))
        raise ValueError(re.sub(r'^Parser key "(\w+)":', r"--\1:", message)) from None
    for name, kind in kinds.items():  # a YAML file may say null, and anything at all for a flag without a value
        if not isinstance(values[name], kind):
            raise ValueError(f"--{name}: expected a {getattr(kind, '__name__', kind)}, got {values[name]!r}")
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            raise ValueError(f"--{name}: expected a finite number, got {values[name]}")
    return {name: values[name] if name == POSITIONAL else expanded(name, values[name]) for name in known}


def expanded(name: str, value):
    """Every option that begins with ~ is a path in a home folder."""
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"--{name}: there is no home folder {value.split('/')[0]}; for a file of that name: ./{value}")
    return path


def split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that --config names, and the other tokens."""
    files = []
    rest = []
    tokens = iter(argv)
    for token in tokens:
        if token.startswith("--config="):
            files.append(token.removeprefix("--config="))
        elif token == "--config" and (path := next(tokens, None)) is not None:
            files.append(path)
        else:
            rest.append(token)
    return files, rest


def flags_of(argv: Sequence[str]) -> set[str]:
    """Names of the options that were given as flags."""
    return {token.split("=")[0].removeprefix("--") for token in argv if token.startswith("--")}


def check_yaml(path: str, known: Sequence[str]) -> dict:
    """What a config file holds. Refuses one that is missing, not a YAML mapping, or with a key that nobody reads."""
    from kvpo_min.system import read_yaml

    content = read_yaml(Path(path))
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise ValueError(f"{path}: unknown key '{unknown[0]}'{nearest_known(unknown[0], known)}")
    return content


def split_options(values: Mapping, *classes: type) -> list:
    """{name: value} -> one instance of each dataclass."""
    return [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in classes]


def all_options(*parts) -> dict:
    """{name: value} of several dataclasses; None is left out."""
    return {name: value for part in parts if part for name, value in dataclasses.asdict(part).items()}
