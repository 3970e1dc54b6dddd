"""One reward alone, until it is hacked: frames of the same prompts and noise before and after.

    python benchmarks/hacking.py --vq 1 --mq 0 --ta 0 --output figures/arena/hacked_vq.png

Trains a method of the arena as `kvpo-min arena` does (same scripts, forks and steps) and draws the first evaluation
prompts under the weights that it ends with.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

import torch

from kvpo_min.compare.arena import MODES, NOISE, SCRIPTS, ArenaOptions, config_of, counting, updates
from kvpo_min.pipeline import sample
from kvpo_min.pocket import load_pocket, pocket_rewards
from kvpo_min.pocket.prompts import EVAL_SEED
from kvpo_min.pocket.world import prompt_set
from kvpo_min.policies import add_policies
from kvpo_min.viz import before_after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="flow_grpo")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forwards", type=int, default=40000)
    parser.add_argument("--prompts", type=int, default=4)
    for name in ("vq", "mq", "ta"):
        parser.add_argument(f"--{name}", type=float, default=1.0)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    options = ArenaOptions(csv=os.devnull)
    frames, segments = MODES[options.mode]
    pipeline, config = load_pocket(), config_of(args.method, options, args.learning_rate, args.seed)
    prompts = prompt_set(args.prompts, segments, EVAL_SEED, options.event)

    @torch.no_grad()
    def look():
        return pipeline.decode(torch.cat(list(sample(pipeline, prompts, frames, seed=NOISE))))

    before, counts = look(), Counter()
    scripts = prompt_set(SCRIPTS, segments, args.seed, options.event)
    rewards = pocket_rewards(args.vq, args.mq, args.ta)
    with counting(pipeline.backbone, counts):
        for log in updates(pipeline, args.method, scripts, rewards, config, add_policies(pipeline, config)):
            print(f"{counts['forward']:,} forward passes, reward {log['reward']:.3f}", flush=True)
            if counts["forward"] >= args.forwards:
                break
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    before_after(before, look(), prompts).save(args.output)


if __name__ == "__main__":
    main()
