"""Checkpoints: all policies, the optimizer and every random state, so that a resumed run goes on as if it had not
stopped, to the last bit. A checkpoint is written aside and renamed, so there is a whole one at every moment."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from kvpo_min.config import TrainConfig
from kvpo_min.policies import adapter_weights, base_hash
from kvpo_min.system import load_tensors, not_finite, sync, uninterrupted, writing

KINDS = {"config": dict, "step": int, "tau": (int, float), "order": list, "skips": int, "logs": list}  # of state.json


def discard(folder: Path) -> None:
    """Deletes a checkpoint: under another name, so that none that is half deleted can be taken for a whole one."""
    aside = folder.with_name(f"{folder.name}.old.aside")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


@uninterrupted()
def save_checkpoint(config: TrainConfig, policies, optimizer, generator: torch.Generator, state: dict) -> Path:
    """Writes `checkpoint-N` aside and renames it once it is on the disk; older ones beyond the limit are deleted only
    afterwards, and what an interrupted call left. Raises OSError naming the file; the earlier checkpoints are then as
    they were."""
    from safetensors.torch import save_file

    output_dir = Path(config.output_dir)
    folder = output_dir / f"checkpoint-{state['step']}"
    aside, before = folder.with_name(folder.name + ".aside"), folder.with_name(folder.name + ".old.aside")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(aside):
            aside.mkdir(parents=True)
        for name in ("default", "old", "ema"):
            tensors = {key: weight.detach().contiguous() for key, weight in adapter_weights(policies, name).items()}
            with writing(aside / f"{name}.safetensors") as path:
                save_file(tensors, path, {"lora_alpha": str(config.lora_alpha)})  # also of a file that is taken alone
        training = io.BytesIO()  # torch.save to a file does not say when the disk is full
        torch.save({"optimizer": optimizer.state_dict(), "generator": generator.get_state()}, training)
        with writing(aside / "training_state.pt") as path:
            path.write_bytes(training.getbuffer())
        with writing(aside / "state.json") as path:
            path.write_text(json.dumps({"config": asdict(config), **state, "base": base_hash(policies)}))
        with writing(folder):
            sync(aside)
            if folder.exists():  # of a run that came this far before: kept until the new one has its name
                shutil.rmtree(before, ignore_errors=True)
                os.replace(folder, before)
            os.replace(aside, folder)
            sync(output_dir)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)  # the space it took
        whole = checkpoints(output_dir)
        then = "there is no earlier checkpoint"
        if whole:
            then = f"checkpoint-{whole[-1]} is whole, so then go on with --resume_from_checkpoint latest"
        raise OSError(f"{error}; {then}") from error
    older = [step for step in checkpoints(output_dir) if step != state["step"]]
    for step in older[: max(0, len(older) + 1 - config.checkpoints_total_limit)]:
        discard(folder.with_name(f"checkpoint-{step}"))
    for left in output_dir.glob("checkpoint-*.aside"):
        shutil.rmtree(left, ignore_errors=True)
    return folder


def checkpoints(output_dir: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder."""
    found = [p.name.removeprefix("checkpoint-") for p in output_dir.glob("checkpoint-*") if (p / "state.json").exists()]
    return sorted(int(number) for number in found if re.fullmatch("0|[1-9][0-9]*", number))


def find_checkpoint(config: TrainConfig) -> Path:
    """The folder that `resume_from_checkpoint` names; an error when there is none (never a silent fresh start)."""
    if config.resume_from_checkpoint != "latest":
        folder = Path(config.resume_from_checkpoint)
        if not (folder / "state.json").exists():
            raise FileNotFoundError(f"{folder} is not a checkpoint: it has no state.json")
        return folder
    steps = checkpoints(Path(config.output_dir))
    if not steps:
        raise FileNotFoundError(
            f"there is no checkpoint in {config.output_dir}, so nothing to resume: start the run without "
            f"--resume_from_checkpoint, with --overwrite_output_dir if it left files, and with --checkpointing_steps N "
            f"for a checkpoint every N updates"
        )
    return Path(config.output_dir) / f"checkpoint-{steps[-1]}"


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint: {config, step, tau, order, skips, logs (a line for every update so far), base}.
    Raises ValueError naming the folder."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        for key, kind in KINDS.items():
            if not isinstance(state[key], kind) or isinstance(state[key], bool):
                raise ValueError(f"expected {key} to be a {getattr(kind, '__name__', 'number')}, got {state[key]!r}")
        if not 0 <= state["tau"] < math.inf or not all(type(k) is int and k >= 0 for k in state["order"]):
            raise ValueError(f"got tau {state['tau']} and order {state['order'][:5]}")
        if not all(isinstance(line, dict) and "step" in line for line in state["logs"]):
            raise ValueError("a line of its logs is no record of an update")
        return {key: state[key] for key in KINDS} | {"base": state.get("base", "")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from None


def check_schedule(folder: Path, config: TrainConfig) -> None:
    """Raises ValueError where the rate falls to 0 at the end of the run, and that end is another one now."""
    was = read_state(folder)["config"].get("max_train_steps")
    if config.lr_scheduler == "linear" and was != config.max_train_steps:
        raise ValueError(
            f"{folder} was made with max_train_steps {was} and lr_scheduler linear, which ends there at 0: resume with "
            f"max_train_steps {was}, not {config.max_train_steps}, or start a new run"
        )


def damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder} is damaged, or comes from another version ({type(error).__name__}: {' '.join(str(error).split())}): "
        f"delete it and resume from an earlier checkpoint, or start again"
    )


def read_checkpoint(folder: Path) -> tuple[dict, tuple, dict]:
    """-> the policies' tensors by name, (optimizer, generator), and `read_state`. Raises ValueError naming the folder
    for what is damaged, not finite, or not alike."""
    from safetensors.torch import load_file

    try:
        saved = {name: load_file(folder / f"{name}.safetensors") for name in ("default", "old", "ema")}
        training = load_tensors(folder / "training_state.pt")
        training = training["optimizer"], training["generator"]
        moments = {f"{k} {name}": t for k, part in training[0]["state"].items() for name, t in part.items()}
        if broken := not_finite(moments | {f"{of} {key}": t for of in saved for key, t in saved[of].items()}):
            raise ValueError(f"{broken[0]} is not finite")
        shapes = [{key: weight.shape for key, weight in tensors.items()} for tensors in saved.values()]
        if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
            raise ValueError("its policies are not alike")
    except Exception as error:  # a damaged file can raise nearly anything
        raise damaged(folder, error) from None
    return saved, training, read_state(folder)


def load_checkpoint(folder: Path, policies, optimizer, generator: torch.Generator) -> dict:
    """Restores all policies, the optimizer and the generator; -> {step, tau, order, skips, logs}. Raises ValueError
    naming the folder before anything is changed."""
    saved, training, state = read_checkpoint(folder)
    for name, tensors in saved.items():
        shapes = {key: tuple(weight.shape) for key, weight in adapter_weights(policies, name).items()}
        if shapes != {key: tuple(weight.shape) for key, weight in tensors.items()}:
            raise ValueError(f"{folder}: the saved adapter does not fit; use the rank and model it was trained with")
    if state["base"] and state["base"] != base_hash(policies):
        raise ValueError(f"{folder} was made on other base weights than the model's: put them back, or start anew")
    with torch.no_grad():
        for name, tensors in saved.items():
            for key, weight in adapter_weights(policies, name).items():
                weight.copy_(tensors[key])
    optimizer.load_state_dict(training[0])
    generator.set_state(training[1])
    return {key: state[key] for key in ("step", "tau", "order", "skips", "logs")}
