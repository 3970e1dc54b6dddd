"""One training run with its evaluation, and the folder it leaves behind (`demo` and `train`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from kvpo_min import pocket
from kvpo_min import policies as adapters
from kvpo_min import train as loop
from kvpo_min.cli import folders, models
from kvpo_min.cli.options import RunOptions
from kvpo_min.kvpo import check_bank
from kvpo_min.pipeline import CURVE, check_positions, evaluate, held_out_curve, table
from kvpo_min.pocket.prompts import check_geometry, run_prompts
from kvpo_min.resume import checkpoints, find_checkpoint, read_state
from kvpo_min.rewards import RewardError
from kvpo_min.system import (
    claimed,
    gather,
    join_processes,
    processes,
    processes_for,
    read_text,
    say,
    share_work,
    uninterrupted,
    write_json,
    write_text,
    writes,
    writing,
)
from kvpo_min.viz import report
from kvpo_min.viz.report import set_aside
from kvpo_min.wan import real

SHOWN = 4  # evaluation prompts whose videos are kept
REAL_FPS = 4  # frames a second that a real model's pipeline decodes; the pocket model's are shown at 8
INTERRUPTED = "interrupted"


def in_its_folder(run: Callable[..., int]) -> Callable[..., int]:
    """Holds the output folder from the first moment to the last, so that no second run can write there too."""

    @functools.wraps(run)
    def held(config, *more, **named) -> int:
        with claimed(Path(config.output_dir)) if writes() else contextlib.nullcontext():
            return run(config, *more, **named)

    return held


def picture(draw: Callable, *arguments) -> None:
    """Pictures are no result: one that cannot be made is told, and the run goes on."""
    try:
        draw(*arguments)
    except Exception as error:
        say(f"kvpo-min: pictures are left out: {type(error).__name__}: {' '.join(str(error).split())}")


@in_its_folder
def run(config, options: RunOptions, wan=None, command: Sequence[str] = ()) -> int:
    """One training run with its evaluation, and the folder it leaves behind (`demo` and `train`). `wan`: the options of
    a real model. `command`: what a process that is to share the work is started with. -> exit code"""
    if wan and wan.bank_size:
        check_bank(config)
        if config.compat:  # videos are evaluated with the bank that they are trained with
            wan = dataclasses.replace(wan, bank_compat=config.compat)
    if wan and options.processes != 1:
        raise ValueError(
            f"processes is for CPUs; start a real model on several GPUs with torchrun, got {options.processes}"
        )
    scripts, held_out = (
        real.real_prompts(config, options) if wan
        else run_prompts(config, options.prompts, options.event, options.eval_prompts)
    )  # fmt: skip
    check_geometry(config, bool(wan and wan.bank_size))
    if writes():
        folders.check_output(config, options, wan, scripts)
    try_pictures = functools.partial(picture, report.try_pictures) if writes() else lambda: None
    with share_work(processes_for(options.processes, config.groups_per_update), command, try_pictures):
        join_processes()
        return work(config, options, wan, scripts, held_out)


def work(config, options: RunOptions, wan, scripts: list[str], held_out: list[str]) -> int:
    """What `run` does once everything that can be refused at once is checked. With several processes all train and
    evaluate, and the first one writes."""
    begun = time.perf_counter()
    rank, _ = processes()
    loop.check_share(config)
    log_to = reporter(config, options)  # before any work: its package may be missing
    rewards = models.run_rewards(options, wan)
    if wan and rank == 0:
        real.try_rewards(rewards, wan)
    if rank and wan:
        gather("")  # the first process encodes the prompts; then the others find them encoded
    if wan:
        pipeline = models.load_real(options.model, scripts + held_out, options.prompts, wan)
    else:
        pipeline = pocket.load_model(options.model, options.like)
    check_positions(pipeline, config.num_frames)
    batch, fps = (1, REAL_FPS) if wan else (32, 8)
    curve = held_out_curve(pipeline, held_out, rewards, config, options.eval_every, batch)
    if rank:  # as the first process does below
        measure(pipeline, held_out, rewards, config.num_frames, batch)
        policies = adapters.add_policies(pipeline, config)
        for step in loop.train(pipeline, scripts, rewards, config, policies):
            if curve and step.step + 1 < config.max_train_steps:
                curve(step.step + 1)
        measure(pipeline, held_out, rewards, config.num_frames, batch)
        return 0
    if wan:
        gather("")
    folder = Path(config.output_dir)
    say(f"{pipeline.name}: {len(held_out)} held-out prompts before training")
    before, before_pixels = measure(pipeline, held_out, rewards, config.num_frames, batch)
    head = before.pop("head")

    folders.make_room(folder, config, options)
    for name in ("videos", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    trained_on = max(scripts, folders.earlier_scripts(config), key=len)  # the one begins as the other
    folders.write_config(folder, config, options, wan)
    write_json(folder / "scripts.json", trained_on)
    policies = adapters.add_policies(pipeline, config)
    begin = {key.replace("eval/", "eval0/"): value for key, value in curve(0, head).items()} if curve else {}
    stopped, code, logs, ended, steps = train_loop(
        pipeline, scripts, rewards, config, policies, folder, log_to, curve, begin
    )

    updates = [line for line in logs if "skipped" not in line]
    if stopped and len(logs) == ended:  # nothing is new, and the policies may not even be loaded
        say(f"kvpo-min: {stopped} before an update was done; {folders.way_on(folder)}")
        return code
    with uninterrupted():
        adapters.save_adapter(policies, folder, pipeline.name)
    if stopped:
        say(f"kvpo-min: {stopped} after {len(updates)} updates; what there is was saved; {folders.way_on(folder)}")
    earlier = sum(line["step_time"] for line in logs[:ended])
    result = {"before": before, "after": None, "updates": len(updates), "seconds": 0.0, "seed": config.seed}
    if len(updates) < len(logs):
        result["skipped"] = len(logs) - len(updates)
    write_json(folder / "summary.json", result)  # should what follows be interrupted
    if not stopped:
        say("held-out prompts after training")
        result["after"], after_pixels = measure(pipeline, held_out, rewards, config.num_frames, batch)
        head = result["after"].pop("head")
        if curve and logs:  # the curve's last point is a part of this
            point = curve(config.max_train_steps, head)
            logs[-1] |= point
            write_lines(folder / "metrics.jsonl", logs)
            if log_to:
                log_to(point | {"step": logs[-1]["step"]})
    picture(report.draw_curves, folder, logs if updates else [], steps[-1] if steps else None)
    picture(report.draw_groups, pipeline, folder, config, steps, fps)
    if not stopped:
        picture(report.draw_before_after, folder, before_pixels, after_pixels, held_out, fps)
    result["seconds"] = round(earlier + time.perf_counter() - begun, 1)
    words = {" ".join(script.split()).casefold() for script in trained_on}
    seen = sum(" ".join(script.split()).casefold() in words for script in held_out)
    write_text(
        folder / "README.md",
        report.model_card(pipeline.name, config, options, result, len(scripts), seen, wan, held_out[0]),
    )
    write_json(folder / "summary.json", result)  # last: whoever has it has all (`is_complete`)
    if result["after"]:
        print(table({"before": before, "after": result["after"]}))
        print(report.in_words(before, result["after"], held_out, config.num_frames))
    print(f"\n{folder}/ holds the adapter, metrics.jsonl, summary.json and a model card (README.md);")
    print(f"videos are in {folder}/videos, curves in {folder}/figures.")
    return code


def train_loop(pipeline, scripts, rewards, config, policies, folder: Path, log_to, curve=None, begin=None):
    """Runs the updates under a progress bar and appends each to metrics.jsonl. `curve`: from `held_out_curve`; what it
    measures stands in the line of the update that it follows, and what was so before the first one (`begin`) in that.
    The point after the last update is left to the measurement that ends a run.
    -> (why it stopped early, or ""; exit code; all lines of metrics; how many of them are of earlier calls; the first
    and the last `Step` of this call that were not skipped, as `set_aside` leaves them)"""
    path = folder / "metrics.jsonl"
    logs = []
    steps = []

    def go_on_after(checkpoint: Path) -> list[dict]:
        """A checkpoint's lines: those in the file may go further, or less far, or end in the middle. What was measured
        on held-out prompts is in the file beside the checkpoint alone."""
        known, lines = measured_before(checkpoint.parent / path.name), read_state(checkpoint)["logs"]
        for line in lines:
            line |= known.get(line["step"], {})
        write_lines(path, lines)
        return lines

    if config.resume_from_checkpoint:
        logs = go_on_after(find_checkpoint(config))
    earlier = len(logs)
    stopped = ""
    code = 0
    updates = loop.train(pipeline, scripts, rewards, config, policies, True)
    begin = {} if earlier or not begin else begin
    shown = Progress(config.max_train_steps, logs, begin)
    with shown:
        try:
            try:
                for step in updates:
                    line = step.log() | (begin if not logs else {})
                    if step.skipped:
                        say(f"\nupdate {step.step} was skipped: {step.skipped}")
                    else:
                        steps = [*steps[:1], set_aside(step)]
                    del step  # what it holds would stay on the GPU during the next update
                    line |= curve(line["step"] + 1) if curve and line["step"] + 1 < config.max_train_steps else {}
                    logs.append(line)
                    with writing(path), path.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    if log_to:
                        log_to(line)
                    shown(line)
            except BaseException as error:  # it may have come between two updates, where only we see it
                updates.throw(error)
        except KeyboardInterrupt:
            stopped, code = INTERRUPTED, 130
        except (RewardError, FloatingPointError) as error:
            stopped = f"error: {' '.join(str(error).split())}; stopped"
            code = 2 if isinstance(error, (RewardError, ValueError)) else 1
        except Exception:
            if len(logs) > earlier:
                say(f"\nkvpo-min: stopped after {len(logs)} updates; {folders.way_on(folder)}")
            raise
    newest = checkpoints(folder)[-1:]
    if stopped and newest and newest[0] > len(logs):  # stopped between an update and its line
        logs = go_on_after(folder / f"checkpoint-{newest[0]}")
    return stopped, code, logs, earlier, steps


def write_lines(path: Path, lines: list[dict]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def measured_before(path: Path) -> dict[int, dict]:
    """What the lines of metrics.jsonl hold of the held-out curve: {step: numbers}. A line cut short is left out."""
    found = {}
    for line in read_text(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            line = json.loads(line)
            found[line["step"]] = {key: value for key, value in line.items() if key.startswith("eval")}
    return found


class Progress:
    """What a person wants to know of a run: updates, time left, and how much better the held-out videos are. One line
    that is redrawn, or, where stderr is no terminal, one line every ten updates. `logs`: the lines of a run that goes
    on; `begin`: what was measured before the first update of another."""

    def __init__(self, total: int, logs: Sequence[dict], begin: dict):
        first = begin or (logs[0] if logs else {})
        self.key = next((key for key in ("liked", "reward") if f"eval0/{key}" in first), "")
        self.before = first.get(f"eval0/{self.key}")
        self.now = next((line[key] for line in reversed(logs) if (key := f"eval/{self.key}") in line), self.before)
        self.bar = tqdm(total=total, initial=len(logs), desc="train", unit="update", disable=not sys.stderr.isatty())
        self.done = self.start = len(logs)
        self.total = total
        self.begun = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def __call__(self, line: dict) -> None:
        self.done += 1
        self.now = line.get(f"eval/{self.key}", self.now)
        text = ""
        if self.before is not None:
            text = f"held-out {self.key} {self.now:.2f} (before {self.before:.2f})"
        elif "reward" in line:
            text = f"reward minus anchor {line['reward'] - line['anchor_reward']:+.3f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (self.done % 10 == 0 or self.done == self.total):
            left = (time.perf_counter() - self.begun) / (self.done - self.start) * (self.total - self.done)
            told = f"update {self.done} of {self.total}, {left / 60:.1f} minutes left"
            say(f"{told}, {text}" if text else told)


def measure(pipeline, scripts: list[str], rewards, num_frames: int, batch: int = 32):
    """-> rewards and judge on the held-out prompts, and the pixels of the first few, [n, T, 3, H, W]"""
    shown: list = []

    def decode(latents):
        pixels = pipeline.decode(latents)
        shown.extend(pixels[: max(0, SHOWN - len(shown))])
        return pixels

    result = evaluate(
        dataclasses.replace(pipeline, decode=decode), scripts, rewards, num_frames, batch=batch, bar=True,
        head=CURVE,
    )  # fmt: skip
    return result, torch.stack(shown)


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
