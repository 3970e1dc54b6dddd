"""The command line: `kvpo-min demo | train | sample | eval | export | distill | arena | bench | doctor | parity`. Each
command is one file here, with a function `main(argv)`.

What the user can correct (words, values, files, folders) ends with one line on stderr and exit code 2, before anything
is written. Exit codes: 0 done, 1 a check or an update failed, 2 wrong input or a full disk, 130 interrupted (Ctrl-C or
any other signal that ends a process). What cannot be printed is no failure: results are in files before.
Only the command that was asked for is imported, so that `kvpo-min --help` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

from kvpo_min.cli.options import COMMANDS
from kvpo_min.config import nearest_known


def usage() -> str:
    lines = [f"  {name:8} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(["usage: kvpo-min COMMAND [options]", "", "commands:", *lines, "",
                      "`kvpo-min COMMAND --help` lists the options of a command."])  # fmt: skip


class Patient:
    """stdout or stderr, except that a reader who went away, a full disk or a letter that it lacks raises nothing."""

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None else stream  # it was closed: `2>&-`
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (AttributeError, OSError, ValueError):  # what it still holds would fail once more when Python ends
            with contextlib.suppress(AttributeError, OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def patient_output() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Patient, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def fail(error: BaseException, code: int) -> int:
    print(f"kvpo-min: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. -> exit code"""
    with patient_output():
        return answer(list(sys.argv[1:] if argv is None else argv))


def answer(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"unknown command '{argv[0]}'{nearest_known(argv[0], list(COMMANDS))}")
        command = importlib.import_module(f"kvpo_min.cli.{argv[0]}")
        from kvpo_min.system import ends_like_ctrl_c

        with ends_like_ctrl_c():
            return command.main(argv[1:])
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
