"""Where an update of the demo spends its time: by phase and by operator.

    python benchmarks/operators.py
    python benchmarks/operators.py --threads 2
    ATEN_CPU_CAPABILITY=avx2 python benchmarks/operators.py

One update of `kvpo-min demo` (6 groups, 5 iterations) in one process, after one that is not counted. Seconds of each
phase are those that it takes itself, without the phases inside it; of each operator those of its own kernel, by
torch.profiler, which slows the update by some per cent. Prints a table of each.
"""

import argparse
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from kvpo_min import kvpo
from kvpo_min.config import TrainConfig
from kvpo_min.pocket import load_model, pocket_rewards, recipe
from kvpo_min.pocket.prompts import run_prompts
from kvpo_min.policies import add_policies
from kvpo_min.train import train

PHASES = {  # function of kvpo.py -> what it is
    "make_prefixes": "prefixes",
    "roll_out": "branches and anchor",
    "score_group": "pictures and rewards",
    "energies_of": "energies, all policies",
    "send_back": "backward of the energies",
    "preserve": "preservation, with its backward",
}
SHOWN = 10


@contextmanager
def timed(seconds: Counter):
    """Adds to `seconds` what each phase takes itself, while this lasts."""
    running, originals = [], {name: getattr(kvpo, name) for name in PHASES}

    def measured(name, function):
        def call(*args, **kwargs):
            if name == "make_prefixes":  # a generator works when it is asked
                return pulled(function(*args, **kwargs))
            return clocked(name, lambda: function(*args, **kwargs))

        def pulled(source):
            while True:
                try:
                    yield clocked(name, lambda: next(source))
                except StopIteration:
                    return

        return call

    def clocked(name, work):
        begun = time.perf_counter()
        running.append(0.0)
        try:
            return work()
        finally:
            spent, inside = time.perf_counter() - begun, running.pop()
            seconds[name] += spent - inside
            if running:
                running[-1] += spent

    for name, function in originals.items():
        setattr(kvpo, name, measured(name, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(kvpo, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = replace(TrainConfig(**recipe.TRAINING), max_train_steps=4)
    pipeline = load_model("")
    scripts, _ = run_prompts(config, "", recipe.EVENT)
    updates = train(pipeline, scripts, pocket_rewards(**recipe.WEIGHTS), config, add_policies(pipeline, config))
    next(updates)
    seconds = Counter()
    with timed(seconds):
        begun = time.perf_counter()
        next(updates)
        whole = time.perf_counter() - begun
    print(f"{torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s): an update in {whole:.1f} s\n")
    seconds["optimizer and the rest"] = whole - sum(seconds.values())
    print("| phase | seconds | share |\n|---|---|---|")
    for name, spent in seconds.most_common():
        print(f"| {PHASES.get(name, name)} | {spent:.2f} | {spent / whole:.0%} |")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        next(updates)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("\n| operator | calls | seconds | share |\n|---|---|---|---|")
    for event in events[:SHOWN]:
        spent = event.self_cpu_time_total
        print(f"| {event.key} | {event.count:,} | {spent / 1e6:.2f} | {spent / total:.0%} |")


if __name__ == "__main__":
    main()
