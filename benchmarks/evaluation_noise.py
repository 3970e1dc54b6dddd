"""How much of a reward is the noise that it was measured with: the base model, the same prompts, other noise.

    python benchmarks/evaluation_noise.py
    python benchmarks/evaluation_noise.py --mode long --eval_prompts 32 --noises 3

Noise 0 is that of `kvpo-min arena`. Before and after training the noise is the same, which takes luck away as long as
a video stays what it was; a model that draws its videos anew moves towards the mean of the other rows.
"""

import argparse
from statistics import fmean, stdev

from kvpo_min.cli.models import run_rewards
from kvpo_min.compare.arena import MODES, NOISE, ArenaOptions, measure, twice
from kvpo_min.pipeline import sample
from kvpo_min.pocket import load_pocket
from kvpo_min.pocket.prompts import EVAL_SEED
from kvpo_min.pocket.world import prompt_set


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", default="settles", choices=MODES)
    parser.add_argument("--eval_prompts", type=int, default=64)
    parser.add_argument("--noises", type=int, default=4, help="beside that of the arena")
    parser.add_argument("--sweep", action="store_true", help="the prompts of the sweeps instead of the results'")
    args = parser.parse_args(argv)
    if args.noises < 1:
        parser.error(f"--noises must be at least 1, got {args.noises}")
    frames, n_segments = MODES[args.mode]
    options = ArenaOptions(csv="unused", mode=args.mode)
    prompts = prompt_set(args.eval_prompts, n_segments, EVAL_SEED + args.sweep, options.event)
    pipeline, rewards = load_pocket(), run_rewards(options, None)
    names, rows = ("reward", "vq", "mq", "ta", "judge_all"), []
    print("| noise | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for k in range(args.noises + 1):
        videos = sample(pipeline, twice(prompts), frames, seed=NOISE + k)
        each = measure(pipeline, prompts, rewards, videos)["each"]
        rows.append([each[name].mean().item() for name in names])
        print(f"| {k} | " + " | ".join(f"{value:.3f}" for value in rows[-1]) + " |", flush=True)
    others = list(zip(*rows[1:], strict=True))
    print("| mean of the others | " + " | ".join(f"{fmean(values):.3f}" for values in others) + " |")
    if args.noises > 1:
        print("| their standard deviation | " + " | ".join(f"{stdev(values):.3f}" for values in others) + " |")


if __name__ == "__main__":
    main()
