"""Checks of notebooks 04 to 06 and 09: a right answer passes, plausible wrong ones are told what is wrong."""

import pytest
import torch

from kvpo_min import chr as routing
from kvpo_min.pocket import world
from teach import (
    check_04,
    check_04_never,
    check_04_reads,
    check_04_route,
    check_04_settles,
    check_05,
    check_05_least,
    check_05_slope,
    check_05_tau,
    check_06,
    check_09_memory,
    check_09_reward,
    check_09_shape,
)


def even(frames, n, g, generator):
    reads, rows = torch.zeros(len(frames)), []
    for _ in range(g):
        least = (reads + torch.rand(len(frames), generator=generator) / 2).argsort()[:n]
        reads[least] += 1
        rows.append(torch.tensor(frames)[least].sort().values)
    return torch.stack(rows)


def dealt(frames, n, g, generator):
    """Another right answer: cards from a shuffled pool, hand after hand; a hand may span two decks."""
    hands, deck = [], []
    for _ in range(g):
        hand, deck = deck[:n], deck[n:]
        if len(hand) < n:
            order = torch.tensor(frames)[torch.randperm(len(frames), generator=generator)].tolist()
            order = [f for f in order if f not in hand] + hand
            hand, deck = hand + order[: n - len(hand)], order[n - len(hand) :]
        hands.append(sorted(hand))
    return torch.tensor(hands)


def test_04_even_and_dealt_routes_are_right():
    assert check_04(even)
    verdict = check_04(dealt)
    # by arithmetic: 40 reads of 17 frames are 11 frames twice and 6 three times: 11 + 6 * 3 = 29 shared of 28 pairs
    assert verdict and "the fewest is 1.04" in verdict.says and "uniform draws share 1.47" in verdict.says


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "Write a function"),
        (routing.uniform_routes, "Come closer"),
        (routing.dispersed_routes, "Come closer"),
        (lambda frames, n, g, generator: even(frames, n, g, torch.Generator().manual_seed(0)), "same plan"),
        (lambda frames, n, g, generator: even(frames, n, g, torch.Generator().manual_seed(torch.seed() % 2**31)),
         "draw from the given generator"),
        (lambda frames, n, g, generator: even(frames, n, g, generator).flip(1), "ascend"),
        (lambda frames, n, g, generator: even(frames, n, g, generator) + 1, "are in the pool"),
        (lambda frames, n, g, generator: even(frames, n, g, generator)[:, :4], r"Expected routes [8, 5]"),
        (lambda frames, n, g, generator: torch.tensor(frames)[torch.randint(5, (g, n), generator=generator)], "twice"),
        (lambda frames, n, g, generator: even(frames[:16], n, g, generator), "never read"),
        (lambda frames, n, g: even(frames, n, g, None), "TypeError"),
        (lambda frames, n, g, generator: None, "returns nothing yet"),
    ],
)  # fmt: skip
def test_04_wrong_answers_are_told(answer, says):
    with torch.random.fork_rng():
        verdict = check_04(answer)
    assert not verdict and says in verdict.says


@pytest.mark.parametrize("form", [list, torch.Tensor.tolist, torch.Tensor.numpy, tuple])
def test_04_takes_routes_in_any_form(form):
    assert check_04(lambda frames, n, g, generator: form(even(frames, n, g, generator)))


# night in the sink alone, then meadow, dusk, forest, and the snow where it is when it settles
SEEN = torch.tensor([1] * 3 + [2] * 6 + [3] * 6 + [4] * 6 + [5] * 6)
POOL = range(3, 19)


def test_04_the_frames_of_a_later_block():
    route = torch.tensor([3, 7, 12, 18])
    assert check_04_reads([0, 1, 2, 3, 7, 12, 18, 25, 26], route, 27, 2)


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "Name the 9 past frames"),
        (27, "Expected frame numbers"),
        ([0, 1, 2, 3, 7, 12, 18, 19, 20], "come right before"),  # the nearest frames of the fork
        ([3, 7, 12, 18, 25, 26], "sink is missing"),
        ([0, 1, 2, 21, 22, 23, 24, 25, 26], "stay the same"),  # what the anchor reads
        ([0, 1, 2, 3, 7, 12, 18, 26, 27], "no past frame"),
        ([0, 1, 2, 3, 7, 12, 18, 24, 25, 26], "come right before"),  # three nearest
    ],
)
def test_04_wrong_frames_are_told(answer, says):
    verdict = check_04_reads(answer, torch.tensor([3, 7, 12, 18]), 27, 2)
    assert not verdict and says in verdict.says


ROUTES = torch.tensor([[3, 4, 9, 15], [9, 10, 15, 16], [3, 9, 15, 16], [15, 16, 17, 18]])


def test_04_where_the_rule_lets_them_settle():
    right = [world.SCENES[int(world.remembered(SEEN, torch.tensor([0, 1, 2, *r, 25, 26])))] for r in ROUTES.tolist()]
    assert right == ["meadow", "dusk", "forest", "forest"]  # by hand: ties go to the older scene
    assert check_04_settles(right, SEEN, ROUTES, 2)


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "Give 4 names"),
        (["snow"] * 4, "where the hero is"),
        (["night", "dusk", "forest", "forest"], "sink does not count"),
        (["meadow", "forest", "forest", "forest"], "Wrong for B."),  # the newer scene at a tie
        (["meadow", "dusk", "snow", "forest"], "Wrong for C."),
        (["meadow", "dusk"], "Expected 4 names"),
        (["meadow", "dusk", "city", "forest"], "got 'city'"),
        (3, "Expected names"),
    ],
)
def test_04_wrong_scenes_are_told(answer, says):
    verdict = check_04_settles(answer, SEEN, ROUTES, 2)
    assert not verdict and says in verdict.says


def test_04_routes_to_a_scene():
    assert check_04_route([15, 16, 17, 18], "forest", SEEN, POOL, 2, 4)
    assert check_04_route((3, 9, 15, 16), "forest", SEEN, POOL, 2, 4)
    assert check_04_route((3, 9, 15, 16), "forest", SEEN, POOL, 2, 4, most=2)  # with the snow's two a tie
    verdict = check_04_route([15, 16, 17, 18], "forest", SEEN, POOL, 2, 4, most=2)
    assert not verdict and "by 4 of its frames" in verdict.says


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "4 different frames"),
        ([15, 16, 17], "4 different frames"),
        ([15, 15, 16, 17], "4 different frames"),
        ([15, 16, 17, 19], "not in the pool"),
        ([3, 4, 15, 16], "at a tie"),
        ([3, 4, 5, 6], "to the meadow: 0 of"),
        (["a"], "Expected frame numbers"),
    ],
)
def test_04_wrong_routes_are_told(answer, says):
    verdict = check_04_route(answer, "forest", SEEN, POOL, 2, 4)
    assert not verdict and says in verdict.says


def test_04_scenes_that_no_route_reaches():
    assert check_04_never({"beach", "night", "snow"}, SEEN, POOL, 2, 4)


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "Name the scenes"),
        ("beach", "2 more"),
        ({"beach", "night"}, "fewer than the 2 nearest"),
        ({"beach", "snow"}, "The sink does not count"),
        ({"night", "snow"}, "never been"),
        ({"beach", "night", "snow", "forest"}, "can reach the forest"),
        ({"city"}, "got 'city'"),
    ],
)
def test_04_wrong_never_is_told(answer, says):
    verdict = check_04_never(answer, SEEN, POOL, 2, 4)
    assert not verdict and says in verdict.says


def test_05_the_branch_with_the_least_energy():
    energies = torch.ones(4, 4, 4)
    energies[1] = 0.5  # 8 in all, the others 16
    for right in ("B", "b", 1):
        verdict = check_05_least(right, energies)
        assert verdict and "8.00, the next one's 16.00" in verdict.says
    for answer, says in ((None, "Choose"), ("A", "is 16.00"), ("E", "Expected a branch"), (True, "Expected a branch")):
        verdict = check_05_least(answer, energies)
        assert not verdict and says in verdict.says
    assert repr(check_05_least(None, energies)).startswith("Your turn. ")


def test_05_a_temperature_of_half_the_entropy():
    E = torch.tensor([0.0, 1.0, 2.0, 3.0])
    low, high = 0.01, 100.0
    for _ in range(60):  # the entropy rises with tau
        tau = (low * high) ** 0.5
        p = torch.softmax(-E / tau, 0)
        low, high = (low, tau) if -(p * p.log()).sum() > 0.5 * torch.tensor(4.0).log() else (tau, high)
    assert check_05_tau(tau, E)
    for answer, says in (
        (None, "Give a number"), (100, "too large"), (0.01, "too small"), (0, "above 0"), ("x", "Expected a number"),
        (E.std(correction=0).item(), "too large"),  # the calibrated one
    ):  # fmt: skip
        verdict = check_05_tau(answer, E)
        assert not verdict and says in verdict.says


def test_05_the_slope_of_a_log_probability():
    assert check_05_slope(lambda p, k, tau: (p - torch.eye(4)[k]) / tau)


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "Write a function"),
        (lambda p, k, tau: None, "returns nothing yet"),
        (lambda p, k, tau: (torch.eye(4)[k] - p) / tau, "The sign"),
        (lambda p, k, tau: p - torch.eye(4)[k], "temperature is missing"),
        (lambda p, k, tau: -torch.eye(4)[k] / tau, "other energies"),
        (lambda p, k, tau: -1 / tau, "one slope a branch"),
        (lambda p, k, tau: p / tau, "Compare with small differences"),
        (lambda p: p, "TypeError"),
    ],
)
def test_05_wrong_slopes_are_told(answer, says):
    verdict = check_05_slope(answer)
    assert not verdict and says in verdict.says


def test_09_the_shape_of_keys_and_values():
    kv = torch.zeros(2, 2, 1, 3, 16, 2, 12)
    assert check_09_shape(kv.shape, kv)
    for answer, says in (
        (None, "seven numbers"), ((2, 2, 1, 3, 64, 2, 12), "2 x 2"), ((2, 2, 1, 3, 16, 12, 2), "heads, head width"),
        ((2, 2, 3, 16, 2, 12), "got 6"), (5, "seven numbers"),
    ):  # fmt: skip
        verdict = check_09_shape(answer, kv)
        assert not verdict and says in verdict.says


def flicker(videos):
    return (videos[:, 1:] - videos[:, :-1]).square().mean((1, 2, 3, 4))


def test_09_a_reward_against_flicker():
    assert check_09_reward(lambda videos, prompts: -flicker(videos))
    assert check_09_reward(lambda videos, prompts: [-x for x in flicker(videos).tolist()])


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "Write a function"),
        (lambda videos, prompts: None, "returns nothing yet"),
        (lambda videos, prompts: flicker(videos), "sign is wrong"),
        (lambda videos, prompts: -flicker(videos).mean(), "3 finite numbers"),
        (lambda videos, prompts: -flicker(videos).mean().expand(len(videos)), "A video alone"),
        (lambda videos, prompts: -videos.var(1).mean((1, 2, 3)), "jumpy order"),
        (lambda videos, prompts: videos.mean((1, 2, 3, 4)), "must fall in this order"),
        (lambda videos: 0, "TypeError"),
    ],
)
def test_09_wrong_rewards_are_told(answer, says):
    verdict = check_09_reward(answer)
    assert not verdict and says in verdict.says


def test_09_what_costs_memory():
    assert check_09_memory(("branches", "window", "pixels"))
    for answer, says in (
        (None, "in order"), (("window", "branches", "pixels"), "one at a time"), (("branches", "window"), "once"),
        (("branches", "pixels", "window"), "every kept frame"), (3, "once"),
    ):  # fmt: skip
        verdict = check_09_memory(answer)
        assert not verdict and says in verdict.says


def test_05_the_inverse_square_is_right():
    assert check_05(lambda sigma, floor: 1 / sigma.clamp(min=floor) ** 2)
    assert check_05(lambda sigma, floor: [1 / max(s, floor) ** 2 for s in sigma.tolist()])


@pytest.mark.parametrize(
    "answer, says",
    [
        (None, "Write a function"),
        (lambda sigma, floor: sigma**2, "other way round"),
        (lambda sigma, floor: 1 / sigma, "squared"),
        (lambda sigma, floor: 1 / sigma**2, "Without a floor it is right"),
        (lambda sigma, floor: torch.ones_like(sigma), "should be"),
        (lambda sigma, floor: (sigma / sigma.clamp(min=floor)) ** 2, "velocity residuals"),
        (lambda sigma, floor: 1.0, "shape [4]"),
        (lambda sigma: sigma, "TypeError"),
        (lambda sigma, floor: None, "returns nothing yet"),
    ],
)
def test_05_wrong_answers_are_told(answer, says):
    verdict = check_05(answer)
    assert not verdict and says in verdict.says


def something(videos, prompts):
    return torch.stack([(videos - s).abs().mean((2, 3, 4)) for s in world.scenes()]).amin(0).mean(1)


def chessboard():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    return ((y // 8 + x // 8) % 2).float().expand(6, 3, 64, 64)


def clean():
    return world.render(torch.tensor([[0, 1, 2, 0, 32, 8 * f] for f in range(6)]))  # a yellow disc


def test_06_a_hacked_reward_is_right():
    verdict = check_06((something, chessboard()))
    assert verdict and "0%" in verdict.says


@pytest.mark.parametrize(
    "reward, video, says",
    [
        (None, None, "Give a pair"),
        (something, None, "Give a pair"),
        (something, clean(), "that is no hack yet"),
        (something, world.scenes()[0].expand(6, -1, -1, -1), "what does your reward not look at"),
        (lambda videos, prompts: torch.zeros(len(videos)), chessboard(), "Nobody would train"),
        (lambda videos, prompts: videos.mean((1, 2, 3, 4)), torch.ones(6, 3, 64, 64), "Nobody would train"),
        (lambda videos, prompts: videos.mean(2).std((1, 2, 3)), chessboard(), "Nobody would train"),
        (lambda videos, prompts: videos.mean(), chessboard(), "288 finite numbers"),
        (lambda videos, prompts: videos.nope(), chessboard(), "AttributeError"),
        (something, 2 * chessboard(), "Pixels lie in"),
        (something, chessboard() / 0, "Pixels lie in"),
        (something, chessboard()[:2], "3 frames or more"),
        (something, chessboard()[0], "got [3, 64, 64]"),
        (something, "a video", "got str"),
    ],
)
def test_06_wrong_answers_are_told(reward, video, says):
    verdict = check_06((reward, video))
    assert not verdict and says in verdict.says


def test_06_an_untouched_answer_is_no_error():
    assert not check_06(None)
