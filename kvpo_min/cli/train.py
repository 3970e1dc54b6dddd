"""`kvpo-min train`: a run with your own prompts, length and reward, on the pocket model or on a real one."""

from collections.abc import Sequence

from kvpo_min.cli.models import real_options
from kvpo_min.cli.options import RunOptions, parse_options
from kvpo_min.cli.run import run
from kvpo_min.config import TrainConfig
from kvpo_min.system import ends_like_ctrl_c
from kvpo_min.wan.real import WanOptions

OPTIONS = (TrainConfig, RunOptions, WanOptions)


def main(argv: Sequence[str]) -> int:
    config, options, wan = parse_options("train", OPTIONS, argv)
    with ends_like_ctrl_c():
        return run(config, options, real_options(argv, options.model, wan), ["train", *argv])
