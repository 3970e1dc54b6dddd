"""Figures of routes, energies and rewards against the numbers they show."""

import io

import pytest
import torch
from torch.testing import assert_close

from kvpo_min import viz
from kvpo_min.chr import Window, branch_frames, overlap

WINDOW = Window()


def colours(patches):
    from matplotlib.colors import to_hex

    return [to_hex(patch.get_facecolor()).upper() for patch in patches]


def frames(*routes, nearest=1):
    return branch_frames(torch.tensor(routes), 21, WINDOW, nearest)


def test_route_grids_show_each_setting_under_its_title():
    panels = {
        "one": (frames([4, 6, 8, 10, 12], [5, 7, 9, 11, 13]), 1),
        "three": (frames([4, 9, 14], nearest=3), 3),
        "no nearest": (frames([3, 5, 7, 9, 11, 13], nearest=0), 0),
    }
    figure = viz.route_grids(panels, 21, WINDOW)
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == list(panels) and len(figure.axes) == 4  # the fourth is empty
    for axes, (rows, _) in zip(shown, panels.values(), strict=True):
        cells = [p for p in axes.patches if p.get_width() == 1]
        assert len(cells) == 21 * (len(rows) + 1)  # the anchor's row as well
        for g, row in enumerate(rows.tolist()):
            coloured = {x for x, c in enumerate(colours(cells[21 * g : 21 * g + 21])) if c == viz.BRANCHES[g].upper()}
            assert coloured == set(row) - {0, 1, 2}


def test_strips_show_the_bank_where_nothing_else_shows_its_frames():
    rows, bank = frames([4, 6, 8, 10, 12], [5, 7, 9, 11, 13]), torch.tensor([[0, 9, 18, 9]])
    colour = viz.FACES[viz.BANK]
    figure = viz.route_grid(rows, 21, WINDOW, 1, bank)
    cells = [p for p in figure.axes[0].patches if p.get_width() == 1]
    shown = [{x for x in range(21) if c[x] == colour.upper()} for c in (colours(cells[21 * g :]) for g in range(3))]
    assert shown == [{9, 18}, {18}, {9}]  # branch 0, branch 1, which is routed to 9, and the anchor, which has 18 near
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["sink", "routed", "nearest", "not read", "bank"]
    assert "bank" not in [t.get_text() for t in viz.route_grid(rows, 21, WINDOW, 1).legends[0].get_texts()]

    card = viz.branch_card(1, torch.rand(18, 3, 8, 8), rows[1], 21, WINDOW, 1, bank).axes[0]
    assert [x for x, c in enumerate(colours(card.patches)) if c == colour.upper()] == [18]

    story = viz.story_figure(torch.rand(21, 3, 8, 8), torch.rand(3, 18, 3, 8, 8), rows, [""] * 3, WINDOW, bank)
    strips = [axes for axes in story.axes if axes.collections]
    held = [[path.vertices[0, 0] for c in axes.collections[1:] for path in c.get_paths()] for axes in strips]
    assert held == [[9, 18], [18], [9]]


def test_overlap_matrices_name_the_mean_over_pairs():
    matrix = overlap(torch.tensor([[1, 2], [1, 3], [4, 5]]))  # 1 / 3 for the first two, else 0
    axes = viz.overlap_matrices({"drawn": matrix}).axes[0]
    assert axes.get_title() == "drawn\nmean overlap 0.11"  # (2 / 3) / 6
    assert_close(torch.tensor(axes.images[0].get_array()), matrix)
    assert [t.get_text() for t in axes.texts] == [f"{v:.1f}" for v in matrix.flatten().tolist()]


def test_exploration_plot_shows_means_and_standard_errors():
    figure = viz.exploration_plot({"routing": ([0.2, 0.6], [1.0, 1.2]), "noise": ([0.1], [0.9])})
    first, second = figure.axes[0].containers
    assert_close(first[0].get_xydata().flatten().tolist(), [1.1, 0.4], rtol=1e-5, atol=0)
    assert second[0].get_marker() == "s" and first[0].get_marker() == "o"
    across = first[2][0].get_segments()[0]  # 0.1 to each side: std 0.1414 over the root of 2
    assert_close(across[:, 0].tolist(), [1.0, 1.2], rtol=1e-5, atol=0)


def test_energy_map_puts_blocks_and_steps_side_by_side():
    energies = torch.arange(24.0).view(2, 3, 4)
    axes = viz.energy_map(energies, torch.tensor([1.0, 0.9, 0.8, 0.6]), start=21).axes[0]
    assert_close(torch.tensor(axes.images[0].get_array()), energies.flatten(1))
    assert [t.get_text() for t in axes.texts] == ["frames 21 to 23", "frames 24 to 26", "frames 27 to 29"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1.00", ".90", ".80", ".60"] * 3


def test_branch_bars_share_one_scale_and_the_branches_colours():
    panels = {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor([0.0, 3.0, 1.0])}
    left, right = viz.branch_bars(panels, "advantage", 0.25).axes
    assert [p.get_height() for p in left.patches] == [1.0, -2.0, 0.5]
    assert colours(right.patches) == [c.upper() for c in viz.BRANCHES[:3]]
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[0] < -2 < 3 < left.get_ylim()[1]
    assert left.lines[0].get_ydata()[0] == 0.25 and left.get_ylabel() == "advantage"


def test_branch_lines_by_hand():
    axes = viz.branch_lines(torch.tensor([[0.1, 0.9], [0.4, 0.6], [0.7, 0.3]]), "probability").axes[0]
    assert_close(axes.lines[0].get_ydata().tolist(), [0.1, 0.4, 0.7], rtol=1e-6, atol=0)
    assert [line.get_color() for line in axes.lines] == list(viz.BRANCHES[:2])


def test_reward_scatter_places_branches_and_the_anchor():
    rewards = {"vq": torch.tensor([0.1, 0.2]), "mq": torch.tensor([0.3, 0.4]), "ta": torch.tensor([0.5, 0.6])}
    left, right = viz.reward_scatter(rewards, {"vq": 0.7, "mq": 0.8, "ta": 0.9}).axes
    points = torch.cat([torch.tensor(c.get_offsets().tolist()) for c in left.collections])
    assert_close(points, torch.tensor([[0.1, 0.3], [0.2, 0.4], [0.7, 0.8]], dtype=points.dtype))
    assert (right.get_xlabel(), right.get_ylabel()) == ("TA", "MQ")


def test_score_lines_draw_the_judge_dashed():
    axes = viz.score_lines({"uphill": {"VQ": [0.1, 0.9], "judge: valid": [1.0, 0.0]}}).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    assert list(axes.lines[1].get_ydata()) == [1.0, 0.0]


def test_stored_pictures_keep_their_colours_in_fewer_bytes():
    from PIL import Image

    pixels = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sheet = viz.contact_sheet(pixels, ["a", "b"], every=1)
    plain = io.BytesIO()
    sheet.save(plain, "PNG")
    assert len(sheet._repr_png_()) < len(plain.getvalue()) and sheet._repr_jpeg_() is None
    flat = Image.new("RGB", (40, 40), viz.BRANCHES[5])
    flat.paste(Image.new("RGB", (10, 10), viz.ANCHOR), (5, 5))
    assert Image.open(io.BytesIO(viz.style._small_png(flat))).convert("RGB").tobytes() == flat.tobytes()


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: viz.energy_map(torch.zeros(2, 3, 4), torch.ones(3)), r"sigma \[4\]"),
        (lambda: viz.branch_bars({"a": torch.zeros(3), "b": torch.zeros(4)}), "same number of branches"),
    ],
)
def test_errors_of_branch_figures(call, match):
    with pytest.raises(ValueError, match=match):
        call()
