"""`kvpo-min arena`: KVPO and other methods at equal cost."""

import functools
from collections.abc import Sequence
from pathlib import Path

from kvpo_min import pocket
from kvpo_min.cli.folders import check_file
from kvpo_min.cli.models import run_rewards
from kvpo_min.cli.options import parse_options
from kvpo_min.compare import arena
from kvpo_min.system import claimed

OPTIONS = (arena.ArenaOptions,)


def main(argv: Sequence[str]) -> int:
    (options,) = parse_options("arena", OPTIONS, argv)
    check_file(Path(options.csv))
    rewards, make_pipeline = run_rewards(options), functools.partial(pocket.load_model, options.model, options.like)
    if options.plan:
        print(arena.plan(make_pipeline, rewards, options))
        return 0
    with claimed(Path(f"{options.csv}.inuse")):  # two at once would compute the same rows
        for row in arena.arena(make_pipeline, rewards, options):
            print(arena.line(row), flush=True)
    print(f"\nall rows are in {options.csv}")
    return 0
