"""Kills training runs, resumes them, and compares what they leave, bit for bit, with a run that was not killed.

    python benchmarks/kill_resume.py                                # 50 moments of SIGKILL
    python benchmarks/kill_resume.py --moments 20 --signals INT TERM

Each run is a process of its own, `kvpo-min train` without its pictures on a small random model, forked from this one,
which has done the slow imports. Two kinds of moments take turns: a time drawn evenly over the length of a run, and the
writing of a file (a random part of 4 ms after its `.aside` has appeared). The old policy is refreshed every third
update and a checkpoint written every second one, so all but the last are inside an old policy's window; only the newest
checkpoint is kept. A run that was killed before its first checkpoint must say so when it is resumed, and is then
started anew.
Prints a row for each moment and exits 1 when anything differs: weights of all policies, optimizer, generator, order of
the scripts, metrics.jsonl (but the times), summary, the final adapter, or a file that was left aside. A run that was
stopped by INT or TERM must also have saved every update that it had logged.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

UPDATES = 6
WRITTEN = ["config.yaml.aside", "checkpoint-2.aside", "checkpoint-4.aside", "checkpoint-6.aside", "adapter.aside",
           "summary.json.aside"]  # fmt: skip
OPTIONS = (
    f"--max_train_steps {UPDATES} --num_frames 24 --global_frames 0 --num_generations 2 --perturb_num_blocks 1 "
    "--rank 2 --tau_groups 1 --eval_prompts 1 --unsafe_scale 1 --old_policy_every 3 --checkpointing_steps 2 "
    "--checkpoints_total_limit 1"
).split()


def make_model(folder: Path) -> None:
    """A random model in the layout of `kvpo-min distill`; and the imports that a run needs."""
    from diffusers import WanTransformer3DModel

    from kvpo_min.config import TrainConfig
    from kvpo_min.pocket import load_pocket, world
    from kvpo_min.pocket.distill import new_autoencoder
    from kvpo_min.policies import add_policies

    torch.manual_seed(0)
    autoencoder = new_autoencoder()
    autoencoder.decoder.layers[-1].weight.data.mul_(30)  # some contrast
    autoencoder.save_pretrained(folder / "autoencoder")
    WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8,
        text_dim=world.TEXT_DIM, freq_dim=32, ffn_dim=48, num_layers=1, rope_max_seq_len=160,
    ).save_pretrained(folder / "student")  # fmt: skip
    add_policies(load_pocket(folder=folder), TrainConfig(rank=2))


def start(argv: list[str], log: Path, first=None) -> int:
    """Runs the command line in a process of its own, after `first()`; its output goes to `log`. -> its id"""
    from kvpo_min import cli
    from kvpo_min.viz import report

    process = os.fork()
    if process:
        return process
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if first:
            first()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell has set
        for name in ("draw_curves", "draw_groups", "draw_before_after"):  # they take longer than all the rest
            setattr(report, name, lambda *arguments: None)
        code = cli.main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(process: int) -> int:
    """-> exit code"""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(argv: list[str], log: Path) -> int:
    """Runs the command line to its end. -> exit code"""
    return wait_for(start(argv, log))


def kill_at(process: int, number: int, delay: float, aside: Path | None) -> tuple[int, bool]:
    """Sends the signal after `delay` seconds, counted from the start or from the moment at which the file `aside` is
    seen. -> exit code (below 0: ended by a signal), and whether the process was alive until then"""
    begun = None if aside else time.perf_counter()
    while begun is None or time.perf_counter() < begun + delay:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), False
        if begun is None and aside.exists():
            begun = time.perf_counter()
        elif begun is not None or not aside:
            time.sleep(2e-4)
    os.kill(process, number)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, code != 0 or number != signal.SIGKILL  # 0: it had just ended by itself


def log_lines(folder: Path) -> list[dict]:
    """Of metrics.jsonl, without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "step_time"} for line in lines]


def contents(folder: Path, updates: int = UPDATES) -> dict:
    """What a finished run left, without what must differ: its name and its times."""
    last = folder / f"checkpoint-{updates}"
    training = torch.load(last / "training_state.pt", weights_only=True)
    state, summary = json.loads((last / "state.json").read_text()), json.loads((folder / "summary.json").read_text())
    moments = training["optimizer"]["state"]
    found = {name: (last / f"{name}.safetensors").read_bytes() for name in ("default", "old", "ema")}
    found |= {"adapter": (folder / "adapter_model.safetensors").read_bytes(), "metrics": log_lines(folder)}
    found |= {f"optimizer {k} {name}": moments[k][name].tolist() for k in moments for name in moments[k]}
    found |= {"optimizer": training["optimizer"]["param_groups"], "generator": training["generator"].tolist()}
    found |= {key: state[key] for key in ("step", "tau", "order", "skips")}
    found |= {"summary": {key: value for key, value in summary.items() if key != "seconds"}}
    found["names"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return found


def resume(argv: list[str], log: Path) -> str:
    """-> what it took to finish the run, or what went wrong"""
    code, said = finish([*argv, "--resume_from_checkpoint", "latest"], log), log.read_text()
    if code == 0:
        return "resumed"
    if code == 2 and "nothing is left to do" in said:
        return "was done"
    if code == 2 and "there is no checkpoint" in said:
        return "started anew" if finish([*argv, "--overwrite_output_dir"], log) == 0 else f"FAILED: {log.read_text()}"
    return f"FAILED, exit code {code}: {said}"


def seen(folder: Path) -> tuple[int, int, bool]:
    """-> whole lines of metrics.jsonl, the newest checkpoint (0: none), and whether anything is half-written"""
    from kvpo_min.resume import checkpoints

    path = folder / "metrics.jsonl"
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    return lines, max(checkpoints(folder), default=0), any(folder.glob("*.aside"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--signals", nargs="+", default=["KILL"], choices=["KILL", "INT", "TERM"], help="take turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        make_model(place / "model")
        log, argv = place / "log", ["train", "--model", str(place / "model"), *OPTIONS, "--output_dir"]
        begun = time.perf_counter()
        if finish([*argv, str(place / "whole")], log):
            raise SystemExit(f"the run that nobody kills failed: {log.read_text()}")
        length, whole = time.perf_counter() - begun, contents(place / "whole")
        print(f"a run takes {length:.1f} s\n")
        print("| moment | signal | when | lines | newest checkpoint | half-written | then | the same |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for k in range(options.moments):
            name, by_time = options.signals[k % len(options.signals)], k % 2 == 0
            folder, alive, code = place / f"run{k}", False, 0
            delay, aside = rng.uniform(0, length if by_time else 4e-3), rng.choice(WRITTEN)
            while not alive:  # it may have been faster than the first one, or the file gone before it was seen
                if folder.exists():
                    folder = folder.with_name(folder.name + "_again")
                code, alive = kill_at(start([*argv, str(folder)], log), getattr(signal, f"SIG{name}"), delay,
                                      None if by_time else folder / aside)  # fmt: skip
                delay *= 0.9
            lines, newest, half = seen(folder)
            found = []
            if name == "KILL" and code != -signal.SIGKILL or name != "KILL" and code not in (130, 0, -signal.SIGTERM):
                found.append(f"exit code {code}: {log.read_text()}")
            if name != "KILL" and lines > newest:
                found.append("updates not saved")
            then = resume([*argv, str(folder)], log)
            if then.startswith("FAILED"):
                found.append(then)
            else:
                now = contents(folder)
                found += [key for key in {**whole, **now} if whole.get(key) != now.get(key)]
            when = f"{delay / 0.9:.2f} s" if by_time else aside.removesuffix(".aside")
            same = f"DIFFERS: {', '.join(found)}" if found else "yes"
            row = [k, name, when, lines, newest or "-", "yes" if half else "-", then.split(":")[0], same]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            wrong += bool(found)
    print(f"\n{options.moments - wrong} of {options.moments} runs ended as the one that was not killed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
