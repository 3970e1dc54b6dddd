"""`kvpo-min parity`: this code beside numbers recorded from the authors'."""

from collections.abc import Sequence

from kvpo_min.checks import parity
from kvpo_min.cli.options import parse_options

OPTIONS = (parity.ParityOptions,)


def main(argv: Sequence[str]) -> int:
    (options,) = parse_options("parity", OPTIONS, argv)
    found = parity.parity(options.golden)
    print(parity.table(found))
    failed = sum(not row.ok for row in found)
    print(f"\n{len(found) - failed} of {len(found)} comparisons within tolerance")
    return 1 if failed else 0
