"""Pictures against the numbers they show, counted or worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from kvpo_min import viz
from kvpo_min.chr import Window, branch_frames, plan

WINDOW = Window()


def solid(*values, t=4, h=8, w=10):
    """One video a value, all pixels alike."""
    return torch.tensor(values)[:, None, None, None, None].expand(-1, t, 3, h, w)


@pytest.fixture
def group():
    plan_ = plan(39, WINDOW, 1, 5, 5, torch.Generator().manual_seed(3))
    return SimpleNamespace(fork=plan_.fork, frames=branch_frames(plan_.routes, plan_.fork, WINDOW, 1))


def colours(patches):
    from matplotlib.colors import to_hex

    return [to_hex(patch.get_facecolor()).upper() for patch in patches]


# -------------------------------------------------------------------------------------------------------------- videos


def test_contact_sheet_holds_the_frames_it_names():
    pixels = torch.rand(2, 7, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    sheet = viz.contact_sheet(pixels, ["a", "b"], every=3)  # frames 0, 3, 6
    for row in range(2):
        for column in range(3):
            for y, x in ((0, 0), (7, 9), (2, 5)):
                # a header of 18 pixels, then rows of an 18-pixel label, 8 of the frame and 2 white
                seen = sheet.getpixel((column * 12 + x, 18 + row * 28 + 18 + y))
                assert seen == tuple(round(v * 255) for v in pixels[row, 3 * column, :, y, x].tolist())
    assert sheet.height == 18 + 2 * 28 and sheet.width >= 3 * 12


def test_contact_sheet_shows_long_videos_in_at_most_14_frames_and_its_labels_in_full():
    assert viz.contact_sheet(solid(0.5, t=147), [""]).width == math.ceil(147 / 11) * 12
    assert viz.contact_sheet(solid(0.5), ["a long label" * 10]).width > 600


def test_before_stands_above_after():
    sheet = viz.before_after(solid(0.1, 0.2), solid(0.6, 0.7), ["one", "two"])
    middles = [sheet.getpixel((5, 18 + row * 28 + 22))[0] for row in range(4)]
    assert middles == [round(255 * v) for v in (0.1, 0.6, 0.2, 0.7)]


def test_tile_by_hand():
    out = viz.tile(solid(0.0, 0.2, 0.4, t=1, h=2, w=3), gap=1)[0, 0]  # 2 columns, 2 rows, one place empty
    assert_close(out, torch.tensor([
        [0.0, 0.0, 0.0, 1.0, 0.2, 0.2, 0.2],
        [0.0, 0.0, 0.0, 1.0, 0.2, 0.2, 0.2],
        [1.0] * 7,
        [0.4, 0.4, 0.4, 1.0, 1.0, 1.0, 1.0],
        [0.4, 0.4, 0.4, 1.0, 1.0, 1.0, 1.0],
    ]))  # fmt: skip


@pytest.mark.parametrize("n, size", [(1, (192, 240)), (2, (192, 482))])  # 24 times as large, 2 white between
def test_saved_video_reads_back(n, size, tmp_path):
    levels = torch.linspace(0, 1, 6)[None, :, None, None, None].expand(n, 6, 3, 8, 10)  # from black to white
    path = viz.save_video(tmp_path / "v.mp4", levels if n > 1 else levels[0], fps=6)
    back = viz.video._media().read_video(path)
    assert back.shape == (6, *size, 3) and back.metadata.fps == 6
    assert_close(torch.tensor(back[:, 50, 50, 0] / 255.0), torch.linspace(0, 1, 6).double(), atol=0.03, rtol=0)


def test_players_embed_every_video():
    html = viz.show_videos(solid(0.1, 0.9), ["first one", "second one"]).data
    assert html.count("<video") == 2 and "first one" in html and "second one" in html


# ------------------------------------------------------------------------------------------------------------- figures


def test_route_grid_colours_what_each_branch_reads(group):
    axes = viz.route_grid(group.frames, group.fork, WINDOW, 1).axes[0]
    cells = [p for p in axes.patches if p.get_width() == 1]
    assert len(cells) == 6 * group.fork
    for g in range(5):
        row = cells[g * group.fork : (g + 1) * group.fork]
        own = {x for x, colour in enumerate(colours(row)) if colour == viz.BRANCHES[g]}
        assert own == set(group.frames[g].tolist()) - {0, 1, 2}
        assert [p.get_hatch() or "" for p in row[:3]] == ["////"] * 3 and row[group.fork - 1].get_hatch() == "..."
    anchor = {x for x, colour in enumerate(colours(cells[5 * group.fork :])) if colour == viz.ANCHOR.upper()}
    assert anchor == set(range(group.fork - 6, group.fork))


def test_branch_colours_are_eight_and_come_again():
    assert len(set(viz.BRANCHES)) == 8 and viz.branch_colour(9) == viz.BRANCHES[1] and viz.ANCHOR not in viz.BRANCHES


LOGS = [
    {"step": k, "reward": 0.1 * k, "reward_std": 0.02 * k, "anchor_reward": 0.3 - 0.1 * k, "kl": k, "entropy": 2 - k,
     "clip_ratio/region_mean": k / 4, "grad_norm": 5.0}
    for k in range(3)
]  # fmt: skip


def test_skipped_updates_are_left_out_of_the_curves():
    """Such a line holds its own numbers alone (docs/metrics.md)."""
    logs = [LOGS[0], {"step": 1, "skipped": 1.0}, LOGS[2]]
    assert [bar.get_x() + bar.get_width() / 2 for bar in viz.reward_curve(logs).axes[0].patches] == [0, 2]
    assert [axes.lines[0].get_xdata().tolist() for axes in viz.diagnostics(logs).axes] == [[0, 2]] * 4


def test_reward_curve_shows_the_training_groups_over_their_anchors():
    (axes,) = viz.reward_curve(LOGS).axes
    assert_close([bar.get_height() for bar in axes.patches], [-0.3, -0.1, 0.1])
    assert colours(axes.patches) == [viz.ANCHOR.upper()] * 2 + [viz.BRANCHES[4]]  # who is better than the anchor


def test_reward_curve_shows_the_held_out_curve():
    """The measurement before the first update stands in line 0, others in the line of the update that they follow."""
    points = [{"eval0/reward": 1.0, "eval0/reward_sem": 0.1, "eval0/liked": 0.25}, {},
              {"eval/reward": 1.5, "eval/reward_sem": 0.2, "eval/liked": 0.75}]  # fmt: skip
    logs = [line | more for line, more in zip(LOGS, points, strict=True)]
    liked, reward, groups = viz.reward_curve(logs).axes
    assert_close(liked.lines[0].get_xydata().tolist(), [[0.0, 0.25], [3.0, 0.75]])
    assert_close(reward.lines[0].get_xydata().tolist(), [[0.0, 1.0], [3.0, 1.5]])
    band = {tuple(round(x, 6) for x in vertex) for vertex in reward.collections[0].get_paths()[0].vertices.tolist()}
    assert band == {(0, 0.9), (0, 1.1), (3, 1.3), (3, 1.7)}
    assert len(groups.patches) == 3
    without = [{key: value for key, value in line.items() if "liked" not in key} for line in logs]
    assert len(viz.reward_curve(without).axes) == 2  # a real model has no judge


def test_who_decides_draws_every_share():
    bars = {"settles": {"routing": 0.9, "noise": 0.1}, "wanders": {"routing": 0.2, "noise": 0.8}}
    figure = viz.who_decides(bars)
    axes = figure.axes[0]
    heights = {(round(p.get_x() + p.get_width() / 2), round(p.get_height(), 3)) for p in axes.patches}
    assert heights == {(0, 0.9), (0, 0.1), (1, 0.2), (1, 0.8)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["routing", "noise"]


def test_diagnostics_show_the_logged_numbers():
    panels = [axes.lines[0].get_ydata().tolist() for axes in viz.diagnostics(LOGS).axes]
    assert panels == [[0, 1, 2], [2, 1, 0], [0.0, 0.25, 0.5], [5.0, 5.0, 5.0]]


def test_energy_plot_shows_energies_and_the_gibbs_policy():
    energies = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0))
    total = [sum(row.flatten().tolist()) for row in energies]
    weights = [math.exp(-e / 0.5) for e in total]
    log_p = torch.tensor([math.log(w / sum(weights)) for w in weights])
    group = SimpleNamespace(energies=energies, log_p=log_p, advantages=torch.tensor([1.0, -2.0, 0.5]))
    left, right = viz.energy_plot(SimpleNamespace(tau=0.5, groups=[group])).axes
    assert_close([p.get_height() for p in left.patches], total, rtol=1e-5, atol=0)
    assert_close([p.get_height() for p in right.patches], [w / sum(weights) for w in weights], rtol=1e-5, atol=0)
    assert [label.get_text() for label in left.get_xticklabels()] == ["0\n+1.0", "1\n-2.0", "2\n+0.5"]


def test_figures_draw_themselves_and_leave_no_state(group):
    import matplotlib.pyplot

    before = matplotlib.pyplot.get_fignums()
    figure = viz.route_grid(group.frames, group.fork, WINDOW, 1)
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks of its last line
    assert matplotlib.pyplot.get_fignums() == before


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: viz.contact_sheet(solid(0.1, 0.2), ["one"]), "N labels"),
        (lambda: viz.contact_sheet(torch.rand(2, 4, 8, 8, 3), ["a", "b"]), r"\[..., T, 3, H, W\]"),
        (lambda: viz.before_after(solid(0.1), solid(0.1, 0.2), ["one"]), "differ"),
        (lambda: viz.save_video("x.mp4", torch.rand(3, 8, 8)), "one video"),
        (lambda: viz.reward_curve([]), "nothing to plot"),
    ],
)
def test_viz_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
