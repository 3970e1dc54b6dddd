"""Writes the tables of docs/results.md from benchmarks/data.

    python benchmarks/tables.py

Between `<!-- table: NAME -->` and `<!-- end -->` stands what this makes of benchmarks/data/NAME.json; the rest of the
document is written by hand.
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from arena_tables import FREE, REGIMES, by, lines_of, regime, whole

from kvpo_min.compare.arena import read_rows
from kvpo_min.compare.baselines import EXPLORATIONS, METHODS, POLICIES, REFUSED

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


def recorded(name: str) -> list[dict[str, str]]:
    return read_rows(DATA / f"arena_{name}.csv")


def ends_of(name: str) -> dict[tuple[str, str], list[dict[str, str]]]:
    return {key: whole(own) for key, own in lines_of(recorded(name)).items()}


def gain(row: Mapping[str, str]) -> float:
    return float(row["reward_after"]) - float(row["reward_before"])


def judged(rows: Sequence[Mapping[str, str]], name: str) -> str:
    return spread([float(row[f"judge_{name}_after"]) for row in rows])


def liked(row: Mapping[str, str]) -> float:
    return float(row["judge_liked_after"])


def ahead(ours: Sequence[Mapping[str, str]], theirs: Sequence[Mapping[str, str]], by: Callable = gain) -> str:
    """By how much more the reward rises (or what `by` says), over the seeds that both have."""
    other = {row["seed"]: by(row) for row in theirs}
    return spread([by(row) - other[row["seed"]] for row in ours if row["seed"] in other], "+")


def arena() -> str:
    """Both regimes, a row a method: where memory decides with the past held, where noise does without. A method with a
    loop of its own, or that trains nothing, has no such setting."""
    names = ("liked", "journey")
    parts = [{m: whole(own) for m, own in regime(recorded(mode), mode).items()} for mode in REGIMES]
    rise = {m: statistics.fmean(map(gain, own)) for part in reversed(parts) for m, own in part.items()}
    methods = sorted(rise, key=rise.get, reverse=True)
    head, first = ["method"], ["before training"]
    for part, title in zip(parts, ("memory", "noise"), strict=True):
        head += [f"{title}: seeds", *names, "reward", "KVPO ahead by"]
        before = part["kvpo"][0]
        first += ["-", *(spread([float(before[f"judge_{name}_before"])]) for name in names), "-", "-"]
    rows = []
    for method in methods:
        cells = [method]
        for part in parts:
            own = part.get(method, [])
            cells += [
                str(len(own)) if own else "-", *(judged(own, name) for name in names),
                spread(list(map(gain, own)), "+"), ahead(part["kvpo"], own) if method != "kvpo" else "-",
            ]  # fmt: skip
        rows.append(cells)
    return table(head, [first, *rows])


def arena_hold() -> str:
    """Does holding the past help, and whom: `liked`, and in brackets stories in their order."""
    held = {"settles": ("", FREE), "wanders": ("", "prefix_coef=1.5", FREE)}
    found = {mode: ends_of(mode) for mode in held}
    methods = [m for m in dict.fromkeys(m for own in found.values() for m, s in own if s == FREE) if "+" not in m]

    def cell(own: Sequence[Mapping[str, str]]) -> str:
        return f"{judged(own, 'liked')} ({judged(own, 'journey')})" if own else "-"

    title, how = {"settles": "memory", "wanders": "noise"}, {"": "15", "prefix_coef=1.5": "1.5", FREE: "0"}
    head = ["method", *(f"{title[mode]}: {how[s]}" for mode, settings in held.items() for s in settings)]
    rows = [[m, *(cell(found[mode].get((m, s), [])) for mode, settings in held.items() for s in settings)]
            for m in methods]  # fmt: skip
    return table(head, rows)


def arena_grid() -> str:
    """Exploration x policy: `liked` where memory decides / where noise does. Of several methods in a cell the bare one,
    else the one whose reward rises most."""
    found = {mode: ends_of(mode) for mode in REGIMES}

    def cell(exploration: str, policy: str) -> str:
        if (exploration, policy) in REFUSED:
            return "refused"
        in_it = [f"{exploration}+{policy}", *(
            name for name, m in METHODS.items()
            if (m.exploration, m.policy) == (exploration, policy) and name not in ("kvpo", "astrolabe", "rwr")
        )]  # fmt: skip
        shown = []
        for mode, (_, setting) in REGIMES.items():
            own = [rows for name in in_it if (rows := found[mode].get((name, setting)))]
            if f"{exploration}+{policy}" not in {rows[0]["method"] for rows in own}:
                own.sort(key=lambda rows: -statistics.fmean(map(gain, rows)))
            shown.append(judged(own[0], "liked") if own else "-")
        return " / ".join(shown)

    return table(["exploration", *POLICIES], [[e, *(cell(e, p) for p in POLICIES)] for e in EXPLORATIONS])


def arena_mixture() -> str:
    """Scripts that hold both events: a row a taste, method and hold on the past."""
    rows = []
    for (like,), all_of_it in by(recorded("mixture"), "like").items():
        for (method, setting), own in lines_of(all_of_it).items():
            own = whole(own)
            before, after = [[float(row[f"judge_liked_{when}"]) for row in own] for when in ("before", "after")]
            rows.append([like.replace(",", ", "), method, "no" if setting == FREE else "yes", str(len(own)),
                         f"{spread(before[:1])} to {spread(after)}", judged(own, "journey"),
                         spread(list(map(gain, own)), "+")])  # fmt: skip
    return table(["liked are", "method", "past held", "seeds", "liked", "journey", "reward"], rows)


def arena_selective() -> str:
    """What a KL to the reference does to Astrolabe when taste alone is rewarded, at half the budget and at the end."""
    rows = []
    for (setting,), own in by(recorded("selective"), "set").items():
        held = dict(pair.split("=") for pair in setting.split(","))
        weight, which = held["kl_coef"], "all" if "selective" in held else "the suspicious"
        half, end = own
        which = which if float(weight) else "-"
        rows.append([weight, which, *(judged([half], name) for name in ("liked", "journey")),
                     *(judged([end], name) for name in ("liked", "journey", "valid")),
                     spread([float(end["vq_after"]) - float(end["vq_before"])], "+")])  # fmt: skip
    head = ["KL", "on which candidates", "half-way: liked", "journey", "end: liked", "journey", "valid",
            "gain of taste"]  # fmt: skip
    return table(head, rows)


def arena_ablations() -> str:
    """KVPO with one setting changed; differences to KVPO as it is, over seeds."""
    found = ends_of("ablations")
    usual, rows = found["kvpo", ""], []
    for (_, setting), own in found.items():
        less = [ahead(own, usual, by) if setting else "-" for by in (liked, gain)]
        steps = str(round(statistics.fmean(float(row["updates"]) for row in own)))
        rows.append([setting or "as it is", steps, judged(own, "liked"), less[0], judged(own, "journey"),
                     spread(list(map(gain, own)), "+"), less[1]])  # fmt: skip
    rows.sort(key=lambda row: row[0] != "as it is")
    begin = [spread([float(usual[0][f"judge_{name}_before"])]) for name in ("liked", "journey")]
    rows.insert(0, ["before training", "-", begin[0], "-", begin[1], "-", "-"])
    return table(["changed", "updates", "liked", "more than as it is", "journey", "reward", "more than as it is"], rows)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error, of those that exist."""
    values = [value for value in values if value == value]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.2f}"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return re.sub(r"\b0\.", ".", mean + error)


def made(name: str) -> str:
    """The table of benchmarks/data/NAME.json; "who_decides" and those of the arena are made of several files."""
    several = (who_decides, arena, arena_hold, arena_grid, arena_mixture, arena_selective, arena_ablations)
    of_several = {f.__name__: f for f in several}
    if name in of_several:
        return of_several[name]()
    found = json.loads((DATA / f"{name}.json").read_text())
    kind = next(kind for kind in (distillation, exploration, seeds) if name.startswith(kind.__name__))
    return kind(found)


def rewritten(text: str) -> str:
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{made(found[2])}\n\n{found[3]}", text)


if __name__ == "__main__":
    RESULTS.write_text(rewritten(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")
