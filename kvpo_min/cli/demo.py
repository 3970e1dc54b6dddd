"""`kvpo-min demo`: aligns the embedded model in a few minutes."""

from collections.abc import Sequence

from kvpo_min.cli.options import RunOptions, parse_options, split_options
from kvpo_min.cli.run import run
from kvpo_min.config import TrainConfig
from kvpo_min.system import ends_like_ctrl_c

OPTIONS = (TrainConfig, RunOptions)


def main(argv: Sequence[str]) -> int:
    values = parse_options("demo", OPTIONS, argv, {"output_dir": "kvpo_demo", "event": "changes colour"})
    with ends_like_ctrl_c():
        return run(*split_options(values, *OPTIONS))
