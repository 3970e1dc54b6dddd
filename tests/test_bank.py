"""The memory bank against rules written out by hand, and rollouts with one against a loop that keeps everything."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvpo_min.bank import Bank, sparse_activation
from kvpo_min.chr import (
    BANK,
    DROPPED,
    NEAREST,
    ROUTED,
    SINK,
    Plan,
    Window,
    branch_frames,
    ordinary_frames,
    plan_official,
    route_mask,
    slot_frames,
    uniform_routes,
)
from kvpo_min.pocket import world
from kvpo_min.rollout import KVHistory, Sampler, Stream, draw_noise, fork, generate, pieces, replay
from kvpo_min.tve import schedule, step_energies

pytestmark = pytest.mark.usefixtures("one_thread")

SIGMAS, WINDOW = schedule(2), Window()
WORDS, NEW_WORDS = world.embed(["a red disc moves left"]), world.embed(["it turns blue and rests"])
SAMPLER = Sampler(SIGMAS, WINDOW, switches=(39,))
CLOSE = dict(atol=1e-5, rtol=0)
FORK, STOP = 42, 57
PLAN = Plan(FORK, range(18, 41), uniform_routes(range(18, 41), 5, 2, torch.Generator().manual_seed(4)), 3)
NEAREST_KEPT = 1


# --------------------------------------------------------------------------------------------------- the bank by itself


def bank_of(scores, frames, pending, pending_frame, compat):
    """One layer, head, token and channel, so that a key is its own score for a text key of 1."""
    kv = torch.tensor(scores).reshape(1, 1, 1, -1, 1, 1, 1).repeat(1, 2, 1, 1, 1, 1, 1)
    last = torch.full((1, 2, 1, 1, 1, 1), pending)
    return Bank(3, 3, compat, kv, torch.tensor([[frames]]), last, pending_frame, recorded=4)


def one():
    return torch.ones(1, 1, 1, 1)


TABLE = [  # entries 0, 9, 18 with these scores, pending 27 with that one; the bank after one, two and three merges
    (0.1, [[9, 0, 27], [9, 0, 27], [9, 0, 27]]),
    (0.4, [[9, 0, 27], [9, 27, 27], [9, 27, 27]]),
    (0.9, [[9, 0, 27], [27, 9, 27], [27, 27, 27]]),
]


@pytest.mark.parametrize("pending, after", TABLE)
def test_the_authors_merge_at_every_block_and_the_default_once(pending, after):
    bank = bank_of([0.3, 0.5, 0.2], [0, 9, 18], pending, 27, "official")
    for frames in after:
        bank = bank.merge(one)
        assert bank.frames.tolist() == [[frames]]
        scores = {0: 0.3, 9: 0.5, 18: 0.2, 27: pending}  # keys and values move with their frame
        assert_close(bank.kv.flatten(2), torch.tensor([[scores[f] for f in frames]] * 2)[None])

    bank = bank_of([0.3, 0.5, 0.2], [0, 9, 18], pending, 27, "").merge(one)
    assert bank.frames.tolist() == [[[9, 0, 27]]] and bank.pending is None
    assert bank.merge(one) is bank


def test_words_rank_at_a_switch_and_officially_ties_do():
    wrong = {"asked": 0}

    def asked():
        wrong["asked"] += 1
        return one()

    official = bank_of([0.1, 0.2, 0.3], [9, 27, 30], 0.9, 36, "official").at_switch(asked)
    assert official.frames.tolist() == [[[9, 27, 36]]] and official.wordless  # torch.topk of ties on a CPU
    official = official.merge(asked)
    assert official.frames.tolist() == [[[9, 27, 36]]] and wrong["asked"] == 0
    assert official.merge(asked).frames.tolist() == [[[36, 27, 36]]] and wrong["asked"] == 1

    ours = bank_of([0.1, 0.2, 0.3], [9, 27, 30], 0.9, 36, "").at_switch(asked)
    assert ours.frames.tolist() == [[[30, 27, 36]]] and wrong["asked"] == 2


def test_filling_asks_for_no_words_and_official_merges_repeat_themselves():
    for compat in ("", "official"):
        bank = Bank(compat=compat)
        assert bank.merge(pytest.fail) == bank and bank.held().tolist() == [[]]
        for b in range(9):
            bank = bank.merge(pytest.fail)
            assert ([] if bank.frames is None else bank.frames[0, 0].tolist()) == [0, 9, 18][: (b + 2) // 3]
            bank = bank.record(3 * b, torch.full((1, 2, 1, 3, 1, 1, 1), float(b)))
        assert bank.recorded == 3 and bank.pending_frame == (None if not compat else 18)
        assert bank.kv.flatten().tolist() == [0, 3, 6, 0, 3, 6]  # block numbers: the first frame of every third block


def test_an_official_replay_records_nothing():
    kv = torch.zeros(1, 2, 1, 3, 1, 1, 1)
    assert Bank(compat="official").record(0, kv, replaying=True).recorded == 0
    assert Bank().record(0, kv, replaying=True).recorded == Bank(compat="official").record(0, kv).recorded == 1


def filled(generator, b=1, layers=2, recorded=5, **more):
    kv = torch.randn(layers, 2, b, 3, 4, 2, 12, generator=generator)
    frames = torch.tensor([0, 9, 18]).expand(layers, b, 3)
    return Bank(3, 3, kv=kv, frames=frames, pending=kv[:, :, :, 0] + 1, pending_frame=27, recorded=recorded, **more)


def test_scores_are_the_mean_over_heads_words_and_tokens():
    generator = torch.Generator().manual_seed(0)
    bank = filled(generator, b=2)
    words = torch.randn(2, 2, 5, 2, 12, generator=generator)  # [layers, B, words, H, D]
    scores = bank.scores(words.mean(2))
    for layer in range(2):
        for g in range(2):
            for f in range(3):
                logits = torch.einsum("whd,thd->hwt", words[layer, g], bank.kv[layer, 0, g, f]) / 12**0.5
                assert_close(scores[layer, g, f], logits.mean(), atol=1e-6, rtol=1e-5)


def test_layers_and_branches_keep_different_frames():
    scores = torch.tensor([[[3.0, 2, 1], [1, 2, 3]], [[2.0, 3, 1], [1, 1, 1]]])  # [layers, b, n]
    bank = filled(torch.Generator().manual_seed(1), b=2)
    after = bank.put_last(bank.kept(scores))
    assert after.frames.tolist() == [[[0, 9, 27], [18, 9, 27]], [[9, 0, 27], [0, 9, 27]]]
    for layer, rows in enumerate(after.frames.tolist()):
        for g, row in enumerate(rows):
            expected = [bank.kv[layer, :, g, [0, 9, 18].index(f)] for f in row[:2]] + [bank.pending[layer, :, g]]
            assert_close(after.kv[layer, :, g], torch.stack(expected, 1), rtol=0, atol=0)
    shared = filled(torch.Generator().manual_seed(1))
    apart = replace(shared, pending=torch.cat([shared.pending, shared.pending + 1], 2))  # two branches recorded it
    apart = apart.put_last(torch.tensor([[[2, 1]], [[0, 1]]]))
    assert apart.frames.tolist() == [[[18, 9, 27]] * 2, [[0, 9, 27]] * 2]
    assert_close(apart.kv[:, :, 1, 2], apart.kv[:, :, 0, 2] + 1)


def test_a_bank_is_a_value():
    bank = filled(torch.Generator().manual_seed(2))
    before = [t.clone() for t in (bank.kv, bank.frames, bank.pending)]
    after = bank.merge(lambda: torch.randn(2, 1, 2, 12))
    block = torch.randn(2, 2, 1, 3, 4, 2, 12)
    later = after.record(36, block)
    block += 1
    later.merge(lambda: torch.randn(2, 1, 2, 12)).kv.zero_()
    for now, then in zip((bank.kv, bank.frames, bank.pending), before, strict=True):
        assert_close(now, then, rtol=0, atol=0)
    assert_close(later.pending, block[:, :, :, 0] - 1)


def test_sizes_that_cannot_work_are_refused():
    for wrong in (dict(size=0), dict(interval=0), dict(size=1.5)):
        with pytest.raises(ValueError, match="must be 1 or more"):
            Bank(**wrong)
    with pytest.raises(ValueError, match='must be "" or "official"'):
        Bank(compat="authors")
    assert Bank(size=1).merge(pytest.fail).kv is None


def test_sparse_activation_against_a_loop():
    q, k, v = (torch.randn(2, n, 3, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 20, 21))
    v = v[:, :20]
    keys, values = sparse_activation(q, k, v, 4, 2)
    for b in range(2):
        for h in range(3):
            score = [float(q[b, :, h].mean(0) @ k[b, 4 * f : 4 * f + 4, h].mean(0)) for f in range(5)]
            best = sorted(sorted(range(5), key=lambda f, score=score: -score[f])[:2])
            rows = [4 * f + t for f in best for t in range(4)]
            assert_close(keys[b, :, h], k[b, rows, h])
            assert_close(values[b, :, h], v[b, rows, h])
    with pytest.raises(ValueError, match="at least 6 frames"):
        sparse_activation(q, k, v, 4, 6)


# ------------------------------------------------------------------------------------------------------ slots and masks


def test_slots_of_the_rolling_cache():
    slots = torch.tensor([[4, 5, 16, 29, 1, 2, 6, 7, 8]])
    for start, moved in ((30, 0), (42, 12), (45, 15)):
        read = slot_frames(slots, start, WINDOW)[0].tolist()
        assert read == [s if s < 3 else s + moved for s in slots[0].tolist()]
    assert slot_frames(slots, 42, WINDOW)[0, :4].tolist() == [16, 17, 28, 41]  # memflow_spec, section 6
    near = slot_frames(slots[:, [0, 1, 2, 4, 5, 6]], 45, WINDOW)
    assert near[0, 6:].tolist() == [42, 43, 44]
    for wrong, start in (([[30] * 9], 42), ([[0] * 10], 42), ([[13] * 9], 12), ([[-1] * 9], 42)):
        with pytest.raises(ValueError, match=f"at frame {start} can read slots"):
            slot_frames(torch.tensor(wrong), start, WINDOW)


def test_the_authors_plan_draws_slots():
    plan = plan_official(42, 0, 1_000_003, 147, WINDOW, 0, 5, 8, slots=True)
    assert plan.fork == 42 and plan.slots and plan.pool == range(30)
    assert plan.routes[0].tolist() == [2, 3, 4, 8, 13, 15, 18, 24, 29]
    assert plan.routes[7].tolist() == [5, 6, 11, 19, 20, 21, 22, 25, 28]
    with pytest.raises(ValueError, match="no block can fork"):
        plan_official(42, 0, 0, 12, WINDOW, 0, 5, 8, slots=True)


def test_the_mask_shows_the_bank():
    frames = branch_frames(PLAN.routes, FORK, WINDOW, NEAREST_KEPT)
    held = torch.tensor([[0, 9, 9, 27, 36], [10, 41, 11, 10, 3]])
    mask = route_mask(frames, FORK, WINDOW, NEAREST_KEPT, held)
    plain = route_mask(frames, FORK, WINDOW, NEAREST_KEPT)
    for g in range(2):
        for f in range(FORK):
            only = f in held[g].tolist() and f not in frames[g].tolist()
            assert mask[g, f] == (BANK if only else plain[g, f])
    assert {SINK, ROUTED, NEAREST, DROPPED, BANK} == set(mask.flatten().tolist())
    assert route_mask(frames, FORK, WINDOW, 1, held[:1])[1, 9] == BANK  # one bank for all rows
    with pytest.raises(ValueError, match="a bank before frame 42"):
        route_mask(frames, FORK, WINDOW, 1, held + 38)


# ------------------------------------------------------------------------------------------------------------- rollouts


class Naive:
    """One video with a bank by the default rules: lists of (frame, keys and values) a layer, nothing is ever dropped,
    and a ranking that looks at every pair of word and token."""

    def __init__(self, backbone, noise):
        self.backbone, self.noise = backbone, noise
        self.kept, self.blocks, self.velocities = {}, {}, {}
        self.layers = len(backbone.transformer.blocks)
        self.bank, self.pending = [[] for _ in range(self.layers)], None

    def word_keys(self, layer, text):
        attn = self.backbone.transformer.blocks[layer].attn2
        words = self.backbone.transformer.condition_embedder.text_embedder(text)[0]
        return attn.norm_k(attn.to_k(words)).reshape(len(words), attn.heads, -1)

    def merge(self, text):
        if self.pending is None:
            return
        frame, kv = self.pending  # [layers, 2, 1, tokens, H, D]
        for layer, held in enumerate(self.bank):
            if len(held) == 3:
                words = self.word_keys(layer, text)
                scores = [torch.einsum("whd,thd->wht", words, k[0, 0]).mean().item() for _, k in held]
                best = sorted(range(3), key=lambda i, scores=scores: (-scores[i], i))[:2]
                self.bank[layer] = [held[i] for i in best]
            self.bank[layer].append((frame, kv[layer]))
        self.pending = None

    def read(self, frames):
        past = [torch.stack([self.bank[layer][i][1] for layer in range(self.layers)]) for i in range(len(self.bank[0]))]
        past += [self.kept[f] for f in frames]
        return torch.cat(past, 3) if past else None

    def encode(self, start, text, frames):
        kv = self.backbone.encode(self.blocks[start], start, text, self.read(frames))
        self.kept |= {start + f: kv[:, :, :, f] for f in range(3)}
        return kv

    @torch.no_grad()
    def make(self, start, text, frames):
        self.merge(text)
        noise, x, out = self.noise[:, start // 3], self.noise[:, start // 3, 0], []
        for s, sigma in enumerate(SIGMAS):
            v = self.backbone.velocity(x, sigma.reshape(1), start, text, self.read(frames))
            out.append(v)
            x0 = x - sigma * v
            if s + 1 < len(SIGMAS):
                x = (1 - SIGMAS[s + 1]) * x0 + SIGMAS[s + 1] * noise[:, s + 1]
        self.blocks[start], self.velocities[start] = x0, torch.stack(out, 1)
        kv = self.encode(start, text, frames)
        if start % 9 == 0:
            self.pending = start, kv[:, :, :, 0]

    @torch.no_grad()
    def switch(self, stop, text):
        self.merge(text)
        for start in range(max(3, stop - 12), stop, 3):
            self.encode(start, text, ordinary_frames(start, WINDOW).tolist())

    def run(self, stop, routes=None):
        for start in range(0, stop, 3):
            if start == 39:
                self.switch(39, NEW_WORDS)
            routed = routes is not None and FORK <= start < FORK + 9
            frames = branch_frames(routes[None], start, WINDOW, 1)[0] if routed else ordinary_frames(start, WINDOW)
            self.make(start, WORDS if start < 39 else NEW_WORDS, frames.tolist())
        return self

    @property
    def frames(self):
        return [[frame for frame, _ in held] for held in self.bank]


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone()


@pytest.fixture(scope="module")
def noise():
    return draw_noise(STOP // 3, 2, (3, 8, 4, 4), torch.Generator().manual_seed(5))


def forked(backbone, noise, bank, plan=PLAN, **more):
    return fork(backbone, [WORDS, NEW_WORDS], noise, plan, STOP, STOP, SAMPLER, NEAREST_KEPT, **more,
                prefix=Stream(bank=bank))  # fmt: skip


@pytest.fixture(scope="module")
def group(backbone, noise):
    return forked(backbone, noise, Bank())


def test_text_keys_are_those_of_the_cross_attention(backbone):
    """Seen by hooks while a whole forward runs."""
    seen, blocks = [], backbone.transformer.blocks
    hooks = [block.attn2.norm_k.register_forward_hook(lambda m, i, out: seen.append(out)) for block in blocks]
    backbone.velocity(torch.randn(1, 3, 8, 4, 4), torch.ones(1), 0, WORDS, None)
    for hook in hooks:
        hook.remove()
    keys = backbone.text_keys(WORDS)
    assert keys.shape == (len(blocks), 1, 2, 12) and len(seen) == len(blocks)
    for ours, theirs in zip(keys, seen, strict=True):
        assert_close(ours, theirs.unflatten(2, (2, -1)).mean(1), **CLOSE)


def test_a_fork_with_a_bank_is_naive_videos_one_after_the_other(backbone, noise, group):
    """A switch at 39 with a full bank, two routed branches, the anchor."""
    prefix = Naive(backbone, noise).run(FORK)
    assert len({tuple(row) for row in prefix.frames}) > 1 or prefix.frames[0] != [9, 18, 36]  # ranking did something
    assert group.prefix.bank.frames[:, 0].tolist() == prefix.frames
    for g, routes in enumerate([*PLAN.routes, None]):
        naive = Naive(backbone, noise).run(STOP, routes)
        video = torch.cat([naive.blocks[start] for start in sorted(naive.blocks)], 1)
        assert_close(group.videos[g : g + 1], video, **CLOSE)
        velocities = torch.stack([naive.velocities[start] for start in range(FORK, STOP, 3)], 1)
        assert_close(group.trajectory.velocity[g : g + 1], velocities, **CLOSE)


def test_the_bank_does_something_and_none_is_none(backbone, noise, group):
    without = forked(backbone, noise, None)
    assert without.prefix.bank is None
    assert_close(without.videos[:, :3], group.videos[:, :3], rtol=0, atol=0)  # the first block reads nothing
    assert (without.videos[:, 3:] - group.videos[:, 3:]).abs().amax((0, 2, 3, 4)).min() > 1e-4


@pytest.mark.parametrize("compat", ["", "official"])
def test_an_anchor_explains_itself_only_where_replays_record(backbone, noise, compat):
    made = forked(backbone, noise, Bank(compat=compat))
    v = replay(backbone, made, SAMPLER, branches=3)
    energy = step_energies(v, made.trajectory.velocity)[2]  # [B, S] of the anchor, block 45 records
    if compat:
        assert energy[:2].max() < 1e-9 < 1e-7 < energy[2:].max()
    else:
        assert energy.max() < 1e-9


@pytest.mark.parametrize("compat", ["", "official"])
@pytest.mark.parametrize("context", ["stored", "own"])
def test_pieces_are_the_replay(make_backbone, backbone, noise, compat, context):
    made, other = forked(backbone, noise, Bank(compat=compat)), make_backbone(seed=1)
    whole = step_energies(replay(other, made, SAMPLER, context=context), made.trajectory.velocity[:2])
    parts = torch.zeros_like(whole)
    for where, part, sampler in pieces(other, made, SAMPLER, 2, context=context):
        v = replay(other, part, sampler, context=context, branches=len(part.trajectory.z))
        parts[where] = step_energies(v, part.trajectory.velocity)
    assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_branches_may_run_one_at_a_time(backbone, noise, group):
    apart = forked(backbone, noise, Bank(), branch_batch=1)
    assert_close(apart.videos, group.videos, **CLOSE)


def test_a_replay_leaves_the_bank_alone(backbone, noise):
    made = forked(backbone, noise, Bank(compat="official"))
    bank = made.prefix.bank
    before = [t.clone() for t in (bank.kv, bank.frames, bank.pending)]
    first = replay(backbone, made, SAMPLER, context="own")
    for now, then in zip((bank.kv, bank.frames, bank.pending), before, strict=True):
        assert_close(now, then, rtol=0, atol=0)
    assert_close(replay(backbone, made, SAMPLER, context="own"), first, rtol=0, atol=0)


@pytest.mark.parametrize("compat", ["", "official"])
def test_gradients_with_checkpointing_are_those_without(make_backbone, noise, compat):
    """The authors' move by 1 to 4 percent there (tests/golden: relative_difference_with_checkpointing)."""
    gradients = []
    for checkpointing in (False, True):
        backbone = make_backbone(seed=2)
        made = forked(backbone, noise, Bank(compat=compat))
        backbone.requires_grad_(True).train(checkpointing)
        if checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        v = replay(backbone, made, SAMPLER, grad_steps=2, context="own")
        step_energies(v, made.trajectory.velocity[:2]).sum().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 20
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_slots_move_while_branches_are_made(backbone, noise):
    """Routes as slots: what a branch reads, by a history that remembers what it was asked."""
    asked, plan = [], Plan(FORK, range(30), torch.tensor([[4, 5, 16, 17, 20, 21, 22, 26, 29]]), 3, slots=True)
    original = KVHistory.read

    def read(history, frames, bank=None):
        asked.append(frames.tolist())
        return original(history, frames, bank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVHistory, "read", read)
        made = forked(backbone, noise, Bank(compat="official"), plan)
    rows = [frames[0] for frames in asked if frames and isinstance(frames[0], list)]
    assert [row[:4] for row in rows[:3]] == [[16, 17, 28, 29], [19, 20, 31, 32], [22, 23, 34, 35]]
    assert rows[3] == ordinary_frames(51, WINDOW).tolist() and made.videos.shape[0] == 2


def test_streams_that_only_generate(backbone, noise):
    """The anchor of a group is the plain video."""
    plain = generate(backbone, Stream(bank=Bank()), [WORDS, NEW_WORDS], noise, STOP, SAMPLER)
    naive = Naive(backbone, noise).run(STOP)
    assert plain.bank.frames[:, 0].tolist() == naive.frames
    assert len(plain.history.frames) <= WINDOW.history
    assert_close(plain.latents, torch.cat([naive.blocks[start] for start in sorted(naive.blocks)], 1), **CLOSE)
