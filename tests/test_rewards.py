"""The analytic rewards: against naive loops and finite differences, and that they rank clean, damaged and wrong videos
as they say they do."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvpo_min.pocket import pocket_rewards, scene, world
from kvpo_min.pocket.rewards import MotionQuality, Scene, TextAlignment, VisualQuality, centre_steps, ink_maps
from kvpo_min.pocket.world import COLOURS, DIRECTIONS, RADII, SHAPES, SIZE, WARM
from kvpo_min.rewards import Mixture, check_videos

pytestmark = pytest.mark.usefixtures("one_thread")
SCENE = scene()
VQ, MQ, TA = VisualQuality(SCENE), MotionQuality(SCENE), TextAlignment(SCENE)
REWARDS = {"vq": VQ, "mq": MQ, "ta": TA}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def video(colour="red", shape="disc", path=None, size=0, background=0):
    """One sprite on `path` [T, 2] (default: 5 frames, 2 pixels a frame to the right). -> [T, 3, H, W]"""
    path = torch.tensor([[30, 20 + 2 * t] for t in range(5)]) if path is None else path
    look = torch.tensor([SHAPES.index(shape), size, list(COLOURS).index(colour), background])
    return world.render(torch.cat([look.expand(len(path), -1), path % SIZE], 1))


def straight(name, speed=2, frames=6):
    step = torch.tensor(DIRECTIONS.get(name, (0, 0)))
    return torch.tensor([30, 33]) + speed * torch.arange(frames)[:, None] * step


# ---------------------------------------------------------------- what they measure


def test_ink_maps_against_a_loop():
    frame = torch.rand(1, 1, 3, 4, 5, generator=seeded())
    inks, distance = ink_maps(frame, SCENE)
    palette = [*COLOURS.values(), *world.BACKGROUNDS]
    for i in range(4):
        for j in range(5):
            squared = [sum((float(frame[0, 0, c, i, j]) - p[c]) ** 2 for c in range(3)) for p in palette]
            weight = [math.exp(-s / (2 * 0.12**2)) for s in squared]
            share = torch.tensor([w / sum(weight) for w in weight])
            assert_close(inks[0, 0, :, i, j], share[: len(COLOURS)], rtol=1e-3, atol=1e-5)
            assert_close(distance[0, 0, i, j].item(), math.sqrt(min(squared)), rtol=1e-3, atol=1e-3)


def test_centre_steps_are_the_steps_of_the_sprite():
    path = torch.tensor([[10, 60], [10, 64], [12, 64], [8, 58], [8, 58], [0, 50], [-8, 50]])  # goes over two edges
    for shape in SHAPES:
        mass = ink_maps(video("green", shape, path)[None], SCENE)[0].sum(2)
        assert_close(centre_steps(mass)[0], (path[1:] - path[:-1]).float(), rtol=0, atol=0.02)


def test_shape_shares_against_a_search_over_all_places():
    masks = {
        name: (torch.rand(2, 6, 6, generator=seeded(k)) > 0.6).double() for k, name in enumerate(("disc", "cross"))
    }
    small = Scene({"red": (1.0, 0.0, 0.0)}, ((0.0, 0.0, 0.0),), masks, DIRECTIONS)
    mass = torch.rand(1, 1, 6, 6, generator=seeded(5), dtype=torch.float64)
    fits = []
    for bank in masks.values():
        best = -math.inf
        for mask in bank:
            for dy in range(6):
                for dx in range(6):
                    overlap = (mask.roll((dy, dx), (0, 1)) * mass[0, 0]).sum()
                    best = max(best, float(overlap / mask.square().sum().sqrt() / (mass.square().sum() + 1).sqrt()))
        fits.append(best)
    expected = (TextAlignment(small).sharpness * torch.tensor(fits, dtype=torch.float64)).softmax(0)
    assert_close(TextAlignment(small).shape_shares(mass)[0, 0], expected)


def test_scores_lie_between_0_and_1():
    wild = torch.rand(2, 5, 3, SIZE, SIZE, generator=seeded())
    videos = torch.cat([wild, video()[None], torch.zeros(1, 5, 3, SIZE, SIZE), torch.ones(1, 5, 3, SIZE, SIZE)])
    prompts = ["a red disc moves right", "a disc rests", "a red disc moves right", "a cross", "a blue square moves up"]
    for reward in REWARDS.values():
        score = reward(videos, prompts)
        assert score.shape == (5,) and (score >= 0).all() and (score <= 1).all()


# ---------------------------------------------------------------- VQ


def test_vq_falls_with_noise():
    clean = video(size=1)
    noise = torch.randn(clean.shape, generator=seeded())
    levels = [0, 0.02, 0.03, 0.05]
    score = VQ(torch.stack([clean + level * noise for level in levels]), ["a disc"] * len(levels))
    assert (score.diff() < -0.01).all(), score.tolist()


def test_vq_falls_as_the_sprite_fades_or_blurs():
    clean = video(size=1)
    paper = torch.tensor(world.BACKGROUNDS[0])[:, None, None]
    faded = torch.stack([clean + share * (paper - clean) for share in (0.0, 0.3, 0.6, 1.0)])
    score = VQ(faded, ["a disc"] * 4)
    assert (score[1:] < score[0] - 0.2).all() and score[3] < 0.01  # an empty picture is worth nothing
    blurred = [clean]
    for width in (3, 5, 9):
        blurred.append(torch.nn.functional.avg_pool2d(clean, width, 1, width // 2, count_include_pad=False))
    score = VQ(torch.stack(blurred), ["a disc"] * 4)
    assert (score.diff() < -0.02).all(), score.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_vq_likes_warm_colours(shape):
    score = dict(zip(COLOURS, VQ(torch.stack([video(c, shape) for c in COLOURS]), [""] * 6), strict=True))
    warm, cool = [score[c] for c in WARM], [score[c] for c in COLOURS if c not in WARM]
    assert min(warm) > max(cool) + 0.2
    no_taste = VisualQuality(SCENE, taste=0.0)(torch.stack([video(c, shape) for c in COLOURS]), [""] * 6)
    assert no_taste.max() - no_taste.min() < 0.1  # without the taste colours are nearly alike


def test_vq_of_a_clean_sprite_is_high_for_every_look():
    """The reward must not prefer one shape or size by much: a clean picture is a clean picture."""
    looks = [video("red", s, size=k, background=b) for s in SHAPES for k in range(len(RADII)) for b in range(2)]
    score = VQ(torch.stack(looks), [""] * len(looks))
    assert score.min() > 0.75, score.tolist()


def test_vq_against_a_loop_over_pixels():
    """exp(-stray / (mass + 16)) mass / (mass + 16), and the taste, of one frame with a dirty patch."""
    frame = video("orange", "disc", size=1)[0].clone()  # [3, H, W]
    frame[:, 50:56, 3:9] = 0.5
    inks, papers = torch.tensor([*SCENE.inks.values()]), torch.tensor([*SCENE.papers])
    stray = mass = warm = 0.0
    for pixel in frame.flatten(1).T:
        squared = torch.cat([inks, papers]).sub(pixel).square().sum(1)
        share = (-squared / (2 * 0.12**2)).softmax(0)[: len(inks)]
        d4 = float(squared.min() + 1e-8) ** 2
        stray, mass, warm = stray + d4 / (d4 + 0.12**4), mass + float(share.sum()), warm + float(share[:3].sum())
    expected = 0.6 * math.exp(-stray / (mass + 16)) * mass / (mass + 16) + 0.4 * warm / (mass + 1)
    assert VQ(frame[None, None], [""]).item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- MQ


def test_mq_likes_motion_that_goes_on():
    rest, slow, fast = straight("rest", frames=8), straight("right", 2, 8), straight("right", 4, 8)
    jerky = slow + torch.tensor([[0, 0], [4, -3], [-5, 4], [3, 2], [-4, -4], [5, 3], [-3, -2], [4, 4]])
    turning = torch.cat([slow[:4], slow[3] + 2 * torch.arange(1, 5)[:, None] * torch.tensor([1, 0])])
    score = MQ(torch.stack([video(path=p) for p in (rest, slow, fast, turning, jerky)]), [""] * 5).tolist()
    rest, slow, fast, turning, jerky = score
    assert rest == pytest.approx(0.5, abs=0.01)  # perfectly smooth, not alive
    assert slow > 0.95 and fast > 0.95
    assert slow > turning > jerky  # one turn costs little
    assert turning > rest and slow > jerky + 0.3


def test_mq_falls_with_a_jerk_and_ignores_what_moves():
    base, jerk = straight("down", 2, 8), torch.zeros(8, 2, dtype=torch.long)
    jerk[4, 1] = 1  # one frame stands aside
    score = MQ(torch.stack([video(path=base + k * jerk) for k in (0, 1, 2, 4)]), [""] * 4)
    assert (score.diff() < -0.01).all(), score.tolist()
    looks = torch.stack([video(c, s, base) for c in COLOURS for s in SHAPES])
    score = MQ(looks, [""] * len(looks))
    assert score.max() - score.min() < 0.01


# ---------------------------------------------------------------- TA


def preferred(videos, prompts):
    """[videos, prompts] scores of every video under every prompt."""
    return torch.stack([TA(videos, [prompt] * len(videos)) for prompt in prompts], 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", range(2))
def test_ta_prefers_the_named_colour(shape, size):
    videos = torch.stack([video(c, shape, size=size, background=k % 2) for k, c in enumerate(COLOURS)])
    score = preferred(videos, [f"a {c} {shape}" for c in COLOURS])
    right = torch.arange(len(COLOURS))
    assert score.argmax(0).equal(right) and score.argmax(1).equal(right)
    wrong = score[~torch.eye(len(COLOURS), dtype=torch.bool)]
    assert score.diagonal().min() > wrong.max() + 0.2  # not only in order: the named one is worth a lot


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("size", range(2))
def test_ta_prefers_the_named_shape(colour, size):
    videos = torch.stack([video(colour, s, size=size, background=k % 2) for k, s in enumerate(SHAPES)])
    score = preferred(videos, [f"a {colour} {s}" for s in SHAPES])
    right = torch.arange(len(SHAPES))
    assert score.argmax(0).equal(right) and score.argmax(1).equal(right), score.tolist()


@pytest.mark.parametrize("speed", world.SPEEDS)
def test_ta_prefers_the_named_motion(speed):
    names = [*DIRECTIONS, "rest"]
    verbs = [*(f"moves {d}" for d in DIRECTIONS), "rests"]
    for colour, shape in (("red", "disc"), ("blue", "cross"), ("yellow", "triangle")):
        videos = torch.stack([video(colour, shape, straight(name, speed)) for name in names])
        score = preferred(videos, [f"a {shape} {verb}" for verb in verbs])
        right = torch.arange(len(names))
        assert score.argmax(0).equal(right) and score.argmax(1).equal(right), score.tolist()


def test_ta_is_the_mean_of_what_is_named():
    one = video("red", "disc")[None]
    parts = [TA(one, [words]) for words in ("red", "disc", "moves left")]
    assert_close(TA(one, ["a red disc moves left"]), torch.stack(parts).mean(0))
    assert TA(one, ["a thing zigzags"]).item() == 1  # nothing that it knows is named
    assert_close(TA(one, ["a red thing zigzags"]), parts[0])  # unknown words are skipped


def test_ta_falls_when_a_video_is_partly_wrong():
    red, blue = video("red"), video("blue")
    mixed = torch.stack([torch.cat([blue[:k], red[k:]]) for k in range(6)])
    assert (TA(mixed, ["a red disc"] * 6).diff() < -0.05).all()


# ---------------------------------------------------------------- smooth, and one video at a time


@pytest.mark.parametrize("name", REWARDS)
def test_gradients_by_finite_differences(name):
    """In float64, at pixels inside, on the edge of and outside the sprite. Noise keeps them off the kinks."""
    prompt, h = ["a red square moves up and right"], 1e-6
    path = torch.tensor([[30, 30], [28, 31], [27, 33], [26, 36]])
    pixels = video("orange", "disc", path)[None].double()
    pixels = (pixels + 0.004 * torch.randn(pixels.shape, generator=seeded(2), dtype=torch.float64)).requires_grad_()
    score = REWARDS[name](pixels, prompt)
    assert score.dtype == torch.float64
    (grad,) = torch.autograd.grad(score.sum(), pixels)
    assert grad.isfinite().all()
    largest = grad.abs().flatten().topk(3).indices
    spots = [tuple(int(i) for i in torch.unravel_index(k, grad.shape)) for k in largest]
    spots += [(0, 0, 1, 30, 30), (0, 1, 0, 28, 39), (0, 2, 2, 35, 30), (0, 3, 1, 5, 5)]
    for spot in spots:
        step = torch.zeros_like(pixels)
        step[spot] = h
        with torch.no_grad():
            difference = (REWARDS[name](pixels + step, prompt) - REWARDS[name](pixels - step, prompt)) / (2 * h)
        assert_close(difference[0], grad[spot], rtol=1e-4, atol=1e-8)
    assert grad.abs().max() > 1e-6


@pytest.mark.parametrize("name", REWARDS)
def test_each_video_is_scored_alone(name):
    videos = torch.stack([video("red", "disc"), video("blue", "cross", straight("up", 4, 5)), video("green", "square")])
    videos = (videos + 0.02 * torch.randn(videos.shape, generator=seeded())).clamp(0, 1)
    prompts = ["a red disc moves left", "a cross", "a blue square rests"]
    together = REWARDS[name](videos, prompts)
    alone = torch.cat([REWARDS[name](videos[k : k + 1], prompts[k : k + 1]) for k in range(3)])
    assert_close(together, alone, rtol=0, atol=1e-5)
    assert_close(REWARDS[name](videos.flip(0), prompts[::-1]), together.flip(0), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the mixture, and errors


def test_mixture_keeps_its_parts():
    videos, prompts = torch.stack([video("red"), video("blue")]), ["a red disc", "a red disc moves up"]
    mixture = pocket_rewards(vq=1.0, mq=0.5, ta=2.0)
    scores = mixture.scores(videos, prompts)
    assert list(scores) == ["vq", "mq", "ta"]
    for name, reward in REWARDS.items():
        assert_close(scores[name], reward(videos, prompts))
    expected = scores["vq"] + 0.5 * scores["mq"] + 2 * scores["ta"]
    assert_close(mixture(videos, prompts), expected)
    assert_close(mixture.total(scores), expected)


def test_any_callable_is_a_reward():
    brightness = Mixture({"bright": lambda videos, prompts: videos.mean((1, 2, 3, 4)).tolist()}, {"bright": 3.0})
    assert_close(brightness(torch.full((2, 4, 3, 8, 8), 0.5), ["", ""]), torch.tensor([1.5, 1.5]))


@pytest.mark.parametrize(
    "shape, n_prompts, got",
    [
        ((5, 3, 8, 8), 5, r"\[5, 3, 8, 8\] and 5 prompts"),
        ((2, 5, 1, 8, 8), 2, r"\[2, 5, 1, 8, 8\]"),
        ((2, 3, 5, 8, 8), 2, r"\[2, 3, 5, 8, 8\]"),  # channels before frames
        ((2, 5, 3, 8, 8), 1, r"and 1 prompts"),
        ((2, 5, 3, 8, 8), 3, r"and 3 prompts"),
    ],
)
def test_wrong_videos_are_refused(shape, n_prompts, got):
    for reward in (*REWARDS.values(), check_videos):
        with pytest.raises(ValueError, match=rf"videos \[N, F, 3, H, W\] and N prompts, got .*{got}"):
            reward(torch.zeros(shape), ["a disc"] * n_prompts)


@pytest.mark.parametrize(
    "bad",
    [
        lambda videos, prompts: torch.tensor([0.5, math.nan]),
        lambda videos, prompts: [0.5, math.inf],
        lambda videos, prompts: torch.zeros(3),
        lambda videos, prompts: torch.zeros(2, 1),
        lambda videos, prompts: 0.5,
    ],
    ids=["nan", "inf", "too many", "a column", "one number"],
)
def test_a_reward_that_fails_is_named(bad):
    mixture = Mixture({"vq": lambda v, p: torch.zeros(2), "mine": bad}, {"vq": 1.0, "mine": 1.0})
    with pytest.raises(ValueError, match=r"reward 'mine' must give 2 finite numbers, got"):
        mixture(torch.zeros(2, 4, 3, 8, 8), ["", ""])


def test_motion_of_too_short_a_clip_is_an_error_not_a_number():
    with pytest.raises(ValueError, match="motion is seen in at least 3 frames, got 2"):
        pocket_rewards()(video()[None, :2], ["a disc"])  # a change of step needs three frames
    assert TA(video()[None, :2], ["a disc moves left"]).isfinite()  # a step needs two
    with pytest.raises(ValueError, match="motion is seen in at least 2 frames, got 1"):
        TA(video()[None, :1], ["a disc moves left"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_of_low_precision_are_scored_in_float32(dtype):
    """What is scored is the rounded pixels, not rounded again on the way."""
    pixels = video("red", "square")[None].to(dtype)
    for reward in REWARDS.values():
        assert torch.equal(
            reward(pixels, ["a red square moves right"]), reward(pixels.float(), ["a red square moves right"])
        )


def test_a_scene_without_warm_colours_has_no_taste():
    cold = replace(SCENE, inks={name: ink for name, ink in SCENE.inks.items() if name not in SCENE.warm})
    pixels = video("blue", "disc")[None]
    full, none = VisualQuality(cold, taste=0.4)(pixels, [""]), VisualQuality(cold, taste=0.0)(pixels, [""])
    assert_close(full, 0.6 * none)


def test_weights_must_fit_the_rewards():
    for weights in ({}, {"vq": 1.0}, {"vq": 1.0, "mq": 1.0, "tq": 1.0}):
        with pytest.raises(ValueError, match=r"weights for \['mq', 'ta', 'vq'\] are needed, got weights for"):
            Mixture(REWARDS, weights)


def test_a_diagonal_direction_scores_at_most_1():
    scene = replace(SCENE, directions={"diagonally": (1, 1), "right": (0, 1)})
    path = torch.tensor([[16 + 3 * f, 16 + 3 * f] for f in range(6)])
    pixels = video("red", "square", path)[None]
    along, half = (TextAlignment(scene)(pixels, [word]).item() for word in ("diagonally", "right"))
    length = math.hypot(3, 3)
    assert 0.95 < along <= 0.5 + 0.5 * length / math.hypot(length, 1) + 1e-3 and half < along


def test_a_scene_of_ones_own():
    pixels = video("red", "square")[None]
    plain = replace(SCENE, shapes={})
    assert TextAlignment(plain)(pixels, ["red"]) > 0.8
    small = replace(SCENE, shapes={"dot": torch.ones(1, 5, 5)})
    with pytest.raises(ValueError, match=r"masks must be as large as the videos, got \[5, 5\] and \[64, 64\]"):
        TextAlignment(small)(pixels, ["a dot"])


@pytest.mark.parametrize("pixels, got", [(255.0, "0 to 255"), (-1.0, "-1 to 0")])
def test_pixels_of_another_range_are_refused(pixels, got):
    videos = torch.zeros(1, 4, 3, 64, 64)
    videos[0, 0, 0, 0, 0] = pixels
    for reward in REWARDS.values():
        with pytest.raises(ValueError, match=f"got {got}: rescale"):
            reward(videos, ["a disc"])


def test_an_empty_mixture_has_no_total():
    with pytest.raises(ValueError, match="the mixture is empty"):
        Mixture({}, {})(torch.zeros(1, 4, 3, 8, 8), ["a disc"])


def test_pixels_of_bytes_are_refused():
    for reward in REWARDS.values():
        with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch.uint8"):
            reward(torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8), ["a disc"] * 2)
