"""Output folders: what may be written where, what a run leaves behind, and whether one can go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from kvpo_min.cli.options import RunOptions, all_options
from kvpo_min.resume import check_schedule, checkpoints, discard, find_checkpoint, read_state
from kvpo_min.system import CLAIM, read_text, read_yaml, write_text

NOT_IN_CONFIG = ("overwrite_output_dir", "resume_from_checkpoint")  # how a run was started, not what it is
MAY_CHANGE_ON_RESUME = (
    "output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "branch_batch", "replay_batch", "eval_prompts", "processes", "report_to", "overwrite_output_dir", "device",
    "gradient_checkpointing", "vq_model", "mq_model", "ta_model",
)  # fmt: skip


def check_folder(folder: Path, overwrite: bool, how: str = ", or give --overwrite_output_dir") -> None:
    """Refuses an output folder that holds something, unless it may be overwritten."""
    if folder.is_dir() and any(path.name != CLAIM for path in folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; name another --output_dir{how}")


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
    path = Path(os.path.realpath(path))
    above = next(place for place in path.parents if place.exists())  # files are written aside and renamed
    for there in (path, above):
        if there.exists() and not os.access(there, os.W_OK) or path.exists() and not path.is_file():
            raise PermissionError(f"{there} cannot be written to; name another place")


def clear_run(folder: Path) -> None:
    """Deletes what an earlier run left, by name; anything else in the folder stays."""
    patterns = (
        "config.yaml", "scripts.json", "metrics.jsonl", "summary.json", "README.md", "adapter_config.json",
        "adapter_model.safetensors", "videos/*.mp4", "videos/*.png", "figures/*.png", "runs/events.*",
    )  # fmt: skip
    for path in [path for pattern in (*patterns, *(f"{p}.aside" for p in patterns)) for path in folder.glob(pattern)]:
        path.unlink()
    for step in checkpoints(folder):
        discard(folder / f"checkpoint-{step}")
    for left in (*folder.glob("checkpoint-*.aside"), folder / "adapter.aside"):
        shutil.rmtree(left, ignore_errors=True)


def make_room(folder: Path, config, options: RunOptions) -> None:
    """Deletes what the user let be overwritten: an earlier run, or what comes after the checkpoint that is resumed."""
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
    if steps := checkpoints(folder):
        return f"go on from checkpoint-{steps[-1]}: the same command with --resume_from_checkpoint latest"
    return "there is no checkpoint: start again with --overwrite_output_dir"


def earlier_scripts(config) -> list[str]:
    """What the run that is resumed was trained on, as far as it was written down."""
    path = find_checkpoint(config).parent / "scripts.json" if config.resume_from_checkpoint else Path()
    if not path.is_file():
        return []
    try:
        scripts = json.loads(read_text(path))
        if not isinstance(scripts, list) or not all(isinstance(script, str) for script in scripts):
            raise ValueError(f"expected a list of scripts, got a {type(scripts).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the run goes on without its check") from None
    return scripts


def check_output(config, options: RunOptions, wan=None, scripts: Sequence[str] = ()) -> None:
    """Raises FileExistsError for a folder in use, and FileNotFoundError or ValueError for a run that cannot go on."""
    folder = Path(config.output_dir)
    if not resumes_in_place(config):
        how = ", or give --overwrite_output_dir or --resume_from_checkpoint latest"
        check_folder(folder, options.overwrite_output_dir, how)
    if not config.resume_from_checkpoint:
        return
    checkpoint = find_checkpoint(config)
    check_resume(checkpoint, config, options, wan)
    for was, now in zip(earlier_scripts(config), scripts, strict=False):  # there may be more or fewer now
        if was != now:
            raise ValueError(f"{checkpoint} was made with {was!r} where {now!r} stands now: give the same --prompts")
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
    """Refuses to resume with options that differ from the checkpoint's, or a run that is finished."""
    state = read_state(checkpoint)
    beside = checkpoint.parent / "config.yaml"
    saved = (read_yaml(beside) if beside.exists() else {}) | state["config"]
    for name, value in all_options(options, config, wan).items():
        if name == "like" and {*str(saved.get(name)).split(",")} == {*value.split(",")}:
            continue
        if name in saved and name not in MAY_CHANGE_ON_RESUME and saved[name] != value:
            raise ValueError(
                f"{checkpoint} was made with {name} {saved[name]!r}, not {value!r}; resume with the same options"
            )
    check_schedule(checkpoint, config)
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


def write_config(folder: Path, config, options: RunOptions, wan=None) -> None:
    """config.yaml with every option: `kvpo-min train --config` of it is the same run again."""
    content = {name: value for name, value in all_options(config, options, wan).items() if name not in NOT_IN_CONFIG}
    write_text(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False))
