"""Writes the tables of docs/results.md from benchmarks/data.

    python benchmarks/tables.py

Between `<!-- table: NAME -->` and `<!-- end -->` stands what this makes of benchmarks/data/NAME.json; the rest of the
document is written by hand.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpo_min.compare.arena import read_rows

ROOT = Path(__file__).parents[1]
DATA, RESULTS = ROOT / "benchmarks" / "data", ROOT / "docs" / "results.md"
JUDGED = ("valid", "colour", "shape", "motion", "scene", "journey", "remembered", "coherent", "distance")
LEARNED = ("liked", "liked anew", "coherent", "journey", "valid")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share(x: float | None, digits: int = 2) -> str:
    """.97, 1.00, or a dash for what does not exist (null in JSON)."""
    return "-" if x is None else f"{x:.{digits}f}".removeprefix("0")


def distillation(found: Mapping) -> str:
    rows = [
        [name, *(share(model["judge"].get(measure), 3) for measure in JUDGED)]
        for name, model in found.items()
    ]  # fmt: skip
    return table(["model", *JUDGED], rows)


def exploration(found: Mapping) -> str:
    head = ["what differs", "another scene than the anchor", "settles where its frames say", "spread of the reward",
            "distance from clean frames, over the anchor's"]  # fmt: skip
    keys = {"different scene": 2, "remembered": 2, "spread": 3, "distance ratio": 2}
    rows = [[way, *(share(row.get(key), n) for key, n in keys.items())] for way, row in found["ways"].items()]
    return table(head, rows)


def who_decides() -> str:
    """Of all three events: the share of branches that tell another story, and the spread of a group's rewards."""
    parts = {"settles": "scene", "wanders": "place", "turns": "colour"}
    ways = {event: json.loads((DATA / f"exploration_{event}.json").read_text())["ways"] for event in parts}
    head = ["what differs", *(f"{event}: another {part}" for event, part in parts.items()),
            *(f"{event}: spread" for event in parts)]  # fmt: skip
    rows = [
        [way, *(share(ways[event][way][f"different {part}"]) for event, part in parts.items()),
         *(share(ways[event][way]["spread"], 3) for event in parts)]
        for way in ways["settles"]
    ]  # fmt: skip
    return table(head, rows)


def seeds(found: Mapping) -> str:
    """One row a run; of three seeds or more the mean with its standard error; shares of no films are left out."""
    runs, rows = list(found.values()), []
    rise = [f"{run['seconds to rise']:.0f} s" for run in runs if run.get("seconds to rise")]
    rises = rise if len(rise) == len(runs) else []  # older files do not say
    for k, (name, run) in enumerate(found.items()):
        changes = [f"{share(run['before'][key])} to {share(run['after'][key])}" for key in LEARNED]
        rows.append([name, *changes, time_of([run]), *rises[k : k + 1]])
    head = ["run", *LEARNED, "time", *["liked +.2 after" for _ in rises[:1]]]
    if len({name.rsplit(", ", 1)[1] for name in found}) < 3:
        return table(head, rows)
    means = []
    for key in LEARNED:
        gains = [run["after"][key] - run["before"][key] for run in runs if run["after"][key] is not None]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        means.append(f"{statistics.fmean(gains):+.2f} ± {error:.2f}")
    rows.append(["mean change", *means, time_of(runs), *["" for _ in rises[:1]]])
    return table(head, rows)


def time_of(runs: Sequence[Mapping]) -> str:
    """Their mean, or a dash: where a run was suspended its time is null."""
    seconds = [run["seconds"] for run in runs]
    return "-" if None in seconds else f"{statistics.fmean(seconds):.0f} s"


def arena(rows: Sequence[Mapping[str, str]]) -> str:
    """One row a method, best first, at its whole budget: mean over the seeds that are reported with its standard error;
    where no method has one yet, the best learning rate of the sweep, one seed. Shares of no films are left out."""
    rows = [row for row in rows if not row["note"] and row["budget"] in (row["asked"], "0")]
    rows = [row for row in rows if row["purpose"] == "result"] or rows
    names = ("liked", "liked_anew", "coherent", "journey", "valid")
    lines, before = [], rows[0]
    swept = rows[0]["purpose"] != "result"  # then the best rate counts, else each has a line
    keys = [(row["method"], row["set"], swept or row["learning_rate"]) for row in rows]
    for key in dict.fromkeys(keys):
        own, (method, changed, _) = [row for row, its in zip(rows, keys, strict=True) if its == key], key
        ran = own if own[0]["purpose"] == "result" else [max(own, key=lambda row: float(row["reward_after"]))]
        gains = [float(row["reward_after"]) - float(row["reward_before"]) for row in ran]
        cells = [spread([float(row[f"judge_{name}_after"]) for row in ran]) for name in names]
        rate = "-" if float(ran[0]["learning_rate"]) == 0 else ran[0]["learning_rate"]
        seeds = str(len(ran)) if ran[0]["purpose"] == "result" else "sweep"
        passes = f"{statistics.fmean(float(row['forwards']) for row in ran) / 1000:.1f}"
        label = f"{method} {changed}".strip()
        lines.append((statistics.fmean(gains), [label, rate, seeds, passes, *cells, spread(gains, "+")]))
    lines.sort(key=lambda line: -line[0])
    begin = [spread([float(before[f"judge_{name}_before"])]) for name in names]
    first = ["before training", "-", "-", "-", *begin, "-"]
    head = ["method", "rate", "seeds", "thousand passes", *(name.replace("_", " ") for name in names), "reward"]
    return table(head, [first, *(line for _, line in lines)])


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error, of those that exist."""
    values = [value for value in values if value == value]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.2f}"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return re.sub(r"\b0\.", ".", mean + error)


def made(name: str) -> str:
    """The table of benchmarks/data/NAME.json; "who_decides" is made of three files."""
    if name == "who_decides":
        return who_decides()
    if name.startswith("arena"):
        return arena(read_rows(DATA / f"{name}.csv"))
    found = json.loads((DATA / f"{name}.json").read_text())
    kind = next(kind for kind in (distillation, exploration, seeds) if name.startswith(kind.__name__))
    return kind(found)


def rewritten(text: str) -> str:
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{made(found[2])}\n\n{found[3]}", text)


if __name__ == "__main__":
    RESULTS.write_text(rewritten(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")
