"""Checks of notebooks 04 to 06: a right answer passes, plausible wrong ones are told what is wrong."""

import pytest
import torch

from kvpo_min import chr as routing
from kvpo_min.pocket import world
from kvpo_min.teach import check_04, check_05, check_06


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
