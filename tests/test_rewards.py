"""The protocol of rewards: what they are given, what they must give, and `Mixture`, their weighted sum. The pocket
world's own measures: test_pocket_rewards.py."""

import math

import pytest
import torch
from torch.testing import assert_close

from kvpo_min.rewards import Mixture, NotFinite, check_videos

pytestmark = pytest.mark.usefixtures("one_thread")
VIDEOS = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a disc", "a red disc moves up"]


def brightness(videos, prompts):
    return check_videos(videos, prompts).mean((1, 2, 3, 4))


def length(videos, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_mixture_keeps_its_parts():
    mixture = Mixture({"bright": brightness, "words": length}, {"bright": 3.0, "words": -0.5})
    scores = mixture.scores(VIDEOS, PROMPTS)
    assert list(scores) == ["bright", "words"]
    assert_close(scores["bright"], torch.tensor([video.mean() for video in VIDEOS]))
    assert scores["words"].tolist() == [6, 19]
    want = torch.tensor([3 * VIDEOS[0].mean() - 3, 3 * VIDEOS[1].mean() - 9.5])
    assert_close(mixture(VIDEOS, PROMPTS), want)
    assert_close(mixture.total(scores), want)
    assert_close(mixture.total({"words": scores["words"]}), torch.tensor([-3, -9.5]))  # of the parts that are given


def test_any_callable_is_a_reward():
    listed = Mixture({"bright": lambda videos, prompts: videos.mean((1, 2, 3, 4)).tolist()}, {"bright": 3.0})
    assert_close(listed(torch.full((2, 4, 3, 8, 8), 0.5), ["", ""]), torch.tensor([1.5, 1.5]))
    whole = Mixture({"n": lambda videos, prompts: torch.tensor([1, 2])}, {"n": 2})
    assert (
        whole(VIDEOS, PROMPTS).equal(torch.tensor([2.0, 4.0]))
        and whole.scores(VIDEOS, PROMPTS)["n"].dtype.is_floating_point
    )


def test_a_mixture_of_smooth_rewards_has_a_gradient():
    videos = VIDEOS.clone().requires_grad_()
    Mixture({"bright": brightness}, {"bright": 5.0})(videos, PROMPTS)[0].backward()
    assert_close(videos.grad[0], torch.full_like(videos[0], 5 / videos[0].numel())) and not videos.grad[1].any()


@pytest.mark.parametrize(
    "shape, n_prompts, got",
    [
        ((5, 3, 8, 8), 5, r"\[5, 3, 8, 8\] and 5 prompts"),
        ((2, 5, 1, 8, 8), 2, r"\[2, 5, 1, 8, 8\]"),
        ((2, 3, 5, 8, 8), 2, r"\[2, 3, 5, 8, 8\]"),  # channels before frames
        ((2, 0, 3, 8, 8), 2, r"\[2, 0, 3, 8, 8\]"),
        ((2, 5, 3, 8, 8), 1, r"and 1 prompts"),
        ((2, 5, 3, 8, 8), 3, r"and 3 prompts"),
    ],
)
def test_wrong_videos_are_refused(shape, n_prompts, got):
    with pytest.raises(ValueError, match=rf"videos \[N, F, 3, H, W\] and N prompts, got .*{got}"):
        check_videos(torch.zeros(shape), ["a disc"] * n_prompts)


@pytest.mark.parametrize("prompts", ["ab", [1, 2], [None, "a"], [["a"], ["b"]]])
def test_wrong_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="list of prompts, got"):
        check_videos(VIDEOS, prompts)


def test_pixels_of_another_kind_or_range_are_refused():
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch.uint8"):
        check_videos(torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8), PROMPTS)
    for value, got in ((255.0, "0 to 255"), (-1.0, "-1 to 0")):
        videos = torch.zeros(1, 4, 3, 8, 8)
        videos[0, 0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=f"got {got}: rescale"):
            check_videos(videos, ["a disc"])
    edge = VIDEOS * 1.4 - 0.2  # a little over the edge is a decoder's
    assert check_videos(edge, PROMPTS) is edge


def test_too_few_frames_for_motion_are_refused():
    with pytest.raises(ValueError, match="at least 3 frames, got 2"):
        check_videos(VIDEOS[:, :2], PROMPTS, 3)
    assert check_videos(VIDEOS[:, :3], PROMPTS, 3).shape[1] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_pixels_are_scored_in_float32_or_better(dtype):
    checked = check_videos(VIDEOS.to(dtype), PROMPTS)
    assert checked.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert checked.equal(VIDEOS.to(dtype).to(checked.dtype))


@pytest.mark.parametrize(
    "bad, error",
    [
        (lambda videos, prompts: torch.tensor([0.5, math.nan]), NotFinite),
        (lambda videos, prompts: [0.5, math.inf], NotFinite),
        (lambda videos, prompts: torch.zeros(3), ValueError),
        (lambda videos, prompts: torch.zeros(2, 1), ValueError),
        (lambda videos, prompts: torch.zeros(2, dtype=torch.complex64), ValueError),
        (lambda videos, prompts: 0.5, ValueError),
        (lambda videos, prompts: None, ValueError),
        (lambda videos, prompts: ["a", "b"], ValueError),
    ],
    ids=["nan", "inf", "too many", "a column", "complex", "one number", "nothing", "words"],
)
def test_a_reward_that_fails_is_named(bad, error):
    mixture = Mixture({"vq": lambda v, p: torch.zeros(2), "mine": bad}, {"vq": 1.0, "mine": 1.0})
    with pytest.raises(error, match=r"'mine'.*2 finite numbers") as caught:
        mixture(VIDEOS, PROMPTS)
    assert isinstance(caught.value, NotFinite) == (error is NotFinite)  # a run skips an update for these alone


def test_weights_must_fit_the_rewards():
    rewards = {"bright": brightness, "words": length}
    for weights in ({}, {"bright": 1.0}, {"bright": 1.0, "words": 1.0, "more": 1.0}):
        with pytest.raises(ValueError, match=r"\['bright', 'words'\].*got"):
            Mixture(rewards, weights)
    for weight in (math.nan, math.inf, None, "1"):
        with pytest.raises(ValueError, match="'words'.*finite"):
            Mixture(rewards, {"bright": 1.0, "words": weight})


def test_an_empty_mixture_has_no_total():
    with pytest.raises(ValueError, match="the mixture is empty"):
        Mixture({}, {})(VIDEOS, PROMPTS)
