"""`kvpo-min demo`: aligns the embedded model in a few minutes."""

from collections.abc import Sequence

from kvpo_min.cli.options import RunOptions, parse_options
from kvpo_min.cli.run import run
from kvpo_min.config import TrainConfig

OPTIONS = (TrainConfig, RunOptions)
DEFAULTS = {
    "output_dir": "kvpo_demo", "event": "from the,settles", "num_frames": 30, "fork": 27, "perturb_num_blocks": 1,
    "in_order": True, "max_train_steps": 10, "groups_per_update": 6, "num_iterations": 5, "eval_every": 2,
    "learning_rate": 1e-2, "lr_scheduler": "linear", "lr_warmup_steps": 0, "max_grad_norm": 0.04, "tau": 2.0,
    "kl_coef": 0.3, "prefix_coef": 15.0, "grad_steps": 2, "anchor_in_group": True, "fuse_mode": "none", "adv_eps": 0.2,
    "unsafe_scale": 1.0, "vq": 3.0, "ta": 3.0, "mq": 0.1, "processes": 0,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    config, options = parse_options("demo", OPTIONS, argv, DEFAULTS)
    return run(config, options, command=["demo", *argv])
