"""Pictures of training by hand, live and recorded, and the memory plan with its picture."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pictures
from kvpo_min import viz
from kvpo_min.chr import Window, plan
from kvpo_min.grpo import clipped_objective
from kvpo_min.tve import gibbs_log_prob
from kvpo_min.wan.real import memory_plan

E = torch.tensor([0.020, 0.026, 0.023])
TAU = E.std(correction=0).item()
OLD = gibbs_log_prob(E, TAU)
NOW = gibbs_log_prob(torch.tensor([0.0165, 0.0262, 0.0229]), TAU)
A = torch.tensor([1.2, -1.2, 0.2])


def png(figure):
    assert figure._repr_png_().startswith(b"\x89PNG")
    return figure


# ------------------------------------------------------------------------------------------------------------- by hand


def test_objective_figure_shows_the_objective():
    figure = png(pictures.objective_figure(NOW, OLD, OLD, A, [(0.1, 0.2, 2.0), (0.9, 0.9, 0.0)]))
    left, right, wide, _ = figure.axes
    ratio = (NOW - OLD).exp()
    lines = left.get_lines()
    curves, dots = lines[0::2], lines[1::2]
    total = clipped_objective(NOW, OLD, A)[0]
    assert sum(dot.get_ydata()[0] for dot in dots) / 3 == pytest.approx(total.item(), abs=1e-6)
    for g, (curve, dot) in enumerate(zip(curves, dots, strict=True)):
        assert dot.get_xdata()[0] == pytest.approx(ratio[g].item())
        rho, term = torch.tensor(curve.get_xdata()), torch.tensor(curve.get_ydata())
        by_hand = [-min(r * A[g].item(), min(max(r, 0.9), 1.2) * A[g].item()) for r in rho.tolist()]
        assert term.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert ratio[0] > 1.2 and dots[0].get_markerfacecolor() == "white"  # clipped: pulls no more
    assert wide.get_lines()[1].get_markerfacecolor() == viz.TAGS[0]
    pulls = [bar.get_height() for bar in right.patches]
    assert sum(pulls[:3]) == pytest.approx(0, abs=1e-6) and sum(pulls[3:]) == pytest.approx(0, abs=1e-6)
    assert pulls[3] < 0 < max(pulls[4:])  # the KL takes from the branch that gained
    with pytest.raises(ValueError, match="at least one setting"):
        pictures.objective_figure(NOW, OLD, OLD, A, [])


def test_push_pull_points_to_good_branches_and_away_from_bad_ones():
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    axes = png(pictures.push_pull(torch.zeros(2), u, torch.tensor([2.0, -2.0]))).axes[0]
    (x0, y0), (x1, y1), (xs, ys) = (text.xy for text in axes.texts)
    assert x0 > 0 and abs(y0) < 1e-6 and abs(x1) < 1e-6 and y1 < 0
    assert (xs, ys) == pytest.approx((x0 + x1, y0 + y1))  # dashed: the sum
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == ["A pulls", "B pushes"]


# ---------------------------------------------------------------------------------------------------- live and recorded


@pytest.fixture
def logs():
    keys = ("reward", "reward_std", "anchor_reward", "energy/mean", "energy/std", "entropy", "kl")
    keys += ("clip_ratio/region_mean",)
    return [{"step": t} | {key: 0.1 * k + 0.01 * t for k, key in enumerate(keys)} for t in range(5)]


@pytest.fixture
def step():
    plan_ = plan(39, Window(), 1, 5, 3, torch.Generator().manual_seed(0))
    videos = torch.stack([torch.full((18, 3, 8, 8), value) for value in (0.1, 0.2, 0.3, 0.4)])
    A = torch.tensor([-1.0, 2.0, 0.5, 0.0])  # the anchor is one of the choices
    group = SimpleNamespace(plan=plan_, videos=videos, advantages=A[:3], A=A, script="a disc")
    return SimpleNamespace(step=4, groups=[group], skipped="")


def test_training_board_shows_the_logs_and_the_best_and_worst_branch(logs, step):
    plain = png(pictures.training_board(logs))
    held, over, entropy, clip = plain.axes
    assert "not measured" in [text.get_text() for text in held.texts]
    gained = [bar.get_height() for bar in over.patches]
    assert gained == pytest.approx([line["reward"] - line["anchor_reward"] for line in logs])
    assert len(entropy.get_lines()[0].get_xdata()) == 5
    assert clip.get_lines()[1].get_ydata()[-1] == pytest.approx(logs[-1]["kl"])
    full = png(pictures.training_board(logs, step))
    assert full.axes[2].get_lines()[1].get_ydata()[0] == pytest.approx(math.log(4))
    films = [axes for axes in full.axes if axes.get_images()]
    assert [axes.get_title(loc="left") for axes in films] == [
        "best: branch B, advantage +2.00", "worst: branch A, advantage -1.00", "anchor"]  # fmt: skip
    shades = [axes.get_images()[0].get_array()[4, 4, 0] for axes in films]
    assert shades == [round(255 * v) for v in (0.2, 0.1, 0.4)]
    skipped = SimpleNamespace(step=5, groups=[], skipped="no rewards")
    after = png(pictures.training_board([*logs, {"step": 5, "skipped": 1.0}], skipped))
    assert len(after.axes[1].patches) == 5
    with pytest.raises(ValueError, match="nothing to plot"):
        pictures.training_board([])


def test_the_held_out_curve_is_drawn_where_there_is_one(logs):
    logs[0] |= {"eval0/liked": 0.25, "eval0/reward": 1.5}
    logs[-1] |= {"eval/liked": 0.75, "eval/reward": 1.7}
    held = png(pictures.training_board(logs)).axes[0]
    assert held.get_lines()[0].get_xydata().tolist() == [[0, 0.25], [5, 0.75]]
    assert pictures.run_column(logs, "reward") == ([0, 5], [1.5, 1.7])
    assert pictures.run_column(logs, "kl")[0] == [0, 1, 2, 3, 4]
    figure = png(pictures.run_curves({"P": logs, "Q": logs}, {"reward": ("reward",), "judge": ("liked", "kl")}))
    assert [axes.get_title() for axes in figure.axes] == ["P", "Q", "", ""]
    assert [len(axes.get_lines()) for axes in figure.axes] == [1, 1, 2, 2]


def test_films_in_rows():
    sheet = pictures.film_rows(torch.full((2, 7, 3, 8, 8), 0.5), ["one", "another"], every=3)
    assert sheet._repr_png_().startswith(b"\x89PNG") and sheet.size[1] == 26 + 2 * (16 + 10)
    assert sheet.getpixel((sheet.size[0] - 18, 30)) == (128, 128, 128)
    with pytest.raises(ValueError, match="N labels"):
        pictures.film_rows(torch.rand(5, 4, 3, 8, 8), ["one"])


def test_log_lines():
    figure = png(pictures.log_lines({"a": {"one": [0.1, 0.9]}, "b": {"one": [0.5, 0.5]}}, torch.tensor([0.1, 1.0])))
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"] and figure.axes[0].get_xscale() == "log"
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [0.1, 0.9]


def test_heat_writes_its_numbers_and_frames_a_cell():
    figure = png(pictures.heat({"VQ": torch.tensor([[0.1, 0.2], [0.3, 0.9]])}, ["a", "b"], ["c", "d"], mark=(1, 0)))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.10", "0.20", "0.30", "0.90"]
    assert axes.patches[0].get_xy() == (-0.5, 0.5)


def test_recorded_marks_one_update(logs):
    figure = png(pictures.recorded(logs, 2))
    assert [axes.get_title() for axes in figure.axes][0] == f"reward: {logs[2]['reward']:.4g}"
    for axes in figure.axes:
        assert [float(line.get_xdata()[0]) for line in axes.get_lines()[-2:]] == [2.0, 2.0]
    assert "update 4" in pictures.recorded(logs, -1).get_suptitle()
    skipped = png(pictures.recorded([*logs, {"step": 5, "skipped": 1.0}], 5))
    assert skipped.axes[0].get_title() == "reward: skipped" and skipped.get_suptitle() == "update 5"


# ------------------------------------------------------------------------------------------------------------- memory


def rows(text, first):
    """Cells of the table rows that begin with `first`."""
    found = re.findall(rf"^\| {first} \|.*$", text, re.M)
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in found]


def test_the_memory_plan_is_the_benchmarks():
    """against the tables of docs/single_gpu.md, which `benchmarks/wan_update.py --plan` printed"""
    text = (Path(__file__).parents[1] / "docs" / "single_gpu.md").read_text()

    def gib(**sizes):
        return sum(memory_plan(**sizes).values())

    full, less = rows(text, r"1 \| 2")
    assert gib() == pytest.approx(float(full[-1]), rel=0.01)
    assert gib(rank=128) == pytest.approx(float(less[-1]), rel=0.01)
    for at_once, setting in ((3, r"3 \| 4"), (9, r"9 \| 32")):
        branches = float(rows(text, setting)[0][3])
        assert gib(branch_batch=at_once) == pytest.approx(branches, rel=0.01)
    parts = memory_plan()
    for name, part in (("transformer, frozen", "transformer"), ("VAE, frozen", "VAE"), ("AdamW's moments", "optimizer"),
                       ("two adapters, default and old; ema lies on the CPU", "adapters"),
                       ("of 9 frames, what a block reads", "what blocks read")):  # fmt: skip
        assert parts[part] == pytest.approx(float(rows(text, name)[0][1]), abs=0.006), name


def test_the_memory_plan_elsewhere():
    """15.60 and 36.00 GiB as `plan_update` of the benchmark counts them at 320 x 512, 4 branches, 12 past frames"""
    for at_once, counted in ((1, 15.602), (5, 36.000)):
        assert sum(memory_plan(4, 12, 320, 512, 256, at_once).values()) == pytest.approx(counted, rel=0.01)
    assert "gradients" in memory_plan(past=3, branch_batch=1) or sum(memory_plan(past=3).values()) < 23
    for sizes in (dict(height=481), dict(num_generations=0), dict(branch_batch=10), dict(past=0)):
        with pytest.raises(ValueError):
            memory_plan(**sizes)


def test_memory_bars_add_up():
    plans = {"a": memory_plan(), "b": memory_plan(rank=128)}
    axes = png(pictures.memory_bars(plans)).axes[0]
    ends = {}
    for bar in axes.patches:
        y = round(bar.get_y() + bar.get_height() / 2)
        ends[y] = max(ends.get(y, 0.0), bar.get_x() + bar.get_width())
    assert [ends[0], ends[1]] == pytest.approx([sum(p.values()) for p in plans.values()])
    shown = [text.get_text().strip() for text in axes.texts]
    assert f"{ends[0]:.1f}" in shown and "24 GiB" in shown and "80 GiB" not in shown
    with pytest.raises(ValueError, match="at least one plan"):
        pictures.memory_bars({})
    with pytest.raises(ValueError, match="unknown|got"):
        pictures.memory_bars({"a": {"sofa": 1.0}})
