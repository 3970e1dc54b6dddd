"""Streaming, forking and replay against naive loops that keep everything, and the sampler against diffusers'."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from kvpo_min.chr import Plan, Window, uniform_routes
from kvpo_min.pocket import world
from kvpo_min.rollout import (
    KVHistory,
    Sampler,
    Stream,
    denoise,
    draw_noise,
    fork,
    generate,
    replay,
    segment_at,
    switch_prompt,
)
from kvpo_min.tve import schedule, step_energies

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 8, 4, 4)  # F, C, H, W of a block
SIGMAS = schedule()
PLAIN = Sampler(SIGMAS)
WORDS = world.embed(["a red disc moves left"])
NEW_WORDS = world.embed(["it turns blue and rests"])
CLOSE = dict(atol=1e-5, rtol=0)  # other batch sizes, other order of sums


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_for(frames, seed=0, batch=1):
    return draw_noise(frames // 3, 4, SHAPE, seeded(seed), batch)


def window_of(start):
    """The ordinary frames of the default window, written as sets."""
    return sorted({0, 1, 2} & set(range(start)) | set(range(max(0, start - 6), start)))


class Naive:
    """One video, block by block. Keeps the keys of all frames for ever, in a dict, and reads what it is told to."""

    def __init__(self, backbone, noise):
        self.backbone, self.noise = backbone, noise  # noise [1, blocks, S, F, C, H, W]
        self.kept, self.blocks = {}, {}
        self.z, self.x0 = {}, {}  # start -> [S, F, C, H, W]

    def read(self, frames):
        return torch.cat([self.kept[f] for f in frames], 3) if frames else None

    def keep(self, start, x0, text, frames):
        kv = self.backbone.encode(x0, start, text, self.read(frames))
        self.kept |= {start + f: kv[:, :, :, f] for f in range(3)}

    @torch.no_grad()
    def make(self, start, text, frames):
        noise, z, predictions = self.noise[:, start // 3], [], []
        x = noise[:, 0]
        for s in range(4):
            z.append(x)
            x0 = x - SIGMAS[s] * self.backbone.velocity(x, SIGMAS[s].reshape(1), start, text, self.read(frames))
            predictions.append(x0)
            if s < 3:
                x = (1 - SIGMAS[s + 1]) * x0 + SIGMAS[s + 1] * noise[:, s + 1]
        self.blocks[start], self.z[start], self.x0[start] = x0, torch.cat(z), torch.cat(predictions)
        self.keep(start, x0, text, frames)

    def run(self, first, stop, text, reads=window_of):
        for start in range(first, stop, 3):
            self.make(start, text, reads(start))
        return self

    def encode_again(self, stop, text):
        """The last 12 frames under new words, oldest first."""
        for start in range(max(3, stop - 12), stop, 3):
            self.keep(start, self.blocks[start], text, window_of(start))
        return self

    @property
    def video(self):
        return torch.cat([self.blocks[start] for start in sorted(self.blocks)], 1)


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone()


@pytest.fixture(scope="module")
def other(make_backbone):
    """Another policy: the same weights, slightly moved."""
    backbone, generator = make_backbone(), seeded(3)
    for weight in backbone.parameters():
        weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.numel() > 1 else 0
    return backbone


@pytest.fixture(scope="module")
def noise():
    return noise_for(48, seed=5)


PLAN = Plan(21, range(3, 20), uniform_routes(range(3, 20), 5, 3, seeded(1)), 4)  # 3 branches, 4 of 6 blocks routed
STOP, RECORD_UNTIL, NEAREST = 42, 39, 1


@pytest.fixture(scope="module")
def group(backbone, noise):
    return fork(backbone, [WORDS], noise, PLAN, STOP, RECORD_UNTIL, PLAIN, NEAREST)


# ---------------------------------------------------------------------------------------------------------- sampler


def scheduler(stochastic=True):
    it = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=stochastic)
    it.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    return it


def test_the_schedule_is_that_of_diffusers():
    assert_close(SIGMAS, scheduler().sigmas[:-1], atol=1e-6, rtol=0)
    assert scheduler().sigmas[-1] == 0


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_the_sampler_is_that_of_diffusers(make_transformer, backbone, eta):
    """Their scheduler around the stock model, with the same noise: one draw a step from one generator. eta 0: Euler."""
    stock, theirs, generator = make_transformer(), scheduler(stochastic=eta == 1), seeded(8)
    x = torch.randn(1, *SHAPE, generator=generator)
    inputs = []
    for timestep in theirs.timesteps:
        inputs.append(x)
        v = stock(x.transpose(1, 2), timestep.expand(1), WORDS, return_dict=False)[0].transpose(1, 2)
        x = theirs.step(v, timestep, x, generator=generator, return_dict=False)[0]

    generator = seeded(8)
    noise = torch.stack([torch.randn(1, *SHAPE, generator=generator) for _ in range(4)], 1)
    x0, z, predictions = denoise(backbone, noise, SIGMAS, 0, WORDS, None, eta)
    assert z.shape == predictions.shape == (1, 4, *SHAPE)
    assert_close(z, torch.stack(inputs, 1), **CLOSE)
    assert_close(x0, x, **CLOSE)
    assert torch.equal(x0, predictions[:, -1])
    # the fresh noise is really used, or not: what is left without it
    silent = torch.cat([noise[:, :1], torch.zeros_like(noise[:, 1:])], 1)
    change = (denoise(backbone, silent, SIGMAS, 0, WORDS, None, eta)[1] - z).abs().amax((0, 2, 3, 4, 5))
    assert change[0] == 0 and (change[1:] > 0.1).all() if eta else (change == 0).all()


def test_partly_fresh_noise(backbone):
    """eta 0.6: 0.6 of fresh noise, 0.8 of the noise that the prediction implies, so that its variance stays 1."""
    noise = noise_for(3)[:, 0]
    _, z, x0 = denoise(backbone, noise, SIGMAS, 0, WORDS, None, eta=0.6)
    for s in range(3):
        implied = (z[:, s] - (1 - SIGMAS[s]) * x0[:, s]) / SIGMAS[s]
        mixed = 0.6 * noise[:, s + 1] + 0.8 * implied
        assert_close(z[:, s + 1], (1 - SIGMAS[s + 1]) * x0[:, s] + SIGMAS[s + 1] * mixed, **CLOSE)


def test_segment_at():
    assert [segment_at(f, (39, 75)) for f in (0, 38, 39, 74, 75, 200)] == [0, 0, 1, 1, 2, 2]
    assert segment_at(100, ()) == 0


# -------------------------------------------------------------------------------------------------------- streaming


def test_generation_is_the_naive_loop(backbone, noise):
    naive = Naive(backbone, noise).run(0, 48, WORDS)
    seen = {}
    stream = generate(backbone, Stream(), [WORDS], noise, 48, PLAIN, record=lambda s, z, x0: seen.update({s: (z, x0)}))
    assert_close(stream.latents, naive.video, **CLOSE)
    assert stream.frame == 48 and stream.latents.shape == (1, 48, *SHAPE[1:])
    assert sorted(seen) == list(range(0, 48, 3))
    for start, (z, x0) in seen.items():
        assert_close(z[0], naive.z[start], **CLOSE)
        assert_close(x0[0], naive.x0[start], **CLOSE)


def test_the_sampler_of_a_stream_is_the_one_that_was_asked_for(backbone, noise):
    euler = generate(backbone, Stream(), [WORDS], noise, 6, Sampler(SIGMAS, eta=0.0)).latents
    first = denoise(backbone, noise[:, 0], SIGMAS, 0, WORDS, None, 0.0)[0]
    assert torch.equal(euler[:, :3], first)
    assert (euler - generate(backbone, Stream(), [WORDS], noise, 6, PLAIN).latents).abs().max() > 0.1


def test_a_batch_of_videos_is_single_videos(backbone):
    words, noise = torch.cat([WORDS, NEW_WORDS]), noise_for(18, batch=2)
    both = generate(backbone, Stream(), [words], noise, 18, PLAIN).latents
    for i in range(2):
        one = generate(backbone, Stream(), [words[i : i + 1]], noise[i : i + 1], 18, PLAIN).latents
        assert_close(both[i : i + 1], one, **CLOSE)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_stopping_and_going_on_changes_nothing(backbone, noise):
    whole = generate(backbone, Stream(), [WORDS], noise, 30, PLAIN)
    stream = Stream()
    for stop in (3, 12, 12, 27, 30):
        before = stream
        stream = generate(backbone, stream, [WORDS], noise, stop, PLAIN)
        assert before.frame <= stop and len(before.x0) == before.frame // 3  # a stream is never changed
    assert torch.equal(stream.latents, whole.latents)
    assert sorted(stream.history.frames) == sorted(whole.history.frames)
    for frame, kv in whole.history.frames.items():
        assert torch.equal(stream.history.frames[frame], kv)


def test_memory_does_not_grow_and_nothing_that_is_read_is_dropped(backbone, monkeypatch):
    """147 frames: 33 are resident at most, and the video is the one of a history that forgets nothing."""
    noise, held, read = noise_for(147), [], KVHistory.read
    monkeypatch.setattr(KVHistory, "read", lambda self, frames: held.append(len(self.frames)) or read(self, frames))
    stream = generate(backbone, Stream(), [WORDS], noise, 147, PLAIN)
    assert held == [min(start, 33) for start in range(0, 147, 3)]
    assert sorted(stream.history.frames) == [0, 1, 2, *range(117, 147)]
    storages = {kv.untyped_storage().data_ptr(): kv.untyped_storage().nbytes() for kv in stream.history.frames.values()}
    one_frame = stream.history.frames[0].numel() * 4
    assert sum(storages.values()) == 33 * one_frame  # no view keeps a dropped frame alive
    held.clear()
    unlimited = generate(backbone, Stream(), [WORDS], noise, 147, Sampler(SIGMAS, Window(history=1000)))
    assert held == list(range(0, 147, 3))
    assert torch.equal(stream.latents, unlimited.latents)


def test_a_missing_frame_is_an_error_that_names_it():
    history = KVHistory().append(0, torch.zeros(1, 2, 1, 3, 1, 1, 1)).append(6, torch.zeros(1, 2, 1, 3, 1, 1, 1))
    with pytest.raises(KeyError, match=r"\[3, 9\].*\[0, 1, 2, 6, 7, 8\]"):
        history.read(torch.tensor([0, 3, 6, 9]))
    with pytest.raises(KeyError, match=r"frames \[4\]"):
        history.read(torch.tensor([[0, 1], [0, 4]]))
    with pytest.raises(KeyError, match=r"frames \[1\]"):
        history.keep(1, 2).read(torch.tensor([0, 1]))


def test_a_history_reads_what_was_appended():
    """Every number names its frame, row and token; shared frames hold one row, others three."""
    shared = torch.arange(2 * 2 * 1 * 3 * 2).float().reshape(2, 2, 1, 3, 2, 1, 1)
    own = 100 + torch.arange(2 * 2 * 3 * 3 * 2).float().reshape(2, 2, 3, 3, 2, 1, 1)
    first = KVHistory().append(0, shared)
    history = first.append(3, own)
    assert sorted(first.frames) == [0, 1, 2] and sorted(history.frames) == [0, 1, 2, 3, 4, 5]  # a new one each time
    assert first.read(torch.tensor([], dtype=torch.long)) is None
    same = history.read(torch.tensor([4, 1]))
    for g in range(3):
        assert torch.equal(same[:, :, g], torch.cat([own[:, :, g, 1], shared[:, :, 0, 1]], 2))
    assert first.read(torch.tensor([2, 0])).shape == (2, 2, 1, 4, 1, 1)
    rows = history.read(torch.tensor([[0, 3], [2, 5], [1, 4]]))
    for g, (a, b) in enumerate([(0, 0), (2, 2), (1, 1)]):
        assert torch.equal(rows[:, :, g], torch.cat([shared[:, :, 0, a], own[:, :, g, b]], 2))
    assert sorted(history.keep(1, 2).frames) == [0, 4, 5]
    assert history.keep(1, 2).frames[4] is history.frames[4]


def test_noise_must_reach_and_blocks_stay_whole(backbone, noise):
    with pytest.raises(ValueError, match="frame 51.*noise for 48 frames"):
        generate(backbone, Stream(), [WORDS], noise, 51, PLAIN)
    with pytest.raises(ValueError, match="frame 10.*multiple of 3"):
        generate(backbone, Stream(), [WORDS], noise, 10, PLAIN)


# ---------------------------------------------------------------------------------------------------- prompt switch


def test_a_switch_encodes_the_last_window_again(make_backbone, noise):
    """With 3 layers: in 2, no stored key depends on the words under which the frames before it were encoded."""
    backbone = make_backbone(layers=3)
    before = generate(backbone, Stream(), [WORDS], noise, 24, PLAIN)
    after = switch_prompt(backbone, before, NEW_WORDS, PLAIN, 1)
    assert (after.frame, after.segment, after.x0) == (24, 1, before.x0)
    assert sorted(after.history.frames) == sorted(before.history.frames)
    naive = Naive(backbone, noise).run(0, 24, WORDS).encode_again(24, NEW_WORDS)
    for frame, kv in before.history.frames.items():
        now = after.history.frames[frame]
        assert_close(now, naive.kept[frame], **CLOSE)
        if frame < 12:
            assert now is kv
        else:
            assert (now - kv).abs().max() > 1e-3


@pytest.mark.parametrize("switch", [3, 6, 15, 21])
def test_generation_through_a_switch_is_the_naive_loop(backbone, noise, switch):
    """An early switch has less than a window behind it; the sink always keeps the old words."""
    sampler = Sampler(SIGMAS, switches=(switch,))
    got = generate(backbone, Stream(), [WORDS, NEW_WORDS], noise, 30, sampler)
    naive = Naive(backbone, noise).run(0, switch, WORDS).encode_again(switch, NEW_WORDS).run(switch, 30, NEW_WORDS)
    assert_close(got.latents, naive.video, **CLOSE)
    assert got.segment == 1
    # negative control: without re-encoding the video is another
    lazy = Naive(backbone, noise).run(0, switch, WORDS).run(switch, 30, NEW_WORDS).video
    assert switch == 3 or (got.latents - lazy)[:, switch:].abs().max() > 1e-4
    old_words = generate(backbone, Stream(), [WORDS], noise, 30, PLAIN).latents
    assert torch.equal(got.latents[:, :switch], old_words[:, :switch])


def test_a_fork_at_the_switch_uses_the_new_words(backbone, noise):
    sampler = Sampler(SIGMAS, switches=(21,))
    whole = generate(backbone, Stream(), [WORDS, NEW_WORDS], noise, 30, sampler)
    made = fork(backbone, [WORDS, NEW_WORDS], noise, PLAN, 30, 30, sampler, NEAREST, branch_batch=1)
    assert torch.equal(made.videos[-1:], whole.latents)
    assert made.text is NEW_WORDS and made.prefix.segment == 1
    naive = Naive(backbone, noise).run(0, 21, WORDS).encode_again(21, NEW_WORDS)
    for frame, kv in made.prefix.history.frames.items():
        assert_close(kv, naive.kept[frame], **CLOSE)
    anchor = step_energies(replay(backbone, made, sampler, branches=4)[3], made.trajectory.velocity[3])
    assert anchor.max() < 1e-10
    unswitched = generate(backbone, Stream(), [WORDS], noise, 30, PLAIN)
    assert (unswitched.latents - whole.latents)[:, 21:].abs().max() > 1e-2


def test_a_switch_after_the_fork_reaches_every_branch(backbone, noise):
    """Branches re-encode their own frames, shared ones included."""
    sampler, plan = Sampler(SIGMAS, switches=(27,)), Plan(21, PLAN.pool, PLAN.routes, 1)
    made = fork(backbone, [WORDS, NEW_WORDS], noise, plan, 33, 27, sampler, NEAREST)
    for g in range(4):
        naive = Naive(backbone, noise).run(0, 21, WORDS)
        naive.make(21, WORDS, window_of(21) if g == 3 else sorted([0, 1, 2, *plan.routes[g].tolist(), 20]))
        naive.run(24, 27, WORDS).encode_again(27, NEW_WORDS).run(27, 33, NEW_WORDS)
        assert_close(made.videos[g : g + 1], naive.video, **CLOSE)
    assert made.text is WORDS


# ------------------------------------------------------------------------------------------------------------- fork


def routed_reads(branch):
    """What branch 0..2 reads, and the anchor (3), by hand."""

    def reads(start):
        if branch == 3 or not 21 <= start < 33:
            return window_of(start)
        return sorted({0, 1, 2, start - 1} | set(PLAN.routes[branch].tolist()))

    return reads


def test_a_fork_is_naive_videos_one_after_the_other(backbone, noise, group):
    assert group.videos.shape == (4, 42, *SHAPE[1:])
    assert group.trajectory.z.shape == (4, 6, 4, *SHAPE)
    for g in range(4):
        naive = Naive(backbone, noise).run(0, 42, WORDS, routed_reads(g))
        assert_close(group.videos[g : g + 1], naive.video, **CLOSE)
        for b, start in enumerate(range(21, 39, 3)):
            assert_close(group.trajectory.z[g, b], naive.z[start], **CLOSE)
            assert_close(group.trajectory.x0[g, b], naive.x0[start], **CLOSE)


def test_branches_share_the_prefix_and_part_at_the_fork(group):
    anchor = group.videos[3]
    for branch in group.videos[:3]:
        assert torch.equal(branch[:21], anchor[:21])
        assert (branch - anchor)[21:24].abs().max() > 1e-3
    assert (group.videos[0] - group.videos[1])[21:].abs().max() > 1e-3
    assert torch.equal(group.trajectory.z[:3, 0, 0], group.trajectory.z[3:, 0, 0].expand(3, *SHAPE))  # the same noise


@pytest.mark.parametrize("nearest", [1, 2, 5])
def test_routing_the_anchors_own_frames_is_the_anchor(backbone, noise, nearest):
    own = torch.arange(15, 21 - nearest).expand(2, -1)
    plan = Plan(21, range(3, 21 - nearest), own, 1)
    made = fork(backbone, [WORDS], noise, plan, 27, 27, PLAIN, nearest, branch_batch=1)
    whole = generate(backbone, Stream(), [WORDS], noise, 27, PLAIN)
    for video in made.videos:
        assert torch.equal(video[None], whole.latents)
    at_once = fork(backbone, [WORDS], noise, plan, 27, 27, PLAIN, nearest)
    assert_close(at_once.videos, whole.latents.expand(3, -1, -1, -1, -1), **CLOSE)


@pytest.mark.parametrize("branch_batch", [1, 2, 3])
def test_branch_batch_changes_no_number(backbone, noise, group, branch_batch):
    parts = fork(backbone, [WORDS], noise, PLAN, STOP, RECORD_UNTIL, PLAIN, NEAREST, branch_batch=branch_batch)
    assert_close(parts.videos, group.videos, **CLOSE)
    assert_close(parts.trajectory.z, group.trajectory.z, **CLOSE)
    assert_close(parts.trajectory.x0, group.trajectory.x0, **CLOSE)


def test_a_given_prefix_is_used_and_kept(backbone, noise, group):
    prefix = generate(backbone, Stream(), [WORDS], noise, 12, PLAIN)
    held = dict(prefix.history.frames)
    made = fork(backbone, [WORDS], noise, PLAN, STOP, RECORD_UNTIL, PLAIN, NEAREST, prefix=prefix)
    assert torch.equal(made.videos, group.videos)
    assert prefix.frame == 12 and prefix.history.frames.keys() == held.keys()
    assert all(prefix.history.frames[f] is kv for f, kv in held.items())
    assert made.prefix.frame == 21 and max(made.prefix.history.frames) == 20  # the snapshot ends at the fork
    assert all(kv.shape[2] == 1 for kv in made.prefix.history.frames.values())  # and is stored once for all branches


class Watch:
    """A backbone that notes, for every call, the frames of the last read."""

    def __init__(self, backbone, monkeypatch):
        self.backbone, self.calls, self.frames = backbone, [], None
        read = KVHistory.read

        def watched(history, frames):
            self.frames = frames
            return read(history, frames)

        monkeypatch.setattr(KVHistory, "read", watched)

    def velocity(self, x, sigma, start, text, kv):
        self.calls.append(("velocity", start, self.frames))
        return self.backbone.velocity(x, sigma, start, text, kv)

    def encode(self, x0, start, text, kv):
        self.calls.append(("encode", start, self.frames))
        return self.backbone.encode(x0, start, text, kv)


def test_a_block_never_reads_itself_or_later_frames(backbone, noise, monkeypatch):
    watch = Watch(backbone, monkeypatch)
    sampler = Sampler(SIGMAS, switches=(21, 39))
    made = fork(watch, [WORDS, NEW_WORDS, WORDS], noise, PLAN, 48, 39, sampler, NEAREST)
    replay(watch, made, sampler, context="own")
    assert len(watch.calls) == 16 * 5 + 2 * 4 + 6 * 1 + 5  # blocks, two switches, replay: velocities and encodings
    for kind, start, frames in watch.calls:
        first = int(torch.as_tensor(start).min())  # a replay hands over one start for each of its rows
        assert frames.numel() == 0 if first == 0 else frames.max() < first, (kind, start, frames)
    # every step of a block, and its encoding, read what the plan says; the anchor is the last row
    for start in range(21, 48, 3):
        seen = [frames for _, s, frames in watch.calls if isinstance(s, int) and s == start and frames.ndim == 2]
        want = torch.tensor([routed_reads(g)(start) for g in range(4)])
        assert len(seen) == 5 and all(torch.equal(frames, want) for frames in seen)


# ----------------------------------------------------------------------------------------------------------- replay


def naive_replay(backbone, group, context, with_grad=0):
    """Branch by branch, block by block, step by step. -> [3, B, S, F, C, H, W]"""
    out = []
    for g in range(3):
        kept, blocks = dict(group.prefix.history.frames), []
        for b, start in enumerate(range(21, 39, 3)):
            kv = torch.cat([kept[f] for f in window_of(start)], 3)
            steps = []
            for s in range(4):
                z = group.trajectory.z[g : g + 1, b, s]
                with torch.set_grad_enabled(s < with_grad):
                    steps.append(backbone.velocity(z, SIGMAS[s].reshape(1), start, WORDS, kv))
            x0 = group.trajectory.x0[g : g + 1, b, 3] if context == "stored" else z - SIGMAS[3] * steps[3].detach()
            code = backbone.encode(x0, start, WORDS, kv)
            kept |= {start + f: code[:, :, :, f] for f in range(3)}
            blocks.append(torch.cat(steps))
        out.append(torch.stack(blocks))
    return torch.stack(out)


def test_the_anchor_explains_itself_and_routed_branches_do_not(backbone, group):
    energies = step_energies(replay(backbone, group, PLAIN, branches=4), group.trajectory.velocity)
    assert energies.shape == (4, 6, 4)
    assert energies[3].max() < 1e-10
    # every routed block of every branch; the two ordinary blocks after them still follow a history of routed frames
    assert energies[:3, :4].min() > 1e-6


@pytest.mark.parametrize("context", ["stored", "own"])
def test_replay_is_the_naive_loop(other, group, context):
    """Under another policy than the one that made the branches, so that its own predictions are not the stored ones."""
    got = replay(other, group, PLAIN, context=context)
    want = naive_replay(other, group, context)
    assert_close(got, want, **CLOSE)
    swapped = naive_replay(other, group, {"stored": "own", "own": "stored"}[context])
    assert torch.equal(swapped[:, 0], want[:, 0])  # the first block has the same context
    assert (swapped - want)[:, 1:].abs().max() > 1e-3


def test_the_first_step_is_replayed_once_if_branches_share_it(other, group, monkeypatch):
    """With one noise for all it is: 3 * 6 * 4 inputs, of which two are copies. With noise of their own none is."""
    rows, velocity = [], other.velocity
    monkeypatch.setattr(other, "velocity", lambda x, *more: rows.append(len(x)) or velocity(x, *more))
    replay(other, group, PLAIN)
    assert sum(rows) == 3 * 6 * 4 - 2
    rows.clear()
    z = group.trajectory.z.clone()
    z[1, 0, 0] += 0.1
    moved = replace(group, trajectory=replace(group.trajectory, z=z))
    got = replay(other, moved, PLAIN)
    assert sum(rows) == 3 * 6 * 4
    assert_close(got, naive_replay(other, moved, "stored"), **CLOSE)


@pytest.mark.parametrize("context", ["stored", "own"])
@pytest.mark.parametrize("replay_batch", [1, 5])
def test_replay_batch_changes_no_number(other, group, context, replay_batch):
    small = replay(other, group, PLAIN, 2, replay_batch=replay_batch, context=context)
    assert_close(small, replay(other, group, PLAIN, 2, context=context), **CLOSE)


def test_a_replay_of_the_first_steps_is_the_first_part_of_all(other, group):
    for n_steps in (2, 3):
        assert_close(replay(other, group, PLAIN, 2, n_steps=n_steps), replay(other, group, PLAIN, 2)[:, :, :n_steps])
    with pytest.raises(ValueError, match="n_steps"):  # the next block would be encoded from another x0
        replay(other, group, PLAIN, 2, context="own", n_steps=2)
    for n_steps in (1, 5):
        with pytest.raises(ValueError, match=str(n_steps)):
            replay(other, group, PLAIN, 2, n_steps=n_steps)


def test_replay_leaves_the_rollout_alone(other, group):
    z, x0, held = group.trajectory.z.clone(), group.trajectory.x0.clone(), dict(group.prefix.history.frames)
    copies = {f: kv.clone() for f, kv in held.items()}
    replay(other, group, PLAIN)
    replay(other, group, PLAIN, context="own")
    assert torch.equal(group.trajectory.z, z) and torch.equal(group.trajectory.x0, x0)
    assert group.prefix.history.frames.keys() == held.keys()
    assert all(torch.equal(group.prefix.history.frames[f], kv) for f, kv in copies.items())


@pytest.mark.parametrize("context", ["stored", "own"])
def test_only_the_first_steps_carry_gradient(make_backbone, group, context):
    backbone = make_backbone()
    weights = [backbone.transformer.blocks[0].attn1.to_q.weight, backbone.transformer.proj_out.weight]
    for weight in weights:
        weight.requires_grad_(True)
    without = replay(backbone, group, PLAIN, grad_steps=0, context=context)
    assert not without.requires_grad
    v = replay(backbone, group, PLAIN, grad_steps=2, context=context)
    assert_close(v.detach(), without, **CLOSE)
    late = torch.autograd.grad(v[:, :, 2:].square().sum(), weights, retain_graph=True)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in late)
    target = torch.randn(v[:, :, :2].shape, generator=seeded(2))
    got = torch.autograd.grad((v[:, :, :2] * target).sum(), weights)
    naive = naive_replay(backbone, group, context, with_grad=2)
    want = torch.autograd.grad((naive[:, :, :2] * target).sum(), weights)
    for ours, theirs in zip(got, want, strict=True):
        assert theirs.abs().max() > 0.1
        assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        assert not replay(backbone, group, PLAIN, grad_steps=2, context=context).requires_grad
