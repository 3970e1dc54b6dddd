"""Checks of notebooks 00 to 03: right answers pass, plausible wrong ones do not and are told why, nothing raises."""

import numpy as np
import pytest
import torch

from teach import (
    check_00,
    check_00_scenes,
    check_00_signs,
    check_01,
    check_01_one_step,
    check_01_owner,
    check_01_sources,
    check_02,
    check_02_drift,
    check_02_kept,
    check_02_most,
    check_03,
    check_03_ends,
    check_03_guided,
    check_03_order,
)

TAU = 0.2


def group(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, generator=generator), torch.randn(4, generator=generator)


@pytest.mark.parametrize("seed", range(10))
def test_00_one_branch_gains_most(seed):
    E, A = group(seed)
    verdicts = [check_00(g, E, A, TAU) for g in range(4)]
    assert sum(map(bool, verdicts)) == 1
    # independent: autograd of the surrogate in the logits, one tiny step, who gained?
    logits = (-E / TAU).double().requires_grad_(True)
    p = logits.softmax(0)
    (slope,) = torch.autograd.grad(-(p / p.detach() * A).mean() * TAU, logits)
    gained = (logits - 1e-3 * slope).softmax(0) - p
    assert verdicts[int(gained.argmax())]


@pytest.mark.parametrize("as_number", [torch.tensor, np.int64, np.uint8])
def test_00_takes_whole_numbers_of_any_library(as_number):
    E, A = group(0)
    assert [bool(check_00(as_number(g), E, A, TAU)) for g in range(4)] == [
        bool(check_00(g, E, A, TAU)) for g in range(4)
    ]
    for no_branch in (as_number(4), True, torch.tensor([0, 1]), 0.0, "0", "E", "AB", ""):
        assert "Expected a branch" in repr(check_00(no_branch, E, A, TAU))


def test_00_is_not_always_the_best_branch():
    E, A = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0.5, 0.6, -1.0, -1.0])  # the best one has p = .007
    assert check_00(0, E, A, TAU) and not check_00(1, E, A, TAU)


def test_00_takes_letters():
    E, A = group(0)
    assert [bool(check_00(g, E, A, TAU)) for g in range(4)] == [bool(check_00(g, E, A, TAU)) for g in "ABcd"]


@pytest.mark.parametrize("answer", [None, 4, -1, "0", 1.0, True])
def test_00_other_answers(answer):
    assert not check_00(answer, *group(0), TAU)


SEEN = ["night"] * 3 + ["meadow"] * 6 + ["dusk"] * 6 + ["forest"] * 6 + ["snow"] * 6
ROUTES = torch.tensor([[7, 9, 11, 13], [3, 7, 12, 18], [7, 12, 17, 18]])
READS = torch.cat([torch.tensor([[0, 1, 2]] * 3), ROUTES, torch.tensor([[25, 26]] * 3)], 1)


def test_00_scenes():
    from kvpo_min.pocket import world

    at = torch.tensor([[world.SCENES.index(name) for name in SEEN]] * 3)
    rule = [world.SCENES[k] for k in world.remembered(at, READS).tolist()]
    assert rule == ["dusk", "meadow", "forest"] and check_00_scenes(rule, SEEN, READS)
    assert "sink" in repr(check_00_scenes(["night"] * 3, SEEN, READS))
    assert "where the hero is now" in repr(check_00_scenes(["snow"] * 3, SEEN, READS))
    assert "B again" in repr(check_00_scenes(["dusk", "snow", "forest"], SEEN, READS))  # the tie the other way
    for other in ("dusk", ["dusk"], ["dusk", "meadow", "beach"], 3, [None] * 3, [["dusk"]] * 3):
        assert "Expected" in repr(check_00_scenes(other, SEEN, READS))
    assert "Give" in repr(check_00_scenes(None, SEEN, READS))


def test_00_signs():
    r = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert check_00_signs("--++", "---+", r, 3.5)
    assert "wrong way round" in repr(check_00_signs("---+", "--++", r, 3.5))
    for wrong in (("--++", "--++"), ("---+", "---+"), ("++--", "+++-"), ("", ""), (1, 2)):
        assert "Compared" in repr(check_00_signs(*wrong, r, 3.5))
    assert "Give" in repr(check_00_signs(None, "---+", r, 3.5))


PLACES, SHARES = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0]]), torch.tensor([0.5, 0.25, 0.25])


def test_01_one_step():
    assert check_01_one_step((1.0, 0.5), PLACES, SHARES) and check_01_one_step(torch.tensor([1, 0.5]), PLACES, SHARES)
    assert "How often" in repr(check_01_one_step((4 / 3, 2 / 3), PLACES, SHARES))
    assert "one of the places" in repr(check_01_one_step((0, 0), PLACES, SHARES))
    assert "mean of all" in repr(check_01_one_step((2, 1), PLACES, SHARES))
    for other in (None, 3, "here", (1, 2, 3), [[1.0, 0.5]], (None, 1)):
        assert not check_01_one_step(other, PLACES, SHARES)


def test_01_sources():
    assert check_01_sources({"initial noise", "history"}) and check_01_sources(["history", "initial noise"])
    assert "no fresh noise" in repr(check_01_sources({"initial noise", "step noise", "history"}))
    for wrong in ("history", {"initial noise"}, set()):
        assert "One is missing" in repr(check_01_sources(wrong))
    for other in (None, 3, {"noise"}, [["history"]]):
        assert not check_01_sources(other)


def test_01_owner():
    shares = {"settles": {"routing": 0.8, "noise": 0.05}, "turns": {"routing": 0.0, "noise": 0.02},
              "wanders": {"routing, nearest 1": 0.2, "noise": 0.7}}  # fmt: skip
    right = {"settles": "routing", "wanders": "noise", "turns": "neither"}
    assert check_01_owner(right, shares)
    for event in shares:
        for other in {"routing", "noise", "neither"} - {right[event]}:
            assert f"'{event}'" in repr(check_01_owner(right | {event: other}, shares))
    for other in (None, {}, {**right, "settles": None}, {"settles": "routing"}, "routing"):
        assert not check_01_owner(other, shares)


def test_01():
    assert check_01(lambda dv, sigma: -sigma * dv)
    assert "sign" in repr(check_01(lambda dv, sigma: sigma * dv))
    for wrong in (lambda dv, s: -s * s * dv, lambda dv, s: -dv / s, lambda dv, s: (1 - s) * dv, lambda dv, s: dv):
        assert "times dv" in repr(check_01(wrong))
    assert "Return" in repr(check_01(lambda dv, sigma: None)) and "Return" in repr(check_01(None))
    assert "raised" in repr(check_01(lambda dv: dv)) and "shape" in repr(check_01(lambda dv, sigma: dv.sum()))


def lower(*ones):
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for row, column in ones:
        mask[row, column] = True
    return mask


def test_02():
    assert check_02(lower((2, 4)), {2, 3, 4, 5})
    assert check_02(lower((4, 5)), [4, 5])
    for wrong in ({2}, {2, 4}, {4, 5}, {3, 4, 5}, {0, 1, 2, 3, 4, 5}, set()):
        assert not check_02(lower((2, 4)), wrong)
    assert "causal" in repr(check_02(lower(), {2}))
    assert "name the frames" in repr(check_02(lower((2, 4)), None))
    unread = lower((2, 4))
    unread[3:, 2] = False  # nobody reads frame 2 later: then it is alone
    assert check_02(unread, {2}) and not check_02(unread, {2, 3, 4, 5})


@pytest.mark.parametrize("mask", [None, torch.ones(6, 6), torch.ones(5, 5, dtype=torch.bool), lower((2, 4)) & False])
def test_02_other_masks(mask):
    assert not check_02(mask, {2, 3, 4, 5})


def test_02_kept():
    def right(start):
        return [f for f in range(start) if f < 3 or f >= start - 30]

    assert check_02_kept(right)
    for wrong, says in {
        (lambda start: range(max(0, start - 33), start)): "the sink",
        (lambda start: range(start)): "at most 33",
        (lambda start: [f for f in range(start) if f < 3 or f >= start - 33]): "at most 33",
        (lambda start: [f for f in range(start) if f < 3 or f >= start - 6]): "at most 33",
        (lambda start: [*range(3), *range(max(0, start - 30), start)]): "",  # the sink twice, or before it is made
        (lambda start: None): "returns nothing",
        (lambda: 0): "raised",
    }.items():
        assert not check_02_kept(wrong) and says in repr(check_02_kept(wrong))
    assert not check_02_kept(None) and not check_02_kept([0, 1, 2])


def test_02_predictions():
    frames, change = torch.tensor([0, 1, 2, 21]), torch.tensor([0.3, 0.1, 0.2, 0.9])
    assert check_02_most(21, frames, change) and "place 2 of 4" in repr(check_02_most(0, frames, change))
    for other in (None, 5, True, "21", 21.0):
        assert "Give" in repr(check_02_most(other, frames, change))
    curves = {"a": torch.tensor([0.0] * 6 + [0.8] * 3), "b": torch.tensor([1.0] * 6 + [0.5] * 3)}
    assert check_02_drift("a", curves) and not check_02_drift("b", curves) and not check_02_drift(None, curves)
    assert "a draw" in repr(check_02_drift("b", {"a": torch.ones(9), "b": torch.ones(9)}))


def test_03_guided():
    assert check_03_guided(lambda mute, told, scale: mute + scale * (told - mute))
    for wrong in (lambda m, t, s: t + s * (t - m), lambda m, t, s: s * t, lambda m, t, s: m + s * t,
                  lambda m, t, s: t + s * (m - t), lambda m, t, s: (t - m) * s):  # fmt: skip
        assert "is off" in repr(check_03_guided(wrong))
    assert "Return" in repr(check_03_guided(lambda m, t, s: None)) and "Return" in repr(check_03_guided(None))
    assert "raised" in repr(check_03_guided(lambda m: m)) and "shape" in repr(check_03_guided(lambda m, t, s: m.sum()))


def test_03_ends():
    assert check_03_ends((0, -2)) and check_03_ends(torch.tensor([0.0, -2.0])) and check_03_ends((0, 3), 1.0, 4.0)
    assert "other way round" in repr(check_03_ends((-2, 0)))
    assert "sign" in repr(check_03_ends((0, 2)))
    for wrong in ((0, 0), (-2, -2), (0, -1)):
        assert "At sigma 0" in repr(check_03_ends(wrong))
    for other in (None, 2, (1, 2, 3), "ab"):
        assert "Give" in repr(check_03_ends(other))


def test_03_order():
    valid = {"a": 0.9, "b": 0.5, "c": 0.8}
    assert check_03_order(["a", "c", "b"], valid)
    for wrong in (["b", "c", "a"], ["a", "b", "c"], ["c", "a", "b"]):
        assert "first is 'a'" in repr(check_03_order(wrong, valid))
    for other in (None, "acb", ["a"], ["a", "a", "b"], [1, 2, 3]):
        assert "Give" in repr(check_03_order(other, valid))
    assert check_03_order(["b", "a"], {"a": 0.904, "b": 0.900})  # as good as equal
    assert not check_03_order(["b", "a"], {"a": 0.91, "b": 0.90})


def test_03():
    assert check_03(lambda real, fake: fake - real)
    for factor in (2, 30, 0.01, 1 / 192):  # the scale is the learning rate's business
        assert check_03(lambda real, fake, factor=factor: factor * (fake - real))
    assert check_03(lambda real, fake: (fake - real) / (fake - real).abs().mean())
    for factor in (1, 0.01):
        assert "sign" in repr(check_03(lambda real, fake, factor=factor: factor * (real - fake)))
    for wrong in (lambda r, f: f, lambda r, f: r, lambda r, f: -r, lambda r, f: 0 * r, lambda r, f: (f - r).abs(),
                  lambda r, f: (f - r) ** 2, lambda r, f: f + r, lambda r, f: r * torch.nan):  # fmt: skip
        assert not check_03(wrong) and "vanish when the two estimates agree" in repr(check_03(wrong))
    assert "Return" in repr(check_03(lambda real, fake: None))
    assert "raised" in repr(check_03(lambda: 0)) and "shape" in repr(check_03(lambda r, f: (f - r).mean()))
