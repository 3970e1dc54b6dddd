"""`kvpo-min demo`: aligns the embedded model in a few minutes."""

from collections.abc import Sequence

from kvpo_min.cli.options import RunOptions, parse_options, split_options
from kvpo_min.cli.run import run
from kvpo_min.config import TrainConfig
from kvpo_min.system import ends_like_ctrl_c

OPTIONS = (TrainConfig, RunOptions)
DEFAULTS = {
    "output_dir": "kvpo_demo", "event": "settles", "eval_every": 5, "max_train_steps": 40, "prefix_coef": 10.0,
    "learning_rate": 2e-3, "fuse_mode": "zscore", "tau_groups": 4, "vq": 2.0, "mq": 0.25,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    values = parse_options("demo", OPTIONS, argv, DEFAULTS)
    with ends_like_ctrl_c():
        return run(*split_options(values, *OPTIONS))
