"""What each method of the arena learns from: its groups and gradients at the base model, without a step.

    python benchmarks/groups.py --csv benchmarks/data/groups.csv

One line a method, mean over the groups that train: mean reward of the branches over that of the anchor, the reward's
spread inside a group, norm of the gradient, and the share of its elements that are not 0 and yet below AdamW's epsilon
(1e-8), which take no full step. An SDE that is off shows in the first two columns, a loss that says nothing in the last
two. Astrolabe's groups have no anchor.
"""

import argparse
import csv
from pathlib import Path
from statistics import fmean

import torch

from kvpo_min.compare.arena import SCRIPTS, TRAINED, ArenaOptions, config_of, updates
from kvpo_min.pocket import load_pocket, pocket_rewards
from kvpo_min.pocket.world import prompt_set
from kvpo_min.policies import adapter_weights, add_policies


def measure(method: str, n_groups: int, seed: int = 0) -> dict[str, float | str]:
    options = ArenaOptions(csv="unused")
    pipeline, config = load_pocket(), config_of(method, options, 1e-30, seed)  # a step that changes nothing
    policies = add_policies(pipeline, config)
    weights, rows = adapter_weights(policies, "default").values(), []
    scripts = prompt_set(SCRIPTS, 1, seed, options.event)
    for log in updates(pipeline, method, scripts, pocket_rewards(), config, policies):
        if log.get("grad_norm"):
            g = torch.cat([w.grad.flatten() for w in weights if w.grad is not None]).abs()
            g = g[g > 1e-20]  # the A of a fresh LoRA has gradients of rounding only
            rows.append({"over anchor": log["reward"] - log.get("anchor_reward", float("nan")),
                         "spread": log["reward_std"], "gradient": log["grad_norm"],
                         "below epsilon": (g < 1e-8).float().mean().item()})  # fmt: skip
        if len(rows) == n_groups:
            break
    return {"method": method, **{name: f"{fmean(row[name] for row in rows):.3g}" for name in rows[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--methods", default=",".join(TRAINED))
    parser.add_argument("--csv", required=True)
    args = parser.parse_args()
    Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for method in args.methods.split(","):
        rows.append(measure(method, args.groups))
        print(rows[-1], flush=True)
        with Path(args.csv).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
