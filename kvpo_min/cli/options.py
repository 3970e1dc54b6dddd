"""Options of the commands: the fields of dataclasses, read from flags and from a YAML file (`--config`,
`--print_config`). An unknown name is an error that names the nearest known one."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from kvpo_min.config import SEEDS, check_weights, is_open, knob, nearest_known, settle

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

    prompts: str = knob("", "file with one training script a line; empty: 256 scripts drawn with the run's seed")
    event: str = knob("", "words that every drawn script must hold, such as 'settles', where memory decides what comes")
    eval_prompts: int = knob(
        64, "held-out scripts, measured before and after; of a real model's file the last ones", least=1
    )
    eval_every: int = knob(0, "updates between measurements of the first 16 of them, the curve; 0: none", least=0)
    like: str = knob(
        "beach,meadow,forest", "scenes that visual quality prefers (pocket model), commas between, or a side"
    )
    vq: float = knob(1.0, "weight of visual quality in the reward")
    mq: float = knob(1.0, "weight of motion quality")
    ta: float = knob(1.0, "weight of text alignment")
    model: str = knob("", "folder that `kvpo-min distill` left, or a real Wan (folder, file, Hub); empty: embedded")
    processes: int = knob(1, "that share an update's groups on a CPU, a thread each; 0: by cores and groups", least=0)
    report_to: str = knob("none", "what else than metrics.jsonl is written", of=("none", "tensorboard"))
    overwrite_output_dir: bool = knob(False, "replace the files of an earlier run in output_dir")

    def __post_init__(self):
        settle(self)
        check_taste(self.like)
        check_weights(self.vq, self.mq, self.ta)


@dataclass(frozen=True)
class SampleOptions:
    """Makes one video a script"""

    script: str = knob("", 'the words, segments separated by " | ", such as "a red disc moves left | it turns blue"')
    prompts: str = knob("", "file with one script a line, instead of the words")
    adapter: str = knob("", "folder of a trained adapter, such as the output_dir of a run; empty: none")
    num_frames: int = knob(0, "length of the videos; 0: 39 for one segment, and 75, 111, 147 for two, three, four")
    seed: int = knob(99999, "of the noise", **SEEDS)
    output_dir: str = "kvpo_samples"
    model: str = knob("", "folder with autoencoder/ and student/, or a real Wan; empty: the embedded model")
    overwrite_output_dir: bool = knob(False, "replace the files of an earlier call in output_dir")

    def __post_init__(self):
        if bool(self.script.strip()) == bool(self.prompts):
            raise ValueError("give either a script in quotes, or --prompts FILE")
        settle(self)


@dataclass(frozen=True)
class EvalOptions:
    """Measures a model, with or without an adapter, on a prompts file"""

    prompts: str = knob("", "file with one script a line, all with the same number of segments")
    json: str = knob("", "file that the result is written to")
    adapter: str = knob("", "folder of a trained adapter; empty: none")
    num_frames: int = knob(0, "length of the videos; 0: 39 for one segment, and 75, 111, 147 for two, three, four")
    seed: int = knob(99999, "of the noise", **SEEDS)
    vq: float = knob(1.0, "weight of visual quality in the reward")
    mq: float = knob(1.0, "weight of motion quality")
    ta: float = knob(1.0, "weight of text alignment")
    like: str = knob(
        "beach,meadow,forest", "scenes that visual quality prefers (pocket model), commas between, or a side"
    )
    model: str = knob("", "folder with autoencoder/ and student/, or a real Wan; empty: the embedded model")

    def __post_init__(self):
        for name in ("prompts", "json"):
            if not getattr(self, name):
                raise ValueError(f"--{name} FILE is required")
        check_weights(self.vq, self.mq, self.ta)
        check_taste(self.like)
        settle(self)


@dataclass(frozen=True)
class ExportOptions:
    """Writes a trained adapter for other programs"""

    adapter: str = knob("", "folder of a trained adapter, such as the output_dir of a run")
    layout: str = knob("diffusers", "diffusers: for WanPipeline; authors: lora.pt", of=("diffusers", "peft", "authors"))
    lora_alpha: float = knob(0.0, "the adapter's alpha; 0: the one that is written with it, else its rank", least=0)
    lora: str = knob("", "the released LoRA that the run had merged: both in one, for programs that load only one")
    merged_alpha: float = knob(0.0, "that LoRA's alpha, likewise", least=0)
    output_dir: str = "kvpo_export"

    def __post_init__(self):
        if not self.adapter:
            raise ValueError("--adapter FOLDER is required")
        if self.merged_alpha and not self.lora:
            raise ValueError("merged_alpha is that of --lora: give both, or leave it out")
        settle(self)


class Parser(argparse.ArgumentParser):
    """Says what is wrong instead of ending the process."""

    def error(self, message: str):
        raise ValueError(message)


def parse_options(command: str, classes: Sequence[type], argv: Sequence[str], defaults: Mapping | None = None) -> list:
    """Flags and YAML -> an instance of each of `classes`; `defaults` replace those of their fields. Raises ValueError
    naming an option that is unknown or has a bad value."""
    parser = Parser(prog=f"kvpo-min {command}", description=COMMANDS[command], allow_abbrev=False)
    files = "YAML file with any of the options below; flags win over it"
    parser.add_argument("--config", action="append", metavar="FILE", default=[], help=files)
    parser.add_argument("--print_config", action="store_true", help="print all options as such a file, and stop")
    fields, kinds, values = {}, {}, {}
    for config_class in classes:
        group = parser.add_argument_group(config_class.__doc__.split(".")[0].strip())
        kinds |= typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            fields[field.name] = field
            values[field.name] = (defaults or {}).get(field.name, field.default)
            default = values[field.name]
            if is_open(field):
                default = "{ours}, or {official} with compat official".format(**field.metadata)
            text = f"{field.metadata.get('help', '')} (default: {default})"
            how = {"action": "store_true"} if kinds[field.name] is bool else {"metavar": kinds[field.name].__name__}
            flag = f"--{field.name}"
            if field.name == POSITIONAL:
                flag, how["nargs"] = field.name, "?"
            group.add_argument(flag, default=argparse.SUPPRESS, help=text.strip().replace("%", "%%"), **how)
    given, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].split("=")[0]
        flags = [flag for flag in fields if flag != POSITIONAL]
        raise ValueError(f"unknown flag {name}{nearest_known(name.removeprefix('--'), flags)}")
    found = vars(given)
    files, print_config = found.pop("config"), found.pop("print_config")
    for name, value in [
        *(pair for path in map(os.path.expanduser, files) for pair in check_yaml(path, list(fields)).items()),
        *found.items(),
    ]:
        values[name] = value if value is None and is_open(fields[name]) else read_value(name, kinds[name], value)
    if print_config:
        stream = getattr(sys.stdout, "stream", sys.stdout)  # not the patient one: this is all there is of the result
        with contextlib.suppress(BrokenPipeError):
            print(yaml.safe_dump(values, sort_keys=False), end="", file=stream, flush=True)
        sys.exit(0)
    return [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in classes]


def read_value(name: str, kind: type, value) -> object:
    """What a flag's text, or the value in a YAML file, is as a `kind`. Raises ValueError naming the option."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if type(value) is kind and kind is not float:
        return expanded(name, value)
    try:
        if kind is int and isinstance(value, str):
            return int(value)
        if kind is float and (number or isinstance(value, str)) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    what = "finite float" if kind is float else kind.__name__
    raise ValueError(f"--{name}: expected {what}, got {value!r}")


def expanded(name: str, value):
    """Every option that begins with ~, or with a variable of the environment, is a path, but for the words of a script.
    Refuses an output folder without a name, and bytes that are no letters."""
    if not isinstance(value, str) or name == POSITIONAL:
        return value
    if name == "output_dir" and not value.strip():
        raise ValueError("--output_dir: expected the name of a folder, got nothing")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--{name}: expected letters in UTF-8, got {value!r}") from None
    path = os.path.expandvars(value) if value.startswith("$") else value
    if path.startswith("$"):
        raise ValueError(f"--{name}: there is no such variable, got {value!r}; for a file of that name: ./{value}")
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError(f"--{name}: there is no home folder {value.split('/')[0]}; for a file of that name: ./{value}")
    return path


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


def all_options(*parts) -> dict:
    """{name: value} of several dataclasses; None is left out."""
    return {name: value for part in parts if part for name, value in dataclasses.asdict(part).items()}
