"""The one reader of prompts files, for the pocket model and for real ones."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from kvpo_min.system import read_text

BETWEEN = " | "  # between the prompts of a script
FORMS = (
    "a .txt file with one script a line, its prompts separated by ' | ', or lines of LongLive's form "
    '\'n,[prompt],[prompt],...\'; or a .jsonl file with a line {"prompts": ["...", "..."]} a script'
)


def read_prompts(path: str | Path, check: Callable[[str], object] = str) -> list[str]:
    """The scripts of a file in one of `FORMS`, each its prompts joined by " | "; a script without prompts (LongLive's
    `0`) is "". Empty lines, and in a .txt lines that start with #, are skipped. Nothing is guessed: what has another
    form, or two forms, is refused with its line and the form. `check` raises ValueError for a script.
    Raises FileNotFoundError, and ValueError naming the file and a bad line."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompts file {path}")
    kind = path.suffix.lower()
    if kind not in ("", ".txt", ".jsonl"):
        raise ValueError(f"{path}: prompts are not read from {kind} files; expected {FORMS}")
    scripts, first = [], None
    for n, line in enumerate(read_text(path).split("\n"), 1):  # a prompt may hold other separators of lines
        if not line.strip() or kind != ".jsonl" and line.lstrip().startswith("#"):
            continue
        try:
            form = "jsonl" if kind == ".jsonl" else "LongLive's" if re.match(r"\s*\d+\s*,\s*\[", line) else "plain"
            if form == "plain" and re.fullmatch(r"\s*0\s*,?\s*", line):  # LongLive's: there is none
                scripts.append("")
                check("")
                continue
            first = first or (form, n)
            if form != first[0]:
                raise ValueError(f"expected {first[0]} form, as line {first[1]} has it, not {form}, got {line[:60]!r}")
            prompts = PARTS[form](line)
            scripts.append(BETWEEN.join(prompts))
            check(scripts[-1])
            check_words(prompts, line)
        except ValueError as error:
            raise type(error)(f"{path}, line {n}: {error}") from None
    if not scripts:
        raise ValueError(f"{path}: no prompts in it; expected {FORMS}")
    return scripts


def read_script(line: str) -> str:
    """A script that is given by itself, its prompts separated by " | ". Raises ValueError as `read_prompts` does."""
    prompts = plain(line)
    check_words(prompts, line)
    return BETWEEN.join(prompts)


def check_words(prompts: list[str], line: str) -> None:
    for prompt in prompts:
        if not is_visible(prompt):
            raise ValueError(f"a prompt is empty: expected words, got {line[:60]!r}")
        if "|" in prompt:
            raise ValueError(f"expected no | but {BETWEEN!r} between prompts, got {line[:60]!r}")
        if any(unicodedata.category(c) in ("Cc", "Cs") and c != "\t" for c in prompt):
            raise ValueError(f"expected words, but there are control characters, got {line[:60]!r}")


def is_visible(text: str) -> bool:
    """Whether there is a character that shows: spaces do not, nor those of no width."""
    return any(unicodedata.category(c) not in ("Zs", "Zl", "Zp", "Cf", "Cc") for c in text)


def plain(line: str) -> list[str]:
    """`p1 | p2 | ...` -> its prompts. JSON is refused: it would become words."""
    if re.match(r'\s*({|\[\s*(["{[]|$)|]|".*"\s*,?\s*$)', line):
        raise ValueError(f"this is JSON: expected {FORMS}")
    return [part.strip() for part in line.split(BETWEEN)]


def from_json(line: str) -> list[str]:
    try:
        (pair,) = json.loads(line, object_pairs_hook=list)  # a key that is there twice is a second pair
        prompts = pair[1] if pair[0] == "prompts" else None
    except (ValueError, KeyError, TypeError, RecursionError):
        prompts = None
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f'expected {{"prompts": ["...", "..."]}} and no other key, got {line[:60]!r}')
    return [p.strip() for p in prompts]


def bracketed(line: str) -> list[str]:
    """`n,[p1],[p2],...` -> its n prompts; brackets may nest"""
    number, _, rest = line.partition(",")
    prompts, depth, begin, outside = [], 0, 0, ""
    for k, character in enumerate(rest):
        if character == "[":
            begin = begin if depth else k + 1
            depth += 1
        elif character == "]":
            depth -= 1
            if depth == 0:
                prompts.append(rest[begin:k].strip())
        elif not depth:
            outside += character
    number = number.strip()
    told = number.isascii() and number.isdigit() and len(number) < 10 and int(number) == len(prompts)
    if depth or not told or not all(prompts) or outside.replace(" ", "").strip("\t\r") != "," * (len(prompts) - 1):
        raise ValueError(f"expected 'n,[prompt],[prompt],...' with n prompts, got {line[:60]!r}")
    return prompts


PARTS = {"plain": plain, "LongLive's": bracketed, "jsonl": from_json}
