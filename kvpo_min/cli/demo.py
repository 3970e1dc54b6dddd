"""`kvpo-min demo`: aligns the embedded model in a few minutes."""

from collections.abc import Sequence

from kvpo_min.cli.options import RunOptions, parse_options
from kvpo_min.cli.run import run
from kvpo_min.config import TrainConfig
from kvpo_min.pocket import recipe

OPTIONS = (TrainConfig, RunOptions)
DEFAULTS = {
    "output_dir": "kvpo_demo", "event": recipe.EVENT, "max_train_steps": 10, "eval_every": 2, "processes": 0,
    **recipe.TRAINING, **recipe.WEIGHTS,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    config, options = parse_options("demo", OPTIONS, argv, DEFAULTS)
    return run(config, options, command=["demo", *argv])
