"""`kvpo-min doctor`: every invariant of an update, and the files of a run."""

from collections.abc import Sequence
from pathlib import Path

from kvpo_min.checks import doctor
from kvpo_min.cli import train
from kvpo_min.cli.options import parse_options

OPTIONS = (doctor.DoctorOptions,)


def read_config(path: Path) -> list:
    """The options of a run. Raises ValueError or OSError for what `kvpo-min train --config` would refuse."""
    return parse_options("train", train.OPTIONS, ["--config", str(path)])


def main(argv: Sequence[str]) -> int:
    (options,) = parse_options("doctor", OPTIONS, argv)
    if options.output_dir and not Path(options.output_dir).is_dir():
        raise FileNotFoundError(f"there is no run folder {options.output_dir}")
    checks = doctor.check_update(options)
    if options.output_dir:
        checks += doctor.check_run_folder(Path(options.output_dir), options.model, read_config)
    for check in checks:
        print(f"{'PASS' if check.passed else 'FAIL'}  {check.name}{f'  ({check.seen})' if check.seen else ''}")
        if not check.passed:
            print(f"      usual cause: {check.cause}")
    failed = sum(not check.passed for check in checks)
    print(f"\n{len(checks) - failed} of {len(checks)} checks passed")
    return 1 if failed else 0
