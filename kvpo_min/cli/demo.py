"""`kvpo-min demo`: aligns the embedded model in a few minutes."""

from collections.abc import Sequence

from kvpo_min.cli.options import RunOptions, parse_options, split_options
from kvpo_min.cli.run import run
from kvpo_min.config import TrainConfig
from kvpo_min.system import ends_like_ctrl_c

OPTIONS = (TrainConfig, RunOptions)
DEFAULTS = {
    "output_dir": "kvpo_demo", "event": "from the,settles", "eval_every": 4, "max_train_steps": 12,
    "num_iterations": 5, "learning_rate": 3e-3, "tau": 2.0, "kl_coef": 0.3, "prefix_coef": 20.0, "adv_eps": 0.05,
    "unsafe_scale": 1.0, "grad_steps": 2, "vq": 3.0, "ta": 3.0, "mq": 0.1,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    values = parse_options("demo", OPTIONS, argv, DEFAULTS)
    with ends_like_ctrl_c():
        return run(*split_options(values, *OPTIONS))
