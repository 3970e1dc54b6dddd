"""Six ways to spoil a run of KVPO, and the run itself, to be shown side by side.

    python benchmarks/break_it.py --json benchmarks/data/break_it.json

Each is `kvpo-min demo` with one thing changed (`RUNS`), cut to four updates, so that all take some 20
minutes on one core. Kept are the lines of metrics.jsonl, and what the judge sees in held-out videos every few updates.
A run that is in the file already is not made again. The letters do not give the changes away: which is which stands in
the file, as its "name".
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from kvpo_min.cli.demo import DEFAULTS
from kvpo_min.config import TrainConfig
from kvpo_min.pipeline import evaluate
from kvpo_min.pocket import load_pocket, pocket_rewards
from kvpo_min.pocket.prompts import run_prompts
from kvpo_min.policies import add_policies
from kvpo_min.train import train

WEIGHTS = ("vq", "mq", "ta")
RUNS = {  # letter -> name, and what is changed: options of `kvpo-min demo`; `times`: factors on what the demo has
    "healthy": ("nothing", {}),
    "A": ("learning_rate x 10", {"times": {"learning_rate": 10}}),
    "B": ("one reward", {"mq": 0.0, "ta": 0.0}),
    "C": ("tau / 100", {"times": {"tau": 0.01}}),
    "D": ("nearest 0", {"nearest": 0}),
    "E": ("no anchor", {"fuse_mode": "zscore", "anchor_in_group": False}),
    "F": ("no brakes", {"kl_coef": 0.0, "prefix_coef": 0.0}),
}
KEPT = ("valid", "journey", "coherent", "liked", "liked anew")


def settings(change: dict, updates: int, seed: int) -> tuple[TrainConfig, dict]:
    """-> the configuration, and the weights of the rewards"""
    options = DEFAULTS | {name: value for name, value in change.items() if name != "times"}
    names = TrainConfig.__dataclass_fields__
    config = TrainConfig(**{name: value for name, value in options.items() if name in names})
    changed = {name: factor * getattr(config, name) for name, factor in change.get("times", {}).items()}
    weights = {name: options[name] for name in WEIGHTS}
    return replace(config, max_train_steps=updates, seed=seed, **changed), weights


def run(name: str, change: dict, updates: int, every: int, n_prompts: int, seed: int) -> dict:
    """-> {"name": ..., "change": ..., "log": lines as in metrics.jsonl, the held-out curve among them}"""
    config, weights = settings(change, updates, seed)
    pipeline, rewards = load_pocket(), pocket_rewards(**weights)
    policies = add_policies(pipeline, config)
    scripts, held_out = run_prompts(config, "", DEFAULTS["event"], n_prompts)
    found = {"name": name, "change": change, "log": []}

    def measure(prefix: str) -> dict:
        result = evaluate(pipeline, held_out, rewards, config.num_frames)
        seen = {"reward": result["reward"]} | {name: result["judge"][name] for name in KEPT}
        return {f"{prefix}/{name}": round(x, 4) for name, x in seen.items() if math.isfinite(x)}

    begin = measure("eval0")
    try:
        for step in tqdm(train(pipeline, scripts, rewards, config, policies), total=updates, leave=False):
            line = step.log() | (begin if not found["log"] else {})
            if (step.step + 1) % every == 0:
                line |= measure("eval")
            found["log"].append({key: round(value, 6) for key, value in line.items() if key != "step_time"})
    except FloatingPointError as error:  # it ends as the loop says
        found["ended"] = str(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--every", type=int, default=1, help="updates between two points of the curve")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts of a point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default=",".join(RUNS), help="letters")
    parser.add_argument("--json", required=True, help="file that the runs are kept in")
    args = parser.parse_args()
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    for letter in args.runs.split(","):
        if letter not in found:
            found[letter] = run(*RUNS[letter], args.updates, args.every, args.prompts, args.seed)
            path.write_text(json.dumps(found, indent=1) + "\n")
        print(letter, found[letter]["name"], found[letter]["log"][-1], flush=True)


if __name__ == "__main__":
    main()
