"""The causal backbone against the stock diffusers model: its own processor, its own positions, one masked forward."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.testing import assert_close

from kvpo_min.pocket import world
from kvpo_min.rollout import KVHistory
from kvpo_min.train import TrainConfig, acting, add_policies
from kvpo_min.tve import schedule
from kvpo_min.wan import CausalProcessor

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK, FRAMES, SHAPE = 3, 18, (8, 4, 4)
TOKENS = 4  # a frame
TEXT = world.embed(["a red disc moves left"])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def video(seed=0, frames=FRAMES):
    return draw(1, frames, *SHAPE, seed=seed)


def window_of(start):
    """Frames that a block at `start` reads: 3 of the sink and the last 6, written as sets."""
    return sorted({0, 1, 2} & set(range(start)) | set(range(max(0, start - 6), start)))


def encoded(backbone, clean, positions=lambda start: start):
    """History of a clean video, every block read by the ordinary window."""
    history = KVHistory()
    for start in range(0, clean.shape[1], BLOCK):
        kv = history.read(torch.tensor(window_of(start), dtype=torch.long))
        kv = backbone.encode(clean[:, start : start + BLOCK], positions(start), TEXT, kv)
        history = history.append(start, kv)
    return history


# ---------------------------------------------------------------------------------- the reference: nothing of wan.py


class Masked(WanAttnProcessor):
    """diffusers' own self-attention under a fixed mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


class FixedRope(torch.nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables

    def forward(self, hidden_states):
        return self.tables


def masked_stock(transformer, x, sigma, positions, may_read):
    """One forward of the stock model. x [1, N, C, H, W], sigma [N], positions [N], may_read [N, N] bool -> velocity"""
    transformer = copy.deepcopy(transformer)
    whole = transformer.rope(torch.zeros(1, 8, max(positions) + 1, 4, 4))
    transformer.rope = FixedRope([table.unflatten(1, (-1, TOKENS))[:, positions].flatten(1, 2) for table in whole])
    mask = may_read.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)[None, None]
    for block in transformer.blocks:
        block.attn1.set_processor(Masked(mask))
    timestep = (1000 * sigma).repeat_interleave(TOKENS)[None]
    out = transformer(x.transpose(1, 2), timestep, TEXT, return_dict=False)[0]
    return out.transpose(1, 2)


def teacher_forced(transformer, clean, noisy, sigma, reads):
    """Velocity of every noisy block beside a clean copy of the video, in one masked forward.
    sigma [blocks]; reads[start]: past frames that the noisy block at `start` reads; clean blocks read `window_of`."""
    n = clean.shape[1]
    may_read = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for start in range(0, n, BLOCK):
        own = list(range(start, start + BLOCK))
        for frame in own:
            may_read[frame, window_of(start) + own] = True
            may_read[n + frame, reads[start] + [n + f for f in own]] = True
    levels = torch.cat([torch.zeros(n), sigma.repeat_interleave(BLOCK)])
    positions = list(range(n)) * 2
    return masked_stock(transformer, torch.cat([clean, noisy], 1), levels, positions, may_read)[:, n:]


def block_by_block(backbone, history, noisy, sigma, reads, positions=lambda start: start):
    out = []
    for b, start in enumerate(range(0, noisy.shape[1], BLOCK)):
        kv = history.read(torch.tensor(reads[start], dtype=torch.long))
        out.append(backbone.velocity(noisy[:, start : start + BLOCK], sigma[b : b + 1], positions(start), TEXT, kv))
    return torch.cat(out, 1)


ORDINARY = {start: window_of(start) for start in range(0, FRAMES, BLOCK)}
LEVELS = torch.tensor([1.0, 0.625, 0.8333, 0.25, 0.9375, 0.5])  # one a block


# ------------------------------------------------------------------------------------------------- against the stock


def test_the_first_block_is_the_stock_model(make_transformer, make_backbone):
    x, sigma = torch.cat([video(0, 3), video(1, 3)]), torch.tensor([0.9375, 0.3])
    text = world.embed(["a red disc moves left", "a cross rests"])
    stock = make_transformer()(x.transpose(1, 2), 1000 * sigma, text, return_dict=False)[0].transpose(1, 2)
    ours = make_backbone().velocity(x, sigma, 0, text, None)
    assert ours.shape == x.shape
    assert_close(ours, stock, atol=1e-6, rtol=0)


def test_the_words_and_the_noise_level_matter(make_backbone):
    backbone, x = make_backbone(), video(0, 3)
    v = backbone.velocity(x, torch.tensor([0.9]), 0, TEXT, None)
    assert (backbone.velocity(x, torch.tensor([0.3]), 0, TEXT, None) - v).abs().max() > 1e-3
    assert (backbone.velocity(x, torch.tensor([0.9]), 0, world.embed(["a cross rests"]), None) - v).abs().max() > 1e-3


def test_block_by_block_is_one_masked_forward(make_transformer, make_backbone):
    clean, noisy, backbone = video(0), video(1), make_backbone()
    want = teacher_forced(make_transformer(), clean, noisy, LEVELS, ORDINARY)
    got = block_by_block(backbone, encoded(backbone, clean), noisy, LEVELS, ORDINARY)
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("fault", ["no cache", "positions start at 0", "every block one later", "wrong frames"])
def test_a_wrong_cache_is_seen(fault, make_transformer, make_backbone):
    """Negative controls of the test above: each fault moves the velocity a hundred times further than its tolerance."""
    clean, noisy, backbone = video(0), video(1), make_backbone()
    want = teacher_forced(make_transformer(), clean, noisy, LEVELS, ORDINARY)
    reads, history, positions = ORDINARY, encoded(backbone, clean), lambda start: start
    if fault == "no cache":
        reads = {start: [] for start in ORDINARY}
    elif fault == "positions start at 0":
        positions = lambda start: 0  # noqa: E731
        history = encoded(backbone, clean, positions)
    elif fault == "every block one later":  # the history keeps its positions, the block being made does not
        positions = lambda start: start + 3 if start else 0  # noqa: E731
    else:
        reads = {start: [max(0, f - 3) for f in frames] for start, frames in ORDINARY.items()}
    got = block_by_block(backbone, history, noisy, LEVELS, reads, positions)
    assert_close(got[:, :3], want[:, :3], atol=1e-5, rtol=0)  # the first block has no past
    for start in range(6, FRAMES, BLOCK):
        assert (got - want)[:, start : start + BLOCK].abs().max() > 1e-3


def test_chosen_frames_are_a_masked_forward_that_hides_the_others(make_transformer, make_backbone):
    clean, noisy, backbone = video(0), video(1), make_backbone()
    chosen = ORDINARY | {12: [0, 1, 2, 4, 5, 7, 8, 11], 15: [0, 2, 3, 9, 14]}
    want = teacher_forced(make_transformer(), clean, noisy, LEVELS, chosen)
    history = encoded(backbone, clean)
    assert (block_by_block(backbone, history, noisy, LEVELS, chosen) - want).abs().max() < 1e-5
    # and the choice matters
    assert (block_by_block(backbone, history, noisy, LEVELS, ORDINARY) - want)[:, 12:].abs().max() > 1e-3


def test_our_mask_argument_is_the_stock_mask(make_transformer, make_backbone):
    """`forward(mask=...)`, which the teacher is trained with: [past frames | own frames], one row a frame."""
    clean, noisy, backbone = video(0, 9), video(1, 6), make_backbone()
    history = encoded(backbone, clean)
    hidden = {(0, 3), (0, 12), (2, 14), (5, 0), (4, 10)}  # (query, key) frames
    mask = torch.tensor([[(q, k) not in hidden for k in range(15)] for q in range(6)])[None]
    kv = history.read(torch.arange(9))
    got = backbone(noisy, torch.full((1, 6), 0.7), torch.arange(9, 15), TEXT, kv, mask)
    may_read = torch.zeros(15, 15, dtype=torch.bool)
    for start in range(0, 9, BLOCK):
        for frame in range(start, start + BLOCK):
            may_read[frame, window_of(start) + list(range(start, start + BLOCK))] = True
    may_read[9:] = mask[0]
    levels = torch.tensor([0.0] * 9 + [0.7] * 6)
    want = masked_stock(make_transformer(), torch.cat([clean, noisy], 1), levels, list(range(15)), may_read)[:, 9:]
    assert_close(got, want, atol=1e-5, rtol=0)
    assert (backbone(noisy, torch.full((1, 6), 0.7), torch.arange(9, 15), TEXT, kv) - want).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------- arguments


def test_one_level_a_frame_is_one_level_a_call(make_backbone):
    backbone, x = make_backbone(), torch.cat([video(0, 3), video(1, 3)])
    sigma = torch.tensor([0.8333, 0.25])
    kv = encoded(backbone, video(2, 9)).read(torch.arange(9))
    per_call = backbone.velocity(x, sigma, 9, TEXT, kv)
    per_frame = backbone(x, sigma[:, None].expand(2, 3), torch.arange(9, 12), TEXT, kv)
    assert_close(per_frame, per_call, atol=1e-6, rtol=0)
    mixed = sigma[:, None].repeat(1, 3)
    mixed[0, 2] = 0.1  # and a frame's own level is that frame's
    change = (backbone(x, mixed, torch.arange(9, 12), TEXT, kv) - per_call).abs().amax((2, 3, 4))
    assert change[0, 2] > 1e-3 and change[1].max() < 1e-6


def test_a_batch_of_different_starts_is_single_calls(make_backbone):
    backbone, starts = make_backbone(), torch.tensor([12, 3, 33])
    history = encoded(backbone, video(2))
    x, sigma = torch.cat([video(s, 3) for s in range(3)]), torch.tensor([1.0, 0.625, 0.9375])
    text = world.embed(["a red disc", "a cross", "a blue square moves up"])
    kv = torch.cat([history.read(torch.arange(i, i + 9)) for i in range(3)], 2)
    batch = backbone.velocity(x, sigma, starts, text, kv)
    for i in range(3):
        one = backbone.velocity(x[i : i + 1], sigma[i : i + 1], int(starts[i]), text[i : i + 1], kv[:, :, i : i + 1])
        assert_close(batch[i : i + 1], one, atol=1e-5, rtol=0)
        other = backbone.velocity(x[i : i + 1], sigma[i : i + 1], 60, text[i : i + 1], kv[:, :, i : i + 1])
        assert (other - one).abs().max() > 1e-3  # the start matters


def test_text_and_history_of_one_serve_the_whole_batch(make_backbone):
    backbone = make_backbone()
    kv = encoded(backbone, video(2, 9)).read(torch.arange(9))
    x, sigma = torch.cat([video(0, 3), video(1, 3)]), torch.tensor([0.9, 0.9])
    shared = backbone.velocity(x, sigma, 9, TEXT, kv)
    repeated = backbone.velocity(x, sigma, 9, TEXT.repeat(2, 1, 1), kv.repeat(1, 1, 2, 1, 1, 1))
    assert torch.equal(shared, repeated)


def test_encode_is_what_a_clean_block_writes(make_backbone):
    """[layers, 2, B, F, tokens, heads, D]; values of the first layer by hand, from the stock layers."""
    backbone, x = make_backbone(), video(0, 3)
    kv = backbone.encode(x, 6, TEXT, None)
    assert kv.shape == (2, 2, 1, 3, TOKENS, 2, 12) and not kv.requires_grad
    transformer = backbone.transformer
    tokens = transformer.patch_embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2)
    _, modulation, _, _ = transformer.condition_embedder(torch.zeros(1), TEXT, None)
    block = transformer.blocks[0]
    shift, scale = (block.scale_shift_table + modulation.unflatten(1, (6, -1)))[:, :2].chunk(2, 1)
    value = block.attn1.to_v(block.norm1(tokens) * (1 + scale) + shift)
    assert_close(kv[0, 1].flatten(1, 2), value.unflatten(2, (2, 12)), atol=1e-5, rtol=0)
    elsewhere = backbone.encode(x, 9, TEXT, None)  # the first layer's values do not know the place, its keys do
    assert torch.equal(elsewhere[0, 1], kv[0, 1])
    assert (elsewhere[0, 0] - kv[0, 0]).abs().max() > 0.1


def test_velocity_only_reads_the_history(make_backbone):
    backbone = make_backbone()
    kv = encoded(backbone, video(2, 9)).read(torch.arange(9))
    before = kv.clone()
    first = backbone.velocity(video(0, 3), torch.tensor([0.9]), 9, TEXT, kv)
    again = backbone.velocity(video(0, 3), torch.tensor([0.9]), 9, TEXT, kv)
    assert torch.equal(kv, before)
    assert torch.equal(first, again)


def test_a_frame_past_the_table_of_positions_is_an_error(make_backbone):
    backbone, x = make_backbone(), video(0, 3)
    assert backbone.velocity(x, torch.tensor([0.9]), 157, TEXT, None).isfinite().all()  # frames 157..159 of 160
    with pytest.raises(ValueError, match="frame 160 .* table of 160"):
        backbone.velocity(x, torch.tensor([0.9]), 158, TEXT, None)
    with pytest.raises(ValueError, match="frame 162 "):
        backbone.velocity(x.repeat(2, 1, 1, 1, 1), torch.tensor([0.9, 0.9]), torch.tensor([0, 160]), TEXT, None)


def test_frames_and_numbers_must_agree(make_backbone):
    with pytest.raises(ValueError, match="3 frames, but 4"):
        make_backbone()(video(0, 3), torch.tensor([0.9]), torch.arange(4), TEXT)


def test_a_failed_call_leaves_nothing_behind(make_backbone):
    backbone, x = make_backbone(), video(0, 3)
    want = backbone.velocity(x, torch.tensor([0.9]), 0, TEXT, None)
    with pytest.raises(RuntimeError):
        backbone.velocity(x, torch.tensor([0.9]), 0, torch.zeros(1, 10, 7), None)
    assert backbone.transformer.rope.call is None
    assert torch.equal(backbone.velocity(x, torch.tensor([0.9]), 0, TEXT, None), want)


# --------------------------------------------------------------------------------------------------------- gradient


def gradients(backbone, checkpointing, monkeypatch):
    """Gradient of two velocities; between forward and backward the history grows and other calls are served."""
    runs, call = [], CausalProcessor.__call__

    def counted(self, *args, **kwargs):
        runs.append(self.layer)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(CausalProcessor, "__call__", counted)
    backbone.transformer.requires_grad_(True).train()
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    history, loss = encoded(backbone, video(2, 9)), 0.0
    runs.clear()
    for start in (9, 12):
        kv = history.read(torch.tensor(window_of(start)))
        v = backbone.velocity(video(start, 3), torch.tensor([0.8]), start, TEXT, kv)
        loss = loss + (v * video(100 + start, 3)).sum()
        history = history.append(start, backbone.encode(v.detach(), start, TEXT, kv))
    backbone.velocity(video(5, 3), torch.tensor([0.1]), 30, world.embed(["a cross rests"]), None).sum()
    history.append(9, torch.zeros(2, 2, 1, 3, TOKENS, 2, 12))
    before = len(runs)
    loss.backward()
    monkeypatch.undo()
    return {name: p.grad for name, p in backbone.named_parameters()}, len(runs) - before


def test_gradient_with_checkpointing_is_the_gradient_without(make_backbone, monkeypatch):
    plain, recomputed = gradients(make_backbone(), False, monkeypatch)
    assert recomputed == 0
    checkpointed, recomputed = gradients(make_backbone(), True, monkeypatch)
    assert recomputed == 4  # two forwards of two layers were really done again
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)
    assert plain["transformer.blocks.0.attn1.to_k.weight"].abs().max() > 1e-4


def test_gradient_is_the_slope_of_the_loss(make_backbone):
    """Directional finite difference, so that the comparison above does not compare one fault with itself. The stock
    norms compute in float32 whatever the weights are, hence the tolerance."""
    backbone = make_backbone().double()
    weight = backbone.transformer.blocks[0].attn1.to_k.weight.requires_grad_(True)
    kv = draw(2, 2, 1, 9 * TOKENS, 2, 12, seed=4).double()
    x, target = video(0, 3).double(), video(1, 3).double()

    def loss():
        return (backbone.velocity(x, torch.tensor([0.8]), 9, TEXT.double(), kv) * target).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction, eps = draw(*weight.shape, seed=5).double(), 2e-3
    with torch.no_grad():
        weight += eps * direction
        above = loss()
        weight -= 2 * eps * direction
        below = loss()
    assert_close((above - below) / (2 * eps), (gradient * direction).sum(), rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------------------- LoRA


def test_adapters_with_zero_b_are_the_base(make_backbone, make_pipeline):
    pipeline, base = make_pipeline(), make_backbone()
    policies = add_policies(pipeline, TrainConfig(rank=4))
    x, sigma = video(0, 3), schedule()[1:2]
    kv = encoded(base, video(2, 9)).read(torch.arange(9))
    want = base.velocity(x, sigma, 9, TEXT, kv)
    for name in ("default", "old", "ema", "initial"):
        with acting(policies, name), torch.no_grad():
            assert torch.equal(pipeline.backbone.velocity(x, sigma, 9, TEXT, kv), want)
            assert torch.equal(pipeline.backbone.encode(x, 9, TEXT, kv), base.encode(x, 9, TEXT, kv))
    # the adapters do act: one element of B moves the velocity, of that policy alone
    with torch.no_grad():
        next(p for key, p in policies.named_parameters() if "lora_B.old" in key)[0, 0] = 1.0
        for name in ("default", "old", "ema", "initial"):
            with acting(policies, name):
                same = torch.equal(pipeline.backbone.velocity(x, sigma, 9, TEXT, kv), want)
            assert same == (name != "old")


def test_which_layers_are_adapted(make_pipeline):
    """Every linear layer of a block but the keys and values of the text, whose results are cached by the authors."""
    policies = add_policies(make_pipeline(), TrainConfig(rank=4))
    keys = [key.removeprefix("base_model.model.") for key, p in policies.named_parameters() if p.requires_grad]
    trained = {key.split(".lora")[0] for key in keys}
    layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"]
    layers += ["ffn.net.0.proj", "ffn.net.2"]
    assert trained == {f"blocks.{n}.{layer}" for n in range(2) for layer in layers}
    assert all(".default." in key for key in keys)
