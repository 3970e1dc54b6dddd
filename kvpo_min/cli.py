"""The command line: `kvpo-min demo | train | sample | eval | export | distill | arena | bench | doctor | parity`. Each
command is one function below.

Options are the fields of dataclasses (`TrainConfig` and the ones here), read by jsonargparse from flags and from a
YAML file (`--config FILE`, `--print_config`). An unknown name is an error that names the nearest known one. What the
user can mend (words, values, files, folders) ends with one line on stderr and exit code 2, before anything is written.
Exit codes: 0 done, 1 a check or an update failed, 2 wrong input or a full disk, 130 interrupted (Ctrl-C or SIGTERM).
Heavy imports stay inside functions, so that `kvpo-min --help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVAL_SEED = 1_000_000  # of the held-out prompts; the same for every run, so that runs can be compared
SHOWN = 4  # evaluation prompts whose videos are kept
REAL_FPS = 4  # frames a second that a real model's pipeline decodes; the pocket model's are shown at 8
POSITIONAL = "script"  # the one option that is given without a flag
INTERRUPTED = "interrupted"
NOT_IN_CONFIG = ("overwrite_output_dir", "resume_from_checkpoint")  # how a run was started, not what it is
MAY_CHANGE_ON_RESUME = (
    "output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "branch_batch", "replay_batch", "eval_prompts", "report_to", "overwrite_output_dir", "device",
    "gradient_checkpointing", "vq_model", "mq_model", "ta_model",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- options


@dataclass
class RunOptions:
    """Data, reward and bookkeeping of a run"""

    prompts: str = ""  # file with one training script a line; empty: 256 scripts drawn with the run's seed
    event: str = ""  # words that every drawn script must hold, such as 'changes colour', which leaves a colour open
    eval_prompts: int = 32  # held-out scripts, measured before and after: drawn, or of a real model's file the last
    vq: float = 1.0  # weight of visual quality in the reward
    mq: float = 1.0  # weight of motion quality
    ta: float = 1.0  # weight of text alignment
    model: str = ""  # folder that `kvpo-min distill` left, or a real Wan (folder, file, Hub); empty: the embedded model
    report_to: str = "none"  # none or tensorboard; metrics.jsonl is always written
    overwrite_output_dir: bool = False  # replace the files of an earlier run in output_dir

    def __post_init__(self):
        if self.eval_prompts < 1:
            raise ValueError(f"eval_prompts must be at least 1, got {self.eval_prompts}")
        if self.report_to not in ("none", "tensorboard"):
            raise ValueError(f"report_to must be none or tensorboard, got {self.report_to!r}")
        check_weights(self.vq, self.mq, self.ta)


@dataclass
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


@dataclass
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
    model: str = ""  # folder with autoencoder/ and student/, or a real Wan; empty: the embedded model

    def __post_init__(self):
        for name in ("prompts", "json"):
            if not getattr(self, name):
                raise ValueError(f"--{name} FILE is required")
        check_weights(self.vq, self.mq, self.ta)
        check_seed(self.seed)


@dataclass
class ExportOptions:
    """Writes a trained adapter for other programs"""

    adapter: str = ""  # folder of a trained adapter, such as the output_dir of a run
    layout: str = "diffusers"  # diffusers (WanPipeline.load_lora_weights), peft, or authors (their lora.pt)
    lora: str = ""  # the released LoRA that the run had merged: both in one, for programs that load only one
    output_dir: str = "kvpo_export"

    def __post_init__(self):
        if not self.adapter:
            raise ValueError("--adapter FOLDER is required")
        if self.layout not in ("diffusers", "peft", "authors"):
            raise ValueError(f"layout must be diffusers, peft or authors, got {self.layout!r}")


@dataclass
class ArenaOptions:
    """Compares methods on one model, at equal cost"""

    csv: str = ""  # file that every measurement is appended to; what is in it is not computed again
    methods: str = "main"  # names with commas between: kvpo, rwr, routing+distance, ...; or main, grid
    seeds: str = "0,1,2"  # that are reported; "": sweep the learning rates and stop
    learning_rates: str = "1e-4,3e-4,1e-3"  # swept on sweep_seed; a single one is taken as it is
    sweep_seed: int = 100  # on which each method's learning rate is chosen; never reported
    forwards: int = 40000  # budget of a run: forward passes of the generator
    evaluations: int = 3  # of a run, evenly spaced, the last when the budget is spent
    mode: str = "short"  # short: 39 frames, one prompt; long: 147 frames, four prompts
    event: str = ""  # words that every script must hold, such as 'changes colour'
    eval_prompts: int = 256  # held-out scripts; with 64 the noise they are drawn with is worth as much as a gain
    set: str = ""  # other settings of the methods, for ablations: name=value with commas between
    vq: float = 1.0  # weight of visual quality in the reward
    mq: float = 1.0  # weight of motion quality
    ta: float = 1.0  # weight of text alignment
    model: str = ""  # folder with autoencoder/ and student/; empty: the embedded model
    plan: bool = False  # measure one update of each method, print what would be run and how long it takes, and stop

    def __post_init__(self):
        if not self.csv:
            raise ValueError("--csv FILE is required")
        if self.mode not in ("short", "long"):
            raise ValueError(f"mode must be short or long, got {self.mode!r}")
        if self.eval_prompts < 2:
            raise ValueError(f"eval_prompts must be at least 2, for a standard error, got {self.eval_prompts}")
        if not 1 <= self.evaluations <= self.forwards:
            raise ValueError(f"evaluations must be 1 to forwards, got {self.evaluations} and {self.forwards}")
        check_weights(self.vq, self.mq, self.ta)
        check_seed(self.sweep_seed, "sweep_seed")


@dataclass
class BenchOptions:
    """Times one update against a plain one"""

    json: str = ""  # file that the result is written to; empty: it is only printed
    pairs: int = 5  # how often each is timed, one after the other; medians are reported
    scaling: bool = False  # instead: how time grows with branches, blocks and history, and the memory of a long stream
    num_frames: int = 39  # 39 for the short mode, 147 for the long one
    num_segments: int = 1
    num_generations: int = 8  # branches
    perturb_num_blocks: int = 5  # routed blocks after the fork
    seed: int = 0
    model: str = ""  # folder with autoencoder/ and student/; empty: the embedded model

    def __post_init__(self):
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}")


@dataclass
class DoctorOptions:
    """Runs one update and checks every invariant"""

    output_dir: str = ""  # folder of a finished run, whose files are checked as well; empty: none
    model: str = ""  # folder with autoencoder/ and student/; empty: the embedded model
    seed: int = 0
    num_frames: int = 39  # 39 for the short mode, 147 for the long one
    num_segments: int = 1
    num_generations: int = 8  # branches
    perturb_num_blocks: int = 5  # routed blocks after the fork
    rank: int = 16  # of the LoRA


def check_weights(*weights: float) -> None:
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"the weights vq, mq, ta must be 0 or more and not all 0, got {', '.join(map(str, weights))}")


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuses what torch's generators do not take, before any work."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name} must lie in -2**63 .. 2**63 - 1, got {seed}")


def field_comments(config_class: type) -> dict[str, str]:
    """The comment beside each field of a dataclass: the help of its flag, written once."""
    import inspect

    return dict(re.findall(r"^    (\w+): [^#\n]+#\s*(.+)$", inspect.getsource(config_class), re.MULTILINE))


def nearest_known(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else f"; known: {', '.join(known)}"


def parse_options(command: str, classes: Sequence[type], argv: Sequence[str], defaults: Mapping | None = None) -> dict:
    """Flags and YAML -> {name: value} for all fields of `classes`; `defaults` replace those of the fields.
    Raises ValueError naming an option that is unknown or has a bad value."""
    import argparse
    import typing

    from jsonargparse import ArgumentParser

    summary = COMMANDS[command][1]
    parser = ArgumentParser(prog=f"kvpo-min {command}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; flags win over it")
    kinds, defaults = {}, defaults or {}
    for config_class in classes:
        group = parser.add_argument_group(config_class.__doc__.split(".")[0].strip())
        hints, comments = typing.get_type_hints(config_class), field_comments(config_class)
        for field in dataclasses.fields(config_class):
            kinds[field.name] = hints[field.name]
            kind = {"action": "store_true"} if hints[field.name] is bool else {"type": hints[field.name]}
            flag = f"--{field.name}"
            if field.name == POSITIONAL:
                flag, kind["nargs"] = field.name, "?"
            default = defaults.get(field.name, field.default)
            text = comments.get(field.name, field.name.replace("_", " "))  # without a text, no default would be shown
            group.add_argument(flag, default=default, help=text, **kind)
    known = list(kinds)
    flags = [name for name in known if name != POSITIONAL]
    for token in argv:
        name = token.split("=")[0].removeprefix("--")
        if token.startswith("--") and name not in (*flags, "config", "print_config", "help"):
            raise ValueError(f"unknown flag --{name}{nearest_known(name, flags)}")
    files, rest = split_config(argv)
    files = [f"--config={path}" for path in files if check_yaml(path, known)]  # jsonargparse refuses an empty one
    try:
        values = parser.parse_args([*files, *rest])  # of two values it takes the later: flags win wherever they stand
    except argparse.ArgumentError as error:
        message = re.sub(r"<class '(\w+)'>", r"\1", str(error))
        raise ValueError(re.sub(r'^Parser key "(\w+)":', r"--\1:", message)) from None
    for name, kind in kinds.items():  # a YAML file may say null, and anything at all for a flag without a value
        if not isinstance(values[name], kind):
            raise ValueError(f"--{name}: expected a {kind.__name__}, got {values[name]!r}")
        if kind is float and not math.isfinite(values[name]):
            raise ValueError(f"--{name}: expected a finite number, got {values[name]}")
    return {name: values[name] for name in known}


def split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that --config names, and the other tokens."""
    files, rest, tokens = [], [], iter(argv)
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


def check_official(values: Mapping, kind: type, given: Container[str] = ()) -> None:
    """Refuses an option beside compat that compat replaces. kind: the class of the configuration; given: names of what
    was given in so many words, which otherwise, as it is by default, cannot be told from not given."""
    ours, theirs = (vars(kind(compat=compat)) for compat in ("", values["compat"]))
    for name, value in theirs.items():
        said = name in given or values[name] != ours[name]
        if name != "compat" and value != ours[name] and said and values[name] != value:
            raise ValueError(
                f"{name} is {value} with compat {values['compat']}, got {values[name]}: leave one of them out"
            )


def check_yaml(path: str, known: Sequence[str]) -> dict:
    """What a config file holds. Refuses one that is missing, not a YAML mapping, or with a key that nobody reads."""
    content = read_yaml(Path(path))
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise ValueError(f"{path}: unknown key '{unknown[0]}'{nearest_known(unknown[0], known)}")
    return content


def read_yaml(path: Path) -> dict:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except Exception as error:  # malformed dates, tags and nesting raise nearly anything
        raise ValueError(f"{path} is not YAML: {error or type(error).__name__}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold lines like 'seed: 0', got a {type(content).__name__}")
    keys = [key.value for key, _ in tree.value]  # of a key that is there twice, YAML would take the last
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{path}: the key '{twice[0]}' is there twice; keep one")
    return content


def split_options(values: Mapping, *classes: type) -> list:
    """{name: value} -> one instance of each dataclass."""
    return [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in classes]


# --------------------------------------------------------------------------------------------------- models and prompts


def is_pocket(model: str) -> bool:
    """Whether this is a pocket model: the embedded one, or a folder in its layout. All else is a real Wan."""
    return not model or any((Path(model) / part).is_dir() for part in ("autoencoder", "student"))


def load_real(model: str, scripts: Sequence[str], prompts: str | Path, wan):
    """The pipeline of a real Wan that can be asked for these scripts, whose encodings are kept beside `prompts`."""
    from diffusers.utils import logging

    from kvpo_min.real import BETWEEN, load_wan, text_cache

    logging.set_verbosity_error()
    texts = [text for script in scripts for text in script.split(BETWEEN)]
    return load_wan(model, list(dict.fromkeys(texts)), text_cache(prompts), wan)


def load_model(folder: str):
    """The embedded student, or the one in `folder`. Raises FileNotFoundError or ValueError naming the folder."""
    from diffusers.utils import logging
    from safetensors import SafetensorError

    from kvpo_min.pocket import load_pocket

    logging.set_verbosity_error()  # AutoencoderTiny warns of a key that it wrote itself
    try:
        return load_pocket(folder=folder or None)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder or 'the embedded weights'} cannot be loaded as a model: {error}") from error


def load_adapter(pipeline, folder: str | Path):
    """Puts a saved LoRA on the pipeline's transformer, ready to sample. -> the peft model

    Raises FileNotFoundError when a file is missing and ValueError when it is damaged, no LoRA, or made for another
    model; the pipeline is then as it was."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder, transformer = Path(folder), pipeline.backbone.transformer
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not an adapter: it has no {name}")
    if any("lora_" in name for name, _ in transformer.named_parameters()):
        raise ValueError("the model has an adapter already: load it again before you load another")
    try:
        if json.loads((folder / "adapter_config.json").read_text())["peft_type"] != "LORA":
            raise ValueError("peft_type is not LORA")
        config = LoraConfig.from_pretrained(folder)
        config.base_model_name_or_path = None  # a note for readers; peft would compare it with the base's path
        saved = load_file(folder / "adapter_model.safetensors")
    except Exception as error:  # JSON, safetensors and peft have kinds of their own
        raise ValueError(f"{folder}: the adapter is damaged or not a LoRA: {error or type(error).__name__}") from None
    if broken := [key for key, weight in saved.items() if not weight.float().isfinite().all()]:
        raise ValueError(f"{folder}: the adapter's {broken[0]} holds numbers that are not finite")
    try:
        with torch.device("meta"):  # first on a model without weights: what fails half-way would leave its layers
            trial = get_peft_model(type(transformer).from_config(transformer.config), copy.deepcopy(config))
    except Exception as error:  # peft found none of the layers, or cannot use what the config says
        raise ValueError(f"{folder}: the adapter was made for another model: {error or type(error).__name__}") from None
    wanted = get_peft_model_state_dict(trial, save_embedding_layers=False)
    wrong = [key for key in sorted({*wanted, *saved}) if not same_shape(wanted.get(key), saved.get(key))]
    if wrong:
        raise ValueError(
            f"{folder}: the adapter was made for another model, or is incomplete: {len(wrong)} of its tensors do not "
            f"fit, the first is {wrong[0]}"
        )
    policies = get_peft_model(transformer, config)
    set_peft_model_state_dict(policies, saved)
    return policies.requires_grad_(False).eval()


def same_shape(a, b) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def read_scripts(path: str) -> list[str]:
    """The scripts of a prompts file. Raises PromptError naming a bad line, FileNotFoundError or ValueError."""
    from kvpo_min.pocket.world import read_prompts

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no prompts file {path}")
    try:
        return read_prompts(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None


def count_segments(scripts: Sequence[str], real: bool = False) -> int:
    """How many segments each script has. Raises ValueError when they differ or are more than can be told."""
    from kvpo_min.pocket.world import SWITCHES, parse

    counts = {len(script.split(" | ") if real else parse(script)): script for script in reversed(scripts)}
    if len(counts) > 1:
        examples = "; ".join(f"{n}: '{script}'" for n, script in sorted(counts.items()))
        raise ValueError(f"all scripts must have the same number of segments, got {examples}")
    (n, script), *_ = counts.items()
    if n > len(SWITCHES) + 1:
        raise ValueError(f"a script has at most {len(SWITCHES) + 1} segments, got {n}: '{script}'")
    return n


def video_length(num_frames: int, n_segments: int) -> int:
    """`num_frames`, or for 0 the usual length for that many segments. Raises ValueError as `check_length` does."""
    from kvpo_min.pocket.world import SWITCHES

    length = num_frames or (*SWITCHES, 147)[n_segments - 1]
    check_length(length, n_segments)
    return length


def check_length(num_frames: int, n_segments: int) -> None:
    """Raises ValueError when `num_frames` are no whole blocks, or when the last segment would never be shown."""
    from kvpo_min.pocket.world import SWITCHES

    if num_frames < 3 or num_frames % 3:
        raise ValueError(f"num_frames must be a multiple of 3 (frames are made in blocks of 3), got {num_frames}")
    begins = (0, *SWITCHES)[n_segments - 1]
    if num_frames <= begins:
        raise ValueError(f"num_frames must be above {begins}, where segment {n_segments} begins, got {num_frames}")


def check_positions(pipeline, num_frames: int) -> None:
    """Raises ValueError when the model has no positions for so many frames, before the first one is made."""
    most = len(pipeline.backbone.transformer.rope.freqs_cos)
    if num_frames > most:
        raise ValueError(f"num_frames must be at most {most} with {pipeline.name}, got {num_frames}")


# -------------------------------------------------------------------------------------------------------------- folders


def check_folder(folder: Path, overwrite: bool, how: str = ", or give --overwrite_output_dir") -> None:
    """Refuses an output folder that holds something, unless it may be overwritten."""
    check_parents(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; name another --output_dir{how}")


def check_writable(folder: Path) -> None:
    """Makes the folder and writes into it. Raises OSError now rather than after the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "probe.aside"
        probe.write_bytes(b"kvpo")
        probe.unlink()
    except OSError as error:
        what_to_do = "free space, or name another --output_dir"
        raise OSError(f"{folder} cannot be written to: {error.strerror}; {what_to_do}") from error


def check_parents(path: Path) -> None:
    """Refuses a path below a file, which could not be made."""
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above and not above.is_dir():
        raise NotADirectoryError(f"{above} is a file, so {path} cannot be made; name another place")


def check_file(path: Path) -> None:
    """Raises OSError for a file that could not be written, before the work whose results it is to hold."""
    check_parents(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, name a file")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there} cannot be written to; name another place")


def clear_run(folder: Path) -> None:
    """Deletes what an earlier run left, by name; anything else in the folder stays."""
    import shutil

    from kvpo_min.train import checkpoints, discard

    patterns = (
        "config.yaml", "metrics.jsonl", "summary.json", "README.md", "adapter_config.json", "adapter_model.safetensors",
        "videos/*.mp4", "videos/*.png", "figures/*.png", "runs/events.*",
    )  # fmt: skip
    for path in [path for pattern in (*patterns, *(f"{p}.aside" for p in patterns)) for path in folder.glob(pattern)]:
        path.unlink()
    for step in checkpoints(folder):
        discard(folder / f"checkpoint-{step}")
    for left in (*folder.glob("checkpoint-*.aside"), folder / "adapter.aside"):
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes aside and renames, so that a file is either the old or the new one. Raises OSError naming it."""
    from kvpo_min.train import writing

    with writing(path.with_name(path.name + ".aside")) as aside:
        aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def finite(content):
    """JSON knows no nan: numbers that do not exist (the motion of prompts that name none) become null."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl. Raises ValueError naming a line that is no record of an update."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            lines.append(json.loads(line))
            lines[-1]["step"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: expected the JSON of an update, got {line[:60]!r} ({error})"
            ) from None
    return lines


# ----------------------------------------------------------------------------------------------------------------- runs


def run(config, options: RunOptions, wan=None) -> int:
    """One training run with its evaluation, and the folder it leaves behind (`demo` and `train`). `wan`: the options of
    a real model. Under torchrun all processes train, and the first one alone evaluates and writes. -> exit code"""
    begun = time.perf_counter()
    from kvpo_min.train import add_policies, check_share, join_processes, processes, told_by_all, train, uninterrupted

    if wan and wan.bank_size and config.compat:  # videos are evaluated with the bank that they are trained with
        wan = dataclasses.replace(wan, bank_compat=config.compat)
    join_processes()
    rank, _ = processes()
    scripts, held_out = real_prompts(config, options) if wan else run_prompts(config, options)
    check_geometry(config)
    check_share(config)
    if rank == 0:
        check_output(config, options, wan)
    report = reporter(config, options)  # before any work: its package may be missing
    rewards = run_rewards(options, wan)
    if wan and rank == 0:
        try_rewards(rewards, wan)
    if rank:
        told_by_all("")  # the first process encodes the prompts; then the others find them encoded
    pipeline = load_real(options.model, scripts + held_out, options.prompts, wan) if wan else load_model(options.model)
    check_positions(pipeline, config.num_frames)
    if rank:
        for _ in train(pipeline, scripts, rewards, config, add_policies(pipeline, config)):
            pass
        return 0
    told_by_all("")
    folder = Path(config.output_dir)
    check_writable(folder)

    batch, fps = (1, REAL_FPS) if wan else (32, 8)
    say(f"{pipeline.name}: {len(held_out)} held-out prompts before training")
    before, before_pixels = measure(pipeline, held_out, rewards, config.num_frames, batch)

    make_room(folder, config, options)
    for name in ("videos", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_config(folder, config, options, wan)
    policies = add_policies(pipeline, config)
    stopped, code, logs, ended, steps = train_loop(pipeline, scripts, rewards, config, policies, folder, report)

    updates = [line for line in logs if "skipped" not in line]
    if stopped and len(logs) == ended:  # nothing is new, and the policies may not even be loaded
        say(f"kvpo-min: {stopped} before an update was done; {way_on(folder)}")
        return code
    with uninterrupted():
        save_adapter(policies, folder, pipeline.name)
    if stopped:
        say(f"kvpo-min: {stopped} after {len(updates)} updates; what there is was saved; {way_on(folder)}")
    earlier = sum(line["step_time"] for line in logs[:ended])
    result = {"before": before, "after": None, "updates": len(updates), "seconds": 0.0, "seed": config.seed}
    if len(updates) < len(logs):
        result["skipped"] = len(logs) - len(updates)
    write_json(folder / "summary.json", result)  # should what follows be interrupted
    draw_curves(folder, updates, steps[-1] if steps else None)
    draw_groups(pipeline, folder, config, steps, fps)
    if not stopped:
        say("held-out prompts after training")
        result["after"], after_pixels = measure(pipeline, held_out, rewards, config.num_frames, batch)
        draw_before_after(folder, before_pixels, after_pixels, held_out, fps)
    result["seconds"] = round(earlier + time.perf_counter() - begun, 1)
    seen = len(set(held_out) & set(scripts))
    write_text(
        folder / "README.md", model_card(pipeline.name, config, options, result, len(scripts), seen, wan, held_out[0])
    )
    write_json(folder / "summary.json", result)  # last: whoever has it has all (`is_complete`)
    if result["after"]:
        print(table({"before": before, "after": result["after"]}))
    print(f"\n{folder}/ holds the adapter, metrics.jsonl, summary.json and a model card (README.md);")
    print(f"videos are in {folder}/videos, curves in {folder}/figures.")
    return code


def make_room(folder: Path, config, options: RunOptions) -> None:
    """Deletes what the user let be overwritten: an earlier run, or what comes after the checkpoint that is resumed."""
    from kvpo_min.train import checkpoints, discard, find_checkpoint, read_state

    if not options.overwrite_output_dir:
        return
    if not resumes_in_place(config):
        clear_run(folder)
        return
    done = read_state(find_checkpoint(config))["step"]
    for step in checkpoints(folder):
        if step > done:
            discard(folder / f"checkpoint-{step}")


def way_on(folder: Path) -> str:
    """What to do after a run was stopped."""
    from kvpo_min.train import checkpoints

    if steps := checkpoints(folder):
        return f"go on from checkpoint-{steps[-1]}: the same command with --resume_from_checkpoint latest"
    return "there is no checkpoint: start again with --overwrite_output_dir"


@contextlib.contextmanager
def ends_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, with which clusters end a job, is taken as Ctrl-C is."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_rewards(options: RunOptions | EvalOptions | ArenaOptions, wan):
    """What the videos are scored with: formulas on the pocket world, or the models that `wan` names."""
    from kvpo_min.pocket import pocket_rewards
    from kvpo_min.real import load_rewards

    weights = {"vq": options.vq, "mq": options.mq, "ta": options.ta}
    return load_rewards(wan, **weights) if wan else pocket_rewards(**weights)


def try_rewards(rewards, wan) -> None:
    """Scores one clip of noise: what is missing in a reward model's environment shows now, not after an hour."""
    import torch

    say("rewards: one clip of noise, to see that they answer")
    clip = torch.rand(1, 9, 3, wan.height, wan.width, generator=torch.Generator().manual_seed(0))
    rewards(clip, ["a red disc moves left"])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_prompts(config, options: RunOptions) -> tuple[list[str], list[str]]:
    """Training scripts, and held-out scripts from another seed. Raises ValueError when they do not fit the mode."""
    from kvpo_min.pocket.world import SWITCHES, prompt_set

    if not 1 <= config.num_segments <= len(SWITCHES) + 1:
        raise ValueError(f"num_segments must be 1 to {len(SWITCHES) + 1}, got {config.num_segments}")
    if not options.prompts and config.seed == EVAL_SEED:
        raise ValueError(f"seed {EVAL_SEED} draws the held-out prompts; take another one for training")
    drawn = (config.num_segments, config.seed, options.event)
    scripts = read_scripts(options.prompts) if options.prompts else prompt_set(256, *drawn)
    if count_segments(scripts) != config.num_segments:
        raise ValueError(
            f"num_segments is {config.num_segments}, but the scripts have {count_segments(scripts)} segments, "
            f"like '{scripts[0]}'"
        )
    return scripts, prompt_set(options.eval_prompts, config.num_segments, EVAL_SEED, options.event)


def real_prompts(config, options: RunOptions) -> tuple[list[str], list[str]]:
    """Training scripts of a real model, and the last of its prompts file, which are held out. Raises ValueError."""
    from kvpo_min.real import SWITCHES, read_prompts

    if not 1 <= config.num_segments <= len(SWITCHES) + 1:
        raise ValueError(f"num_segments must be 1 to {len(SWITCHES) + 1}, got {config.num_segments}")
    if not options.prompts:
        raise ValueError(
            f"{options.model} is no pocket model (it has no student/), so it is taken for a real one, and that needs "
            f"--prompts FILE"
        )
    if options.event:
        raise ValueError("event chooses among scripts that the pocket world draws; a real model's come from --prompts")
    scripts = read_prompts(options.prompts, config.num_segments)
    if len(scripts) <= options.eval_prompts:
        raise ValueError(
            f"{options.prompts} has {len(scripts)} scripts, of which the last {options.eval_prompts} would be held "
            f"out: give more, or a smaller --eval_prompts"
        )
    scripts, held_out = scripts[: -options.eval_prompts], scripts[-options.eval_prompts :]
    most = config.max_train_steps * config.groups_per_update + (0 if config.tau else config.tau_groups)
    return scripts[:most], held_out  # the run meets no more, so no more are encoded


def check_geometry(config) -> None:
    """Raises ValueError when the videos of a run cannot be made, or leave no block at which a group could fork."""
    import torch

    from kvpo_min.chr import Window
    from kvpo_min.train import make_plan

    check_length(config.num_frames, config.num_segments)
    try:
        make_plan(config, 0, 0, Window(), torch.Generator())
    except ValueError as error:
        sizes = f"num_frames {config.num_frames}, perturb_num_blocks {config.perturb_num_blocks}"
        raise ValueError(f"{sizes} and nearest {config.nearest}: {error}") from None


def check_output(config, options: RunOptions, wan=None) -> None:
    """Raises FileExistsError for a folder in use, and FileNotFoundError or ValueError for a run that cannot go on."""
    from kvpo_min.train import checkpoints, find_checkpoint, read_state

    folder = Path(config.output_dir)
    if not resumes_in_place(config):
        how = ", or give --overwrite_output_dir or --resume_from_checkpoint latest"
        check_folder(folder, options.overwrite_output_dir, how)
    if not config.resume_from_checkpoint:
        return
    checkpoint = find_checkpoint(config)
    check_resume(checkpoint, config, options, wan)
    newest = max(checkpoints(folder), default=0)
    if resumes_in_place(config) and newest > read_state(checkpoint)["step"] and not options.overwrite_output_dir:
        raise FileExistsError(
            f"{folder} holds checkpoint-{newest}, which is newer than {checkpoint.name}: resume latest, or give "
            f"--overwrite_output_dir to delete what came after {checkpoint.name}"
        )


def resumes_in_place(config) -> bool:
    """Whether a run goes on in the folder that its checkpoint lies in; otherwise output_dir is a new run's."""
    which, folder = config.resume_from_checkpoint, Path(config.output_dir)
    return which == "latest" or bool(which) and Path(which).resolve().parent == folder.resolve()


def check_resume(checkpoint: Path, config, options: RunOptions, wan=None) -> None:
    """A run goes on as it was: refuses options that differ from the checkpoint's, and a run that is over."""
    from kvpo_min.train import read_state

    state = read_state(checkpoint)
    beside = checkpoint.parent / "config.yaml"
    saved = (read_yaml(beside) if beside.exists() else {}) | state["config"]
    for name, value in all_options(options, config, wan).items():
        if name in saved and name not in MAY_CHANGE_ON_RESUME and saved[name] != value:
            raise ValueError(
                f"{checkpoint} was made with {name} {saved[name]!r}, not {value!r}; resume with the same options"
            )
    done, wanted = state["step"], config.max_train_steps
    if done > wanted or done == wanted and is_complete(checkpoint.parent, done):
        raise ValueError(f"{checkpoint} has {done} updates and max_train_steps is {wanted}: nothing is left to do")


def is_complete(folder: Path, updates: int) -> bool:
    """Whether a run of so many updates has been measured and all its files written."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return bool(summary["after"]) and summary["updates"] + summary.get("skipped", 0) == updates
    except (OSError, ValueError, KeyError, TypeError):
        return False


def all_options(*parts) -> dict:
    """{name: value} of several dataclasses; None is left out."""
    return {name: value for part in parts if part for name, value in dataclasses.asdict(part).items()}


def reporter(config, options: RunOptions) -> Callable[[dict], None] | None:
    """What else receives every line of metrics. Raises ValueError when its package is missing."""
    if options.report_to == "none":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--report_to tensorboard needs a package that is missing: pip install tensorboard") from None
    writers = []  # opened with the first line: a run that is refused must leave nothing behind

    def report(line: dict) -> None:
        if not writers:
            writers.append(SummaryWriter(str(Path(config.output_dir) / "runs")))
        for name, value in line.items():
            writers[0].add_scalar(name, value, line["step"])
        writers[0].flush()

    return report


def measure(pipeline, scripts: list[str], rewards, num_frames: int, batch: int = 32):
    """-> rewards and judge on the held-out prompts, and the pixels of the first few, [n, T, 3, H, W]"""
    import torch

    from kvpo_min.train import evaluate

    shown: list = []

    def decode(latents):
        pixels = pipeline.decode(latents)
        shown.extend(pixels[: max(0, SHOWN - len(shown))])
        return pixels

    result = evaluate(dataclasses.replace(pipeline, decode=decode), scripts, rewards, num_frames, batch=batch, bar=True)
    return result, torch.stack(shown)


def train_loop(pipeline, scripts, rewards, config, policies, folder: Path, report):
    """Runs the updates under a progress bar and appends each to metrics.jsonl.
    -> (why it stopped early, or ""; exit code; all lines of metrics; how many of them are of earlier calls; the first
    and the last `Step` of this call that were not skipped, as `set_aside` leaves them)"""
    from tqdm import tqdm

    from kvpo_min.reward_models import RewardError
    from kvpo_min.train import checkpoints, find_checkpoint, read_state, train, writing

    path, logs, steps = folder / "metrics.jsonl", [], []

    def go_on_after(lines: list[dict]) -> list[dict]:
        """A checkpoint's lines: those in the file may go further, or less far, or end in the middle."""
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    if config.resume_from_checkpoint:
        logs = go_on_after(read_state(find_checkpoint(config))["logs"])
    earlier, stopped, code = len(logs), "", 0
    updates = train(pipeline, scripts, rewards, config, policies, True)
    with tqdm(total=config.max_train_steps, initial=earlier, desc="train", unit="update") as bar:
        try:
            try:
                for step in updates:
                    line = step.log()
                    if step.skipped:
                        say(f"\nupdate {step.step} was skipped: {step.skipped}")
                    else:
                        steps = [*steps[:1], set_aside(step)]
                        bar.set_postfix(reward=f"{line['reward']:.3f}", anchor=f"{line['anchor_reward']:.3f}")
                    del step  # what it holds would stay on the GPU during the next update
                    logs.append(line)
                    with writing(path), path.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    if report:
                        report(line)
                    bar.update()
            except BaseException as error:  # it may have come between two updates, where only we see it
                updates.throw(error)
        except KeyboardInterrupt:
            stopped, code = INTERRUPTED, 130
        except (RewardError, FloatingPointError) as error:
            stopped = f"error: {' '.join(str(error).split())}; stopped"
            code = 2 if isinstance(error, (RewardError, ValueError)) else 1
        except Exception:
            if len(logs) > earlier:
                say(f"\nkvpo-min: stopped after {len(logs)} updates; {way_on(folder)}")
            raise
    newest = checkpoints(folder)[-1:]
    if stopped and newest and newest[0] > len(logs):  # stopped between an update and its line
        logs = go_on_after(read_state(folder / f"checkpoint-{newest[0]}")["logs"])
    return stopped, code, logs, earlier, steps


def set_aside(step):
    """What the pictures need of an update: its first group, without what fills a GPU."""
    group = step.groups[0]
    videos = group.rollout.videos[-1:].cpu()
    bank = group.rollout.prefix.bank  # which frames it holds is drawn
    prefix = bank and dataclasses.replace(
        group.rollout.prefix, x0=(), history=None, bank=dataclasses.replace(bank, kv=None, pending=None)
    )
    rollout = dataclasses.replace(group.rollout, prefix=prefix, trajectory=None, text=None, videos=videos)
    return dataclasses.replace(step, groups=[dataclasses.replace(group, rollout=rollout)])


def write_config(folder: Path, config, options: RunOptions, wan=None) -> None:
    """config.yaml with every option: `kvpo-min train --config` of it is the same run again."""
    import yaml

    content = {name: value for name, value in all_options(config, options, wan).items() if name not in NOT_IN_CONFIG}
    write_text(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False))


def save_adapter(policies, folder: Path, base: str) -> None:
    """The trained policy (adapter `default`) as peft writes it, at the top of the folder. Raises OSError."""
    import shutil

    from kvpo_min.train import sync, writing

    policies.peft_config["default"].base_model_name_or_path = base
    aside = folder / "adapter.aside"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed: peft would read the model card in it
    try:
        with writing(aside):
            policies.save_pretrained(str(aside), selected_adapters=["default"], save_embedding_layers=False)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                sync(aside / name)
                os.replace(aside / name, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def draw_curves(folder: Path, logs: list[dict], last) -> None:
    from kvpo_min import viz

    if logs:
        viz.reward_curve(logs).savefig(folder / "figures" / "reward.png", dpi=120)
        viz.diagnostics(logs).savefig(folder / "figures" / "diagnostics.png", dpi=120)
    if last:
        viz.energy_plot(last).savefig(folder / "figures" / "energies.png", dpi=120)


def draw_groups(pipeline, folder: Path, config, steps: Sequence, fps: float) -> None:
    """The first group of the first and of the last update: branches and anchor as video, sheet, routes and story."""
    from kvpo_min import viz
    from kvpo_min.chr import Window, chunk_of, routed_frames

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
        prefix = smaller(pipeline.decode(group.rollout.videos[:, :fork]))[0]
        story = viz.story_figure(prefix, videos[:, fork - first :], frames, [*gained, ""], bank=bank)
        story.savefig(folder / "figures" / f"story_{step.step:04d}.png", dpi=120)


def draw_before_after(folder: Path, before, after, scripts: list[str], fps: float) -> None:
    """Side by side: one mp4 a prompt (before left, after right) and one sheet of all."""
    import torch

    from kvpo_min import viz

    shown = scripts[: len(before)]
    for k, script in enumerate(shown):
        pair = torch.stack([before[k], after[k]])
        viz.save_video(folder / "videos" / f"before_after_{k}_{slug(script)}.mp4", pair, fps)
    viz.before_after(smaller(before), smaller(after), shown).save(folder / "videos" / "before_after.png")


def smaller(pixels):
    """[N, T, 3, H, W], for sheets: frames of 128 pixels or less stay as they are, larger ones shrink to about that."""
    import torch

    factor = max(1, pixels.shape[-2] // 128)
    return torch.nn.functional.avg_pool2d(pixels.flatten(0, 1), factor).unflatten(0, pixels.shape[:2])


def slug(script: str) -> str:
    return re.sub(r"[^a-z]+", "_", script.lower()).strip("_")[:60]


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


def model_card(
    name: str, config, options: RunOptions, result: dict, n_scripts: int, seen: int, wan=None, shown: str = ""
) -> str:
    """README.md of a run folder, in the form that the Hub reads. `shown`: the script that a real model's names."""
    before, after = result["before"], result["after"]
    measured = table({"before": before, "after": after} if after else {"before": before}, mark_down=True)
    weights = {"VQ": options.vq, "MQ": options.mq, "TA": options.ta}
    reward = " + ".join(f"{weight:g} {key}" for key, weight in weights.items() if weight)
    length = f"{config.num_frames} frames, {config.num_segments} segment{'s' if config.num_segments > 1 else ''}"
    picture = "![before and after](videos/before_after.png)"
    if not after:
        picture = "The run was stopped early: there is no measurement after it."
    model = f" --model {options.model}" if options.model else ""
    judged = f""" The judge sees
pixels only and is never trained on. {seen} of these prompts also occur, word for word, among the {n_scripts} training
prompts, because the grammar is small; their noise does not."""
    script = '"a red disc moves left"'
    export = ""
    limits = """\
It knows the pocket world (coloured sprites) and its grammar, nothing else. The reward holds a taste for warm colours
on purpose, so videos whose words leave the colour open are expected to drift towards red, orange and yellow."""
    if wan:
        judged = " They are the last ones of the prompts file and were not trained on."
        script = shlex.quote(shown)
        given = {name: getattr(wan, name) for name in ("lora", "components", "height", "width")}
        model += "".join(f" --{name} {value}" for name, value in given.items() if value)
        export = f"\nkvpo-min export --adapter {config.output_dir} --layout diffusers"
        export += f" --lora {wan.lora}" if wan.lora else ""
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

![reward over the run](figures/reward.png)

## Use

```bash
kvpo-min sample {script} --adapter {config.output_dir}{model}{export}
```

or, on the stock transformer in Python, `peft.PeftModel.from_pretrained(transformer, "{config.output_dir}")`.

## Limits

{limits}
"""


# ------------------------------------------------------------------------------------------------------------- commands


def demo(argv: Sequence[str]) -> int:
    from kvpo_min.train import TrainConfig

    values = parse_options(
        "demo", [TrainConfig, RunOptions], argv, {"output_dir": "kvpo_demo", "event": "changes colour"}
    )
    check_official(values, TrainConfig, flags_of(argv))
    with ends_like_ctrl_c():
        return run(*split_options(values, TrainConfig, RunOptions))


def train_command(argv: Sequence[str]) -> int:
    from kvpo_min.real import WanOptions
    from kvpo_min.train import TrainConfig

    classes = TrainConfig, RunOptions, WanOptions
    values = parse_options("train", classes, argv)
    check_official(values, TrainConfig, flags_of(argv))
    config, options, wan = split_options(values, *classes)
    with ends_like_ctrl_c():
        return run(config, options, real_options(argv, options.model, wan))


def sample_command(argv: Sequence[str]) -> int:
    from kvpo_min.real import WanOptions, read_prompts

    options, wan = split_options(parse_options("sample", [SampleOptions, WanOptions], argv), SampleOptions, WanOptions)
    wan = real_options(argv, options.model, wan)
    read = read_prompts if wan else read_scripts
    scripts = read(options.prompts) if options.prompts else [options.script]
    counts = [count_segments([script], bool(wan)) for script in scripts]
    for n in counts:
        video_length(options.num_frames, n)
    folder = Path(options.output_dir)
    check_folder(folder, options.overwrite_output_dir)

    from kvpo_min import viz
    from kvpo_min.train import sample

    if wan:
        folder.mkdir(parents=True, exist_ok=True)  # the encoding of a single script is kept there
        pipeline = load_real(options.model, scripts, options.prompts or folder / "script", wan)
    else:
        pipeline = load_model(options.model)
    check_positions(pipeline, max(video_length(options.num_frames, n) for n in counts))
    if options.adapter:
        load_adapter(pipeline, options.adapter)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("mp4", "png"):
        for earlier in folder.glob(f"[0-9][0-9][0-9]_*.{kind}"):  # there are some with --overwrite_output_dir alone
            earlier.unlink()
    batch, fps = (1, REAL_FPS) if wan else (32, 8)
    for n in sorted(set(counts)):  # one batch holds scripts of the same number of segments
        index = [k for k, count in enumerate(counts) if count == n]
        part, done, length = [scripts[k] for k in index], 0, video_length(options.num_frames, n)
        for latents in sample(pipeline, part, length, options.seed, batch, bar=True):
            for pixels in pipeline.decode(latents):
                script = part[done]
                path = folder / f"{index[done]:03d}_{slug(script)}.mp4"
                viz.save_video(path, pixels, fps)
                viz.contact_sheet(smaller(pixels[None]), [script]).save(path.with_suffix(".png"))
                print(path)
                done += 1
    return 0


def eval_command(argv: Sequence[str]) -> int:
    from kvpo_min.real import WanOptions, read_prompts

    options, wan = split_options(parse_options("eval", [EvalOptions, WanOptions], argv), EvalOptions, WanOptions)
    wan, out = real_options(argv, options.model, wan), Path(options.json)
    scripts = read_prompts(options.prompts) if wan else read_scripts(options.prompts)
    num_frames = video_length(options.num_frames, count_segments(scripts, bool(wan)))
    check_file(out)

    from kvpo_min.train import evaluate

    rewards = run_rewards(options, wan)
    pipeline = load_real(options.model, scripts, options.prompts, wan) if wan else load_model(options.model)
    check_positions(pipeline, num_frames)
    if options.adapter:
        load_adapter(pipeline, options.adapter)
    result = evaluate(pipeline, scripts, rewards, num_frames, options.seed, 1 if wan else 32, bar=True)
    print(table({options.adapter or pipeline.name: result}))
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"n": len(scripts), "num_frames": num_frames, "seed": options.seed, "prompts": options.prompts}
    about |= {"model": options.model or pipeline.name, "adapter": options.adapter or None} | all_options(wan)
    write_json(out, result | about | {"weights": dict(rewards.weights)})
    print(f"\nwritten to {out}")
    return 0


def export_command(argv: Sequence[str]) -> int:
    (options,) = split_options(parse_options("export", [ExportOptions], argv), ExportOptions)
    from kvpo_min.checkpoints import export_lora, read_lora, stack_loras

    folder = Path(options.output_dir)
    check_folder(folder, overwrite=False, how="")
    if not Path(options.adapter).exists():
        raise FileNotFoundError(f"there is no adapter {options.adapter}")
    lora = read_lora(options.adapter)
    if options.lora:
        lora = stack_loras(read_lora(options.lora), lora)
    path = export_lora(lora, folder, options.layout)
    print(f"{path}: rank {lora.rank}, alpha {lora.alpha:g}, {len(lora.modules)} layers")
    config = Path(options.adapter) / "config.yaml"
    ran = read_yaml(config) if config.is_file() else {}
    if ran.get("model"):
        print(f"to be loaded on {ran['model']}")
    if ran.get("lora") and not options.lora:
        say(f"with {ran['lora']} merged into it; --lora {ran['lora']} would put both into one LoRA")
    return 0


def distill_command(argv: Sequence[str]) -> int:
    """Stages resume by themselves, so a folder with stages in it is gone on with; one with anything else is refused."""
    from kvpo_min.pocket.distill import DistillConfig, distill

    (config,) = split_options(parse_options("distill", [DistillConfig], argv), DistillConfig)
    folder = Path(config.output_dir)
    started = any((folder / stage).is_dir() for stage in ("autoencoder", "teacher", "student"))
    check_folder(folder, overwrite=started, how=", or give the folder of an earlier `kvpo-min distill`")
    made = distill(config)
    if isinstance(made, Mapping):
        write_json(folder / "report.json", made)
        print(json.dumps(finite(made), indent=2))
    weights = folder / "weights"  # fp16, ready to be loaded; the stages' own folders are what a resumed run reads
    print(f"the model is in {weights}: give it to the other commands with --model {weights}")
    return 0


def arena_command(argv: Sequence[str]) -> int:
    (options,) = split_options(parse_options("arena", [ArenaOptions], argv), ArenaOptions)
    from kvpo_min.arena import arena, line, plan

    def make_pipeline():
        return load_model(options.model)

    check_file(Path(options.csv))
    rewards = run_rewards(options, None)
    if options.plan:
        print(plan(make_pipeline, rewards, options))
        return 0
    for row in arena(make_pipeline, rewards, options):
        print(line(row), flush=True)
    print(f"\nall rows are in {options.csv}")
    return 0


def bench_command(argv: Sequence[str]) -> int:
    (options,) = split_options(parse_options("bench", [BenchOptions], argv), BenchOptions)
    if options.json:
        check_file(Path(options.json))
    from kvpo_min import bench

    bench.load_naive()
    config = bench.make_config(options)
    run_prompts(config, RunOptions())
    check_geometry(config)
    measure, show = (bench.scaling, bench.scaling_table) if options.scaling else (bench.bench, bench.table)
    say("measuring; other programs that run meanwhile count too ...")
    try:
        result = measure(load_model(options.model), run_rewards(RunOptions(), None), options)
    except bench.Disagreement as error:
        say(f"kvpo-min: error: {error}")
        return 1
    print(show(result))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.json), result)
        print(f"\nwritten to {options.json}")
    return 0


def doctor(argv: Sequence[str]) -> int:
    (options,) = split_options(parse_options("doctor", [DoctorOptions], argv), DoctorOptions)
    if options.output_dir and not Path(options.output_dir).is_dir():
        raise FileNotFoundError(f"there is no run folder {options.output_dir}")
    from kvpo_min.doctor import check_run_folder, check_update

    checks = check_update(options)
    if options.output_dir:
        checks += check_run_folder(Path(options.output_dir), options.model)
    for check in checks:
        print(f"{'PASS' if check.passed else 'FAIL'}  {check.name}{f'  ({check.seen})' if check.seen else ''}")
        if not check.passed:
            print(f"      usual cause: {check.cause}")
    failed = sum(not check.passed for check in checks)
    print(f"\n{len(checks) - failed} of {len(checks)} checks passed")
    return 1 if failed else 0


# --------------------------------------------------------------------------------------------------------------- parity


@dataclass
class ParityOptions:
    """Compares this code with the authors'"""

    golden: str = "tests/golden"  # folder of recorded numbers; its README.md says what they are


def parity_command(argv: Sequence[str]) -> int:
    (options,) = split_options(parse_options("parity", [ParityOptions], argv), ParityOptions)

    from kvpo_min.parity import parity, table

    found = parity(options.golden)
    print(table(found))
    failed = sum(not row.ok for row in found)
    print(f"\n{len(found) - failed} of {len(found)} comparisons within tolerance")
    return 1 if failed else 0


# ----------------------------------------------------------------------------------------------------------------- main

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (demo, "Aligns the embedded model in a few minutes: before and after, videos, curves and a LoRA adapter."),
    "train": (train_command, "A run of your own: the same engine with your prompts, length and reward."),
    "sample": (sample_command, "Makes videos: an mp4 and a contact sheet a script."),
    "eval": (eval_command, "Measures a model or an adapter on a prompts file: rewards, standard errors, judge."),
    "export": (export_command, "Writes an adapter for other programs: diffusers, peft or the authors' layout."),
    "distill": (distill_command, "Makes the pocket model from nothing: autoencoder, teacher, 4-step student."),
    "arena": (arena_command, "Compares KVPO with other methods at equal cost: one row of a CSV for each measurement."),
    "bench": (bench_command, "Times one update against a plain one and its floor, if their numbers agree."),
    "doctor": (doctor, "Runs one update and prints every invariant with PASS or FAIL and the usual cause."),
    "parity": (parity_command, "Compares this code with numbers recorded from the authors': the largest differences."),
}


def usage() -> str:
    lines = [f"  {name:8} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: kvpo-min COMMAND [options]", "", "commands:", *lines, "",
                      "`kvpo-min COMMAND --help` lists the options of a command."])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. -> exit code"""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"unknown command '{argv[0]}'{nearest_known(argv[0], list(COMMANDS))}")
        return COMMANDS[argv[0]][0](argv[1:])
    except (ValueError, OSError) as error:  # the user's to mend; anything else is ours and keeps its traceback
        print(f"kvpo-min: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"kvpo-min: error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from kvpo_min.reward_models import RewardError

        if not isinstance(error, RewardError):
            raise
        print(f"kvpo-min: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvpo-min: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
