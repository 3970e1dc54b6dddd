"""`kvpo-min bench`: the time of one update."""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvpo_min import pocket
from kvpo_min.checks import bench
from kvpo_min.cli.folders import check_file
from kvpo_min.cli.options import parse_options
from kvpo_min.pocket.prompts import check_geometry, run_prompts
from kvpo_min.system import say, write_json

OPTIONS = (bench.BenchOptions,)


def main(argv: Sequence[str]) -> int:
    (options,) = parse_options("bench", OPTIONS, argv)
    if options.json:
        check_file(Path(options.json))
    config = bench.make_config(options)
    run_prompts(config)
    check_geometry(config)
    measure, show = (bench.scaling, bench.scaling_table) if options.scaling else (bench.bench, bench.table)
    say("measuring; other programs that run meanwhile count too ...")
    try:
        result = measure(pocket.load_model(options.model), pocket.pocket_rewards(), options)
    except bench.Disagreement as error:
        print(f"kvpo-min: error: {error}", file=sys.stderr)
        return 1
    print(show(result))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.json), result)
        print(f"\nwritten to {options.json}")
    return 0
