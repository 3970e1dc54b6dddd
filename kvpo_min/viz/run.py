"""Figures of a run: routes, curves, energies, and the story of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kvpo_min.chr import BANK, DROPPED, NEAREST, ROUTED, SINK, Window, ordinary_frames, route_mask
from kvpo_min.viz.style import ANCHOR, BRANCHES, FACES, HATCHES, NAMES, _figure, _plain, branch_colour

# --------------------------------------------------------------------------------------------------------------- routes


def route_grid(frames: Tensor, start: int, window: Window, nearest: int, bank: Tensor | None = None):
    """Which past frames each branch reads when the block at `start` is made, the anchor in the last row. -> Figure

    frames [G, L] from `chr.routed_frames`; every cell is sink, routed, nearest or not read (`chr.route_mask`), or with
    `bank` ([1, n], `Bank.held` of all rows) in a memory bank alone."""
    from matplotlib.patches import Patch, Rectangle

    figure = _figure(min(16.0, max(5.0, 0.24 * (start + window.block) + 1.5)), 0.26 * (len(frames) + 1) + 1.3)
    axes = figure.add_subplot()
    mask = route_mask(frames, start, window, nearest, bank)  # [G, start]
    ordinary = route_mask(ordinary_frames(start, window)[None], start, window, window.past, bank)
    rows = [*mask.tolist(), *ordinary.tolist()]
    colours = [*(branch_colour(g) for g in range(len(frames))), ANCHOR]

    def look(kind: int, colour: str) -> dict:
        edge = "white" if kind == NEAREST else "#999999"  # an edge's colour is its hatch's too
        return {"facecolor": FACES.get(kind, colour), "edgecolor": edge, "hatch": HATCHES.get(kind, "")}

    for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        for x, kind in enumerate(row):
            axes.add_patch(Rectangle((x, y + 0.08), 1, 0.84, linewidth=0.5, **look(kind, colour)))
        made = Rectangle((start, y + 0.08), window.block, 0.84, facecolor="none", edgecolor=colour, linewidth=2)
        axes.add_patch(made)
    axes.set(xlim=(-0.2, start + window.block + 0.2), ylim=(len(rows), 0))
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [*(f"branch {g}" for g in range(len(frames))), "anchor"])
    ticks = range(0, start + window.block, 3 if start < 60 else 6)
    axes.set_xticks([x + 0.5 for x in ticks], [str(x) for x in ticks], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"frame (outlined: the block at {start} that is made)")
    kinds = [SINK, ROUTED, NEAREST, DROPPED] + ([BANK] if bank is not None else [])
    handles = [Patch(label=NAMES[kind], **look(kind, "#888888")) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(kinds), frameon=False, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------------------- curves


def _column(logs: Sequence[Mapping], key: str) -> list[float]:
    if not logs:
        raise ValueError("there is nothing to plot: expected at least one line of metrics")
    return [line[key] for line in logs if not line.get("skipped")]  # a skipped update measured nothing


def reward_curve(logs: Sequence[Mapping]):
    """What training did. With a held-out curve in the log: its reward with a band of one standard error, and the share
    of heroes that settle where the user likes it. Then the training groups, reward minus anchor. -> Figure

    logs: `Step.log()` of each update, or the lines of metrics.jsonl; skipped ones are left out. Raises ValueError if
    there are none."""
    step, over = _column(logs, "step"), [line["reward"] - line["anchor_reward"] for line in logs if "reward" in line]
    points = held_out_points(logs)
    figure = _figure(4.2 * (1 + ("reward" in points) + ("liked" in points)), 3.4)
    panels = list(figure.subplots(1, 1 + ("reward" in points) + ("liked" in points), squeeze=False)[0])
    if "liked" in points:
        axes = panels.pop(0)
        axes.plot(*points["liked"][:2], color=BRANCHES[4], marker="o", linewidth=2)
        axes.set_ylim(-0.03, 1.03)
        _plain(axes, "settles in a liked scene (held out)", "update", "share of videos")
    if "reward" in points:
        axes = panels.pop(0)
        done, mean, error = points["reward"]
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(done, low, high, color=BRANCHES[4], alpha=0.2, linewidth=0)
        axes.plot(done, mean, color=BRANCHES[4], marker="o", linewidth=2)
        _plain(axes, "reward (held out; band: standard error)", "update", "reward")
    axes = panels.pop(0)
    axes.bar(step, over, color=[BRANCHES[4] if x > 0 else ANCHOR for x in over])
    axes.axhline(0, color="#555555", linewidth=1)
    _plain(axes, "training groups: reward minus anchor", "update", "")
    return figure


def held_out_points(logs: Sequence[Mapping]) -> dict[str, tuple[list, list, list]]:
    """{"reward", "liked": (updates done, value, standard error)} of the held-out curve in a log, where it has one."""
    found = {}
    for name in ("reward", "liked"):
        rows = [(0, logs[0], "eval0")] if logs and f"eval0/{name}" in logs[0] else []
        rows += [(line["step"] + 1, line, "eval") for line in logs if f"eval/{name}" in line]
        if rows:
            values = [(n, line[f"{key}/{name}"], line.get(f"{key}/{name}_sem", 0.0)) for n, line, key in rows]
            found[name] = tuple(map(list, zip(*values, strict=True)))
    return found


def diagnostics(logs: Sequence[Mapping]):
    """KL to the initial policy, entropy, clipped ratios and gradient norm over updates. -> Figure; logs as above"""
    panels = {
        "kl": "KL to the initial policy (nats)",
        "entropy": "entropy over branches (nats)",
        "clip_ratio/region_mean": "share of clipped ratios",
        "grad_norm": "gradient norm before clipping",
    }
    step = _column(logs, "step")
    figure = _figure(8, 4.5)
    for axes, (key, title), colour in zip(figure.subplots(2, 2).flat, panels.items(), BRANCHES[4:], strict=True):
        axes.plot(step, _column(logs, key), color=colour, marker="o", markersize=3)
        _plain(axes, title, "update")
        axes.title.set_fontsize(10)
    return figure


def energy_plot(step):
    """Energies and Gibbs probabilities of the first group's branches, their advantages under them. -> Figure

    step: a `train.Step`. Energies are velocity energies summed over blocks and steps, all weights 1; the probabilities
    are those of the policy before the update, and the dashed line is where all branches are equally likely."""
    shown = step.groups[0]
    energies, probabilities = shown.energies.sum((1, 2)).tolist(), shown.log_p.exp().tolist()
    n = len(energies)
    colours = [branch_colour(g) for g in range(n)]
    names = [f"{g}\n{a:+.1f}" for g, a in enumerate(shown.advantages.tolist())]
    figure = _figure(8, 3.3)
    left, right = figure.subplots(1, 2)
    left.bar(names, energies, color=colours, edgecolor="#555555", linewidth=0.5)
    # differences are small against the energies themselves, and they are what the policy is made of
    room = (max(energies) - min(energies)) or max(energies) or 1.0
    left.set_ylim(max(0.0, min(energies) - room), max(energies) + 0.2 * room)
    difference = "mean squared velocity difference (axis cut)"
    _plain(left, f"Energy (tau {step.tau:.2g})", "branch, and its advantage", difference)
    right.bar(names, probabilities, color=colours, edgecolor="#555555", linewidth=0.5)
    right.axhline(1 / n, color="#555555", linestyle="--", linewidth=1)
    _plain(right, "Gibbs probability", "branch, and its advantage", "probability")
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------------- story


def who_decides(bars: Mapping[str, Mapping[str, float]]):
    """Which source of change tells another story? bars: event -> {source: share of branches that differ from the
    anchor}. One group of bars an event. -> Figure"""
    owner = {
        "settles": "another scene:\nmemory decides", "wanders": "another place:\nnoise decides",
        "turns": "another colour:\nwords decide",
    }  # fmt: skip
    figure = _figure(9, 4.2)
    axes = figure.add_subplot()
    sources = list(next(iter(bars.values())))
    colours = [BRANCHES[4], "#7fb7dc", "#cfcfcf", "#aeaeae", "#8a8a8a", "#5c5c5c"]
    width = 0.8 / len(sources)
    for k, source in enumerate(sources):
        at = [e + (k - (len(sources) - 1) / 2) * width for e in range(len(bars))]
        drawn = axes.bar(at, [shares[source] for shares in bars.values()], 0.92 * width, color=colours[k], label=source)
        axes.bar_label(drawn, fmt=lambda x: f"{x:.0%}", fontsize=10, padding=2)
    axes.set_xticks(range(len(bars)), [f"\u201c{event}\u201d, {owner.get(event, '')}" for event in bars], fontsize=12)
    axes.set(ylim=(0, 1.1), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("Branches that tell another story than the anchor", fontsize=12, loc="left")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=10, ncols=3)
    return figure
