"""Tables and figures of the arena, from its CSV.

    python benchmarks/arena_tables.py --csv benchmarks/data/arena_settles.csv --output arena.md
    python benchmarks/arena_tables.py --regimes figures/arena.png
    python benchmarks/arena_tables.py --hacking figures/hacking.png

The first writes all that a file holds; files of several machines can be given together. Changes are after - before on
the evaluation prompts, with their standard error over seeds; one seed has none. "over prompts" is the standard error of
the paired change, mean over seeds. The learning rate of a method was chosen on a seed and on evaluation prompts that
are in the table of the sweep alone. A run that went on counts at every budget at which it was evaluated.

The second draws what the comparison is for: what is learned where memory decides, and where noise does. The third: what
the reward gains, and what the story loses, when the taste alone is rewarded.
"""

import argparse
import math
import re
import statistics
from pathlib import Path

from kvpo_min.compare.arena import HERE, UNTRAINED, read_rows
from kvpo_min.compare.baselines import METHODS
from kvpo_min.pocket.world import DAYLIGHT
from kvpo_min.viz import ANCHOR, BRANCHES

SHOWN = {"reward": "reward", "vq": "VQ", "mq": "MQ", "ta": "TA", "judge_all": "judge: all", "judge_valid": "valid",
         "judge_liked": "liked", "judge_liked_anew": "liked anew", "judge_coherent": "coherent",
         "judge_journey": "journey", "judge_distance": "distance", "sharpness": "sharpness",
         "motion_energy": "motion energy", "diversity": "diversity"}  # fmt: skip
SMALL = ("sharpness", "motion_energy")  # whose changes need more digits
FREE = "prefix_coef=0"  # nothing holds the past
HOLDLESS = ("astrolabe", *UNTRAINED)  # methods that have no such setting
REGIMES = {"settles": ("where memory decides, past held", ""), "wanders": ("where noise decides, past not held", FREE)}
NAMES = {"kvpo": "KVPO", "cm_grpo": "CM-GRPO", "flow_grpo": "Flow-GRPO", "dance_grpo": "DanceGRPO", "rwr": "RWR",
         "neighbor_grpo": "Neighbor GRPO", "ar_copo": "AR-CoPO", "diffusion_nft": "DiffusionNFT",
         "astrolabe": "Astrolabe", "best_of_n": "Best-of-N, untrained",
         "best_of_n_chunks": "Best-of-N by chunks, untrained"}  # fmt: skip
INKS = [colour if colour != "#F0E442" else "#808000" for colour in BRANCHES]  # text in yellow on white is not readable
COLOURS = dict(zip((*METHODS, *UNTRAINED), (*INKS, "black", ANCHOR, "black"), strict=True))  # in every figure


def change(row: dict[str, str], name: str) -> float:
    """After - before; nan where the row has no such number."""
    if not row[f"{name}_after"]:
        return math.nan
    return float(row[f"{name}_after"]) - float(row[f"{name}_before"])


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; the error of one value is nan."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def shown(values: list[float], digits: int = 3) -> str:
    mean, error = mean_error(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:+.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def by(rows: list[dict], *names: str) -> dict[tuple[str, ...], list[dict]]:
    """Rows in groups of equal values, in the order they first come in."""
    out: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        out.setdefault(tuple(row[name] for name in names), []).append(row)
    return out


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def thousands(rows: list[dict], name: str) -> str:
    return f"{statistics.fmean(float(row[name]) for row in rows) / 1000:.1f}"


def best_of(sweep: list[dict]) -> str:
    """The learning rate with the largest gain in reward."""
    gains = {row["learning_rate"]: -math.inf if row["note"] else change(row, "reward") for row in sweep}
    return max(gains, key=gains.get)


def main_table(rows: list[dict]) -> str:
    """One line a method and learning rate: the rows of its last budget."""
    header = ["method", "learning rate", "seeds", "forward, thousands", "backward, thousands", "passes a video",
              "minutes", "reward", "over prompts", *list(SHOWN.values())[1:]]  # fmt: skip
    lines = []
    for (method, rate), own in by(rows, "method", "learning_rate").items():
        ran = [row for row in own if not row["note"]]
        lost = f" ({len(own) - len(ran)} diverged)" if len(ran) < len(own) else ""
        rate = "-" if method in UNTRAINED else rate
        if not ran:
            lines.append([method, rate, f"0{lost}", *["-"] * (len(header) - 3)])
            continue
        changes = [shown([change(r, name) for r in ran], 5 if name in SMALL else 3) for name in SHOWN]
        prompts = statistics.fmean(float(r["reward_sem"]) for r in ran)
        lines.append([method, rate, f"{len(ran)}{lost}", thousands(ran, "forwards"), thousands(ran, "backwards"),
                      f"{float(ran[0]['passes_per_video']):.0f}",
                      f"{statistics.fmean(float(r['seconds']) for r in ran) / 60:.1f}",
                      changes[0], f"{prompts:.3f}", *changes[1:]])  # fmt: skip
    before = [f"{float(rows[0][f'{name}_before'] or 'nan'):.{5 if name in SMALL else 3}f}" for name in SHOWN]
    lines.insert(0, ["base model", *["-"] * 6, before[0], "-", *before[1:]])
    return markdown(header, lines)


def sweep_table(rows: list[dict]) -> str:
    """Change of the reward at each learning rate, with its error over prompts; the chosen one in bold."""
    rates = sorted({row["learning_rate"] for row in rows}, key=float)
    lines = []
    for (method, settings), own in by(rows, "method", "set").items():
        best, tried = best_of(own), sorted((row["learning_rate"] for row in own), key=float)
        cells = {row["learning_rate"]: "diverged" if row["note"] else
                 f"{change(row, 'reward'):+.3f} ± {float(row['reward_sem']):.3f}" for row in own}  # fmt: skip
        cells[best] = f"**{cells[best]}**"
        edge = "edge" if best in (tried[0], tried[-1]) else ""
        lines.append([f"{method} {settings}".strip(), *(cells.get(rate, "") for rate in rates), edge])
    return markdown(["method", *rates, "best at the edge"], lines)


def ablation_table(rows: list[dict], plain: list[dict]) -> str:
    """One line a setting, below the method as it is (plain). "against defaults": the difference of the two changes of
    the reward, over the seeds that both have."""
    names = ("reward", "vq", "mq", "ta", "judge_all", "judge_valid", "judge_liked", "judge_liked_anew",
             "judge_coherent", "judge_journey", "judge_distance", "diversity")  # fmt: skip
    lines = []
    for (method, rate), changed in by(rows, "method", "learning_rate").items():
        usual = [row for row in plain if (row["method"], row["learning_rate"]) == (method, rate) and not row["note"]]
        gains = {row["seed"]: change(row, "reward") for row in usual}
        for (settings,), own in by([*usual, *changed], "set").items():
            ran = [row for row in own if not row["note"]]
            changes = [shown([change(row, name) for row in ran] or [math.nan]) for name in names]
            more = [change(row, "reward") - gains[row["seed"]] for row in ran if row["seed"] in gains and settings]
            lines.append([settings or "-", method, "-" if method in UNTRAINED else rate, str(len(ran)), changes[0],
                          shown(more or [math.nan]), *changes[1:]])  # fmt: skip
    head = ["changed", "method", "learning rate", "seeds", "reward", "against defaults"]
    return markdown([*head, *(SHOWN[name] for name in names[1:])], lines)


def apart(marks: list[tuple[float, tuple]], step: float) -> list[tuple[float, tuple]]:
    """Marks at levels, moved where they would lie on each other: a pile is spread around its middle."""
    piles: list[list[tuple[float, tuple]]] = []
    for mark in sorted(marks):
        piles.append([mark])
        while len(piles) > 1 and bottom(piles[-1], step) < bottom(piles[-2], step) + step * len(piles[-2]):
            piles[-2:] = [piles[-2] + piles[-1]]
    return [(bottom(pile, step) + step * k, what) for pile in piles for k, (_, what) in enumerate(pile)]


def bottom(pile: list[tuple[float, tuple]], step: float) -> float:
    """Where the lowest of a pile of marks comes to lie."""
    return statistics.fmean(level for level, _ in pile) - step * (len(pile) - 1) / 2


def lines_of(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(method, settings) -> its reported rows; of several learning rates the one with most seeds, then with the best
    reward at the whole budget."""
    ran = [row for row in rows if row["purpose"] == "result" and not row["note"]]
    found = {}
    for (method, settings, _), own in by(ran, "method", "set", "learning_rate").items():
        if ends := whole(own):
            worth = len(ends), statistics.fmean(change(row, "reward") for row in ends)
            found[method, settings] = max(found.get((method, settings), (worth, own)), (worth, own), key=lambda x: x[0])
    return {key: own for key, (_, own) in found.items()}


def whole(rows: list[dict]) -> list[dict]:
    """Those at the end of their budget."""
    return [row for row in rows if row["budget"] in (row["asked"], "0")]


def regime(rows: list[dict], mode: str) -> dict[str, list[dict]]:
    """Method -> its rows in a regime, with the regime's hold on the past; without the cells of the grid."""
    found, (_, hold) = lines_of([row for row in rows if row["mode"] == mode]), REGIMES[mode]
    return {m: own for (m, s), own in found.items() if "+" not in m and s == ("" if m in HOLDLESS else hold)}


def regimes(rows: list[dict]):
    """Share of films that end as is liked against forward passes, a panel a regime: means over seeds, a dot a seed at
    the end, each line named with the rise of its reward; Best-of-N is a level. -> Figure"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, (mode, (title, _)) in zip(figure.subplots(1, 2, sharey=True), REGIMES.items(), strict=True):
        ends = []
        for method, ran in regime(rows, mode).items():
            colour, width = COLOURS[method], 3 if method == "kvpo" else 1.5
            last = whole(ran)
            end = mean_of("judge_liked_after", last)
            rise = round(statistics.fmean(change(row, "reward") for row in last), 2) + 0.0  # no -0
            ends.append((end, (re.sub(r"\b0\.", ".", f"{NAMES[method]} ({rise:+.2f})"), colour)))
            if method in UNTRAINED:
                axes.axhline(end, color=colour, ls="--", lw=1)
                continue
            points = [(0.0, mean_of("judge_liked_before", ran))]
            for _, then in sorted(by(ran, "budget").items(), key=lambda item: int(item[0][0])):
                points.append((mean_of("forwards", then) / 1000, mean_of("judge_liked_after", then)))
            axes.plot(*zip(*points, strict=True), color=colour, lw=width)
            axes.scatter(
                [points[-1][0]] * len(last), [float(row["judge_liked_after"]) for row in last], s=14, color=colour
            )
        axes.axhline(points[0][1], color=ANCHOR, ls=":", lw=1)
        axes.annotate("(rise of the reward)", (1.01, 1.0), xycoords="axes fraction", color=ANCHOR, va="center")
        axes.annotate("before training", (0, points[0][1] - 0.04), color=ANCHOR)
        for level, (text, colour) in apart(ends, 0.05):
            axes.annotate(text, (1.01, level), xycoords=("axes fraction", "data"), color=colour, va="center")
        axes.set(title=title, xlabel="thousand forward passes of training", ylim=(0, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("films that end as is liked (held out)")
    return figure


def how_held(row: dict[str, str]) -> str:
    """In words: what is rewarded, and what keeps the model from leaving its stories."""
    weights = dict(pair.split("=") for pair in row["weights"].split())
    changed = dict(pair.split("=") for pair in row["set"].split(",") if pair)
    kl = f", KL {changed['kl_coef']}" if float(changed.get("kl_coef", 0)) else ""
    held = ", past held" if float(changed.get("prefix_coef", 1)) else ""
    return ("taste and words" if float(weights["ta"]) else "taste alone") + kl + held


def hacking(rows: list[dict]):
    """A line a way of training, in the order of its evaluations: share of films whose story is in its order, against
    the gain of the reward for taste (left) and against the share that ends as is liked (right), on held-out films;
    means over seeds. -> Figure"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ways, ends = {}, []
    for row in rows:
        ways.setdefault(how_held(row), []).append(row)
    for colour, (way, own) in zip(INKS, ways.items(), strict=False):
        points = [(0.0, mean_of("judge_liked_before", own), mean_of("judge_journey_before", own))]
        for _, then in sorted(by(own, "budget").items(), key=lambda item: int(item[0][0])):
            points.append((statistics.fmean(change(row, "vq") for row in then),
                           mean_of("judge_liked_after", then), mean_of("judge_journey_after", then)))  # fmt: skip
        gain, liked, journeys = zip(*points, strict=True)
        for axes, x in ((left, gain), (right, liked)):
            axes.plot(x, journeys, color=colour, marker="o", ms=4, lw=3 if way.endswith("past held") else 1.5)
            axes.scatter(x[-1], journeys[-1], s=90, color=colour)  # where it ends
        ends.append((journeys[-1], (way, colour)))
    for level, (text, colour) in apart(ends, 0.06):
        right.annotate(text, (1.01, level), xycoords=("axes fraction", "data"), color=colour, va="center")
    left.set(xlabel="gain of the reward for taste (VQ)", ylabel="stories in their order (judge)", ylim=(-0.08, 1.08))
    right.set(xlabel="films that end as is liked (judge)")
    for axes, x in ((left, 0.0), (right, points[0][1])):
        axes.annotate("before", (x, points[0][2]), xytext=(0, -45), textcoords="offset points", ha="center",
                      arrowprops={"arrowstyle": "->"})  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def mean_of(name: str, rows: list[dict]) -> float:
    return statistics.fmean(float(row[name]) for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", nargs="+", default=["benchmarks/data/arena_settles.csv"])
    parser.add_argument("--output", default="arena.md", help="file of the tables")
    parser.add_argument("--regimes", metavar="FILE", help="instead: the one picture of both regimes")
    parser.add_argument("--hacking", metavar="FILE", help="instead: reward against judge, from arena_hacking.csv")
    args = parser.parse_args(argv)
    if args.regimes:
        files = [Path(f"benchmarks/data/arena_{mode}.csv") for mode in REGIMES]
        regimes([row for path in files for row in read_rows(path)]).savefig(args.regimes, dpi=150)
        return
    if args.hacking:
        hacking(read_rows(Path("benchmarks/data/arena_hacking.csv"))).savefig(args.hacking, dpi=150)
        return
    out, rows = ["# The arena, in full"], [row for path in args.csv for row in read_rows(Path(path))]
    for here, group in by(rows, *(name for name in HERE if name != "set")).items():
        model, mode, event, like, weights, prompts = here
        title = f"{mode} mode" + (f", '{event}'" if event else "") + (f", {model}" if model else "")
        title += "" if {*like.split(",")} == {*DAYLIGHT} else f", likes {like}"
        results = by([row for row in group if row["purpose"] == "result"],
                     "method", "set", "learning_rate", "seed", "budget").values()  # fmt: skip
        results = [own[0] for own in results]  # of a shorter run and a longer one that passed by
        for budget in sorted({row["asked"] for row in group} - {"0"}, key=int) or ["0"]:
            mine = [row for row in results if row["budget"] in (budget, "0")]
            plain, other = [row for row in mine if not row["set"]], [row for row in mine if row["set"]]
            out.append(f"## {title}, reward {weights}, {prompts} prompts, {int(budget):,} forward passes")
            if plain:
                out.append(f"### methods\n\n{main_table(plain)}")
            if other:
                out.append(f"### other settings\n\n{ablation_table(other, plain)}")
            if sweep := [row for row in group if row["purpose"] == "sweep" and row["budget"] == budget]:
                out.append(f"### Sweep: change of the reward on a seed and prompts of its own\n\n{sweep_table(sweep)}")
    Path(args.output).write_text("\n\n".join(out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
