"""The command line: `kvpo-min demo | train | sample | eval | export | distill | arena | bench | doctor | parity`. Each
command is one file here, with a function `main(argv)`.

What the user can correct (words, values, files, folders) ends with one line on stderr and exit code 2, before anything
is written. Exit codes: 0 done, 1 a check or an update failed, 2 wrong input or a full disk, 130 interrupted (Ctrl-C or
SIGTERM). Only the command that was asked for is imported, so that `kvpo-min --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from kvpo_min.cli.options import COMMANDS
from kvpo_min.config import nearest_known


def usage() -> str:
    lines = [f"  {name:8} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(["usage: kvpo-min COMMAND [options]", "", "commands:", *lines, "",
                      "`kvpo-min COMMAND --help` lists the options of a command."])  # fmt: skip


def fail(error: BaseException, code: int) -> int:
    print(f"kvpo-min: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. -> exit code"""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"unknown command '{argv[0]}'{nearest_known(argv[0], list(COMMANDS))}")
        return importlib.import_module(f"kvpo_min.cli.{argv[0]}").main(argv[1:])
    except (ValueError, OSError) as error:  # the user can correct it; anything else is a bug and keeps its traceback
        return fail(error, 2)
    except FloatingPointError as error:
        return fail(error, 1)
    except RuntimeError as error:
        from kvpo_min.rewards import RewardError

        if not isinstance(error, RewardError):
            raise
        return fail(error, 2)
    except KeyboardInterrupt:
        print("kvpo-min: interrupted", file=sys.stderr)
        return 130
