"""One long run of a small random model that is disturbed all the time: does it end as one that nobody disturbs?

    python benchmarks/soak.py                 # 200 updates
    python benchmarks/soak.py --updates 20    # a short one

Planned for about one update in eight, never twice in a row: a NaN at one of five borders (a reward, pixels, latents,
energies, the gradient), or a reward worker that dies, hangs or talks rubbish. Meanwhile, at random moments: SIGKILL,
SIGTERM, SIGHUP, SIGINT, a full disk (a tmpfs filled to its end; without the right to mount, a limit on file sizes), a
folder that cannot be written to, and a second run of the same folder. Whenever the run ends it is started again with
--resume_from_checkpoint latest. What must be the same is compared with a run in which nothing happens but that the same
updates are skipped, all of them because a reward says so: weights of all policies, optimizer, random numbers, order,
metrics.jsonl, adapter, summary, names of files. Prints a table; exits 1 when anything differs.
"""

import argparse
import contextlib
import ctypes
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import kill_resume
import torch

BORDERS = ("reward", "pixels", "latents", "energies", "gradient")
WORKER = ("worker dies", "worker hangs", "worker talks rubbish")
MOMENTS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "full disk", "read-only folder", "second run")
TIMEOUT = 30.0  # of the worker: longer than a busy machine needs to start it
SCRIPT = """
import json, os, sys, time
place = os.path.dirname(os.path.abspath(__file__))
for line in sys.stdin:
    request = json.loads(line)
    fault = open(os.path.join(place, "fault")).read()
    if fault == "worker dies":
        os._exit(3)
    parent = os.getppid()
    while fault == "worker hangs" and os.getppid() == parent:
        time.sleep(1)
    scores = [0.5] * len(request["prompts"])
    answer = json.dumps({"id": request["id"], "scores": scores})
    print(str(scores) if fault == "worker talks rubbish" else answer, flush=True)
"""


def plan_of(updates: int, rng: random.Random) -> dict[int, str]:
    """{update: what goes wrong in it}; every kind once, if there is room; none in the last update"""
    at = [k for k in range(1, updates - 1) if k % 2]
    kinds = [*BORDERS, *WORKER]
    chosen = sorted(rng.sample(at, min(len(at), max(len(kinds) if updates > 60 else 3, updates // 8))))
    order = rng.sample(kinds, len(kinds))
    faults = [order[k] if k < len(order) else rng.choice([*BORDERS, *WORKER[::2]]) for k in range(len(chosen))]
    return dict(zip(chosen, rng.sample(faults, len(faults)), strict=True))


def install(plan: dict[int, str], place: Path, disturbed: list) -> None:
    """Puts the faults into the package; of the processes that are forked from this one, only those inject them in which
    `disturbed` holds something. In the others a reward fails in the same updates."""
    from kvpo_min import kvpo, pocket, train
    from kvpo_min.cli import models
    from kvpo_min.reward_models import WorkerReward
    from kvpo_min.rewards import Mixture, RewardError

    step = [-1]
    draw, fork, replay, gradients = kvpo.draw, kvpo.fork, kvpo.replay_energies, train.sum_gradients
    load = pocket.load_model

    def hit(border: str) -> bool:
        return bool(disturbed) and plan.get(step[0]) == border

    def drawn(pipeline, scripts, order, config, number, *more):
        step[0] = number
        (place / "fault").write_text(plan.get(number, "") if disturbed else "")
        return draw(pipeline, scripts, order, config, number, *more)

    def forked(*args):
        made = fork(*args)
        return replace(made, videos=made.videos * math.nan) if hit("latents") else made

    def replayed(*args):
        return replay(*args) * (math.nan if hit("energies") else 1.0)

    def summed(weights):
        gradients(weights)
        if hit("gradient"):
            weights[0].grad.fill_(math.inf)

    def loaded(*args):
        pipeline = replace(load(*args), read=None, judge=None)  # they cost more than all the rest
        decode = pipeline.decode
        return replace(pipeline, decode=lambda latents: decode(latents) * (math.nan if hit("pixels") else 1.0))

    def red(videos, prompts):
        if not disturbed and step[0] in plan:
            raise RewardError("planned")
        return videos[:, :, 0].mean((1, 2, 3)) * (math.nan if hit("reward") else 1.0)

    def mixed(*args):
        (place / "fault").write_text("")  # that of an update that the last process did not survive
        worker = WorkerReward([sys.executable, "-S", str(place / "worker.py")], TIMEOUT)
        rewards = {"vq": red, "mq": lambda videos, prompts: videos.std((1, 2, 3, 4)), "ta": worker}
        return Mixture(rewards, dict.fromkeys(rewards, 1.0))

    kvpo.draw, kvpo.fork, kvpo.replay_energies, train.sum_gradients = drawn, forked, replayed, summed
    pocket.load_model, models.run_rewards = loaded, mixed


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """-> whether a disk of its own could be mounted there"""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def weaker(limit: int):
    """What a process does first: root gives up its rights, which no folder withstands; `limit`: of file sizes."""

    def first():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if os.getuid() == 0:  # no capabilities (Linux's version 3 of them)
            nothing = ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
            assert nothing == 0, "root could not give up its rights"

    return first


def wait(process: int, seconds: float) -> int | None:
    """-> exit code, below 0 for a signal; None: it still runs after so many seconds"""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done or time.monotonic() > end:
            return os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.002)


@contextlib.contextmanager
def disturbance(what: str, process: int, folder: Path, argv: list[str], log: Path, mounted: bool):
    """Lets it happen; what lasts is over at the end. -> the exit code of a second run, if there is one"""
    if what.startswith("SIG"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, getattr(signal, what))
        yield None
    elif what == "full disk":
        ballast = folder.parent / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while mounted:
                file.write(bytes(4096))
        yield None
        ballast.unlink(missing_ok=True)
    elif what == "read-only folder":
        folder.chmod(0o555)
        yield None
        folder.chmod(0o755)
    else:
        second = log.with_suffix(".second")
        yield kill_resume.wait_for(kill_resume.start([*argv, "--overwrite_output_dir"], second, weaker(0)))


def soak(updates: int, rng: random.Random) -> int:
    from kvpo_min.resume import checkpoints

    plan, disturbed, rows, second = plan_of(updates, rng), [], Counter(), Counter()
    with tempfile.TemporaryDirectory() as place, small_disk(Path(place) / "disk", 8) as mounted:
        place, disk = Path(place), Path(place) / "disk"
        kill_resume.make_model(place / "model")
        (place / "worker.py").write_text(SCRIPT)
        (place / "fault").write_text("")
        install(plan, place, disturbed)
        log = place / "log"
        more = f"--max_train_steps {updates} --tau 0.001 --checkpoints_total_limit 2 --output_dir".split()
        argv = ["train", "--model", str(place / "model"), *kill_resume.OPTIONS, *more]
        begun = time.monotonic()
        if kill_resume.wait_for(kill_resume.start([*argv, str(place / "whole")], log)):
            raise SystemExit(f"the run that nobody disturbs failed: {log.read_text()}")
        length, whole = time.monotonic() - begun, kill_resume.contents(place / "whole", updates)
        skips = sum("skipped" in line for line in whole["metrics"])
        print(f"undisturbed: {length:.0f} s, {skips} of {updates} updates skipped", flush=True)
        disturbed.append(True)
        folder, code, wrong, begun = disk / "run", None, [], time.monotonic()
        argv.append(str(folder))
        while code != 0:
            how = ["--resume_from_checkpoint", "latest"] if checkpoints(folder) else ["--overwrite_output_dir"]
            what = rng.choice(MOMENTS)
            tight = what == "full disk" and not mounted
            process = kill_resume.start([*argv, *how], log, weaker(3000 if tight else 0))
            code = wait(process, rng.uniform(0, 25 * length / updates))  # a start takes as long as some seven updates
            if code is None and (place / "fault").read_text() == "worker hangs" and rng.random() < 0.5:
                code = wait(process, TIMEOUT + 5)  # else no run would ever come past that update
            if code is None:
                rows[what] += 1
                with disturbance(what, process, folder, argv, log, mounted) as other:
                    if other is not None:
                        second[other] += 1
                    lasts = what in ("full disk", "read-only folder") or what.startswith("SIG")
                    code = wait(process, 120 if lasts else 0)
                if code is None and lasts and what.startswith("SIG"):
                    wrong.append(f"{what} did not end the run within 120 s")
                if code is None:  # a second run ends nothing, and a full disk only what writes: end it by another means
                    os.kill(process, signal.SIGKILL)
                    code = wait(process, 60)
                expected = {"SIGKILL": (-9,), "second run": (-9, 0), "full disk": (2, 0, -9)}
                expected["read-only folder"] = expected["full disk"]
                if code not in expected.get(what, (130, 0, -getattr(signal, what, 0))):
                    wrong.append(f"{what}: exit code {code}: {log.read_text()[-2000:]}")
            elif code:
                wrong.append(f"undisturbed for once, it ended with exit code {code}: {log.read_text()[-2000:]}")
            if len(wrong) > 3:
                break
        seconds = time.monotonic() - begun
        if code == 0:
            now = kill_resume.contents(folder, updates)
            wrong += [f"{key} differs" for key in {**whole, **now} if whole.get(key) != now.get(key)]
            if [line["step"] for line in now["metrics"]] != list(range(updates)):
                wrong.append("metrics.jsonl has lost or doubled a line")
        if set(second) - {2}:
            wrong.append(f"second runs were not refused: {dict(second)}")
    print(f"disturbed: {seconds:.0f} s, {sum(rows.values())} disturbances\n")
    print("| what | times |\n|---|---|")
    for name, times in [*Counter(plan.values()).items(), *rows.items()]:
        print(f"| {name if name not in BORDERS else f'NaN in {name}'} | {times} |")
    print(f"\n{'the same to the last bit' if not wrong else 'WRONG: ' + '; '.join(wrong)}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the faults and the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would all runs
    return soak(options.updates, random.Random(options.seed))


if __name__ == "__main__":
    sys.exit(main())
