"""Checks of notebooks 00 to 03: right answers pass, plausible wrong ones do not and are told why, nothing raises."""

import numpy as np
import pytest
import torch

from kvpo_min.teach import check_00, check_01, check_02, check_03

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
    for no_branch in (as_number(4), True, torch.tensor([0, 1]), 0.0, "0"):
        assert "Expected a branch" in repr(check_00(no_branch, E, A, TAU))


def test_00_is_not_always_the_best_branch():
    E, A = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0.5, 0.6, -1.0, -1.0])  # the best one has p = .007
    assert check_00(0, E, A, TAU) and not check_00(1, E, A, TAU)


@pytest.mark.parametrize("answer", [None, 4, -1, "0", 1.0, True])
def test_00_other_answers(answer):
    assert not check_00(answer, *group(0), TAU)


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
