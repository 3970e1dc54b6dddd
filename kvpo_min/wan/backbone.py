"""Drives a stock diffusers `WanTransformer3DModel` causally: a block of frames at a time, reading keys and values of
chosen past frames.

Three additions, all by composition; weights, blocks and file formats stay diffusers':

1. `CausalProcessor`: self-attention over [keys and values of the past frames that were passed in | this block].
2. `FrameRope`: rotary positions of the block's absolute frames instead of 0, 1, 2. Keys are rotated before they are
   stored, so a frame keeps its own position wherever it is read (authors:
   models/longlive/wan/modules/causal_model.py:282-286).
3. One noise level per frame: the stock model takes one timestep per token.

Which frames are read is the caller's business (`rollout.py`, `chr.py`): the model never knows about routing. What a
call reads reaches every attention layer as an argument (`rotary_emb`); `FrameRope` holds it only until the stock model
has asked for its positions. So gradient checkpointing recomputes exactly what was computed: a history that grows
meanwhile cannot change the gradient.

v = noise - x0 and x_sigma = (1 - sigma) x0 + sigma noise; timestep = 1000 sigma.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """What one forward reads. It takes the place of diffusers' (cos, sin) pair."""

    turn: Tensor  # [B or 1, tokens, 1, D / 2] complex, cos + i sin of the angle that a pair of channels is turned by
    kv: tuple[Tensor, ...] | None  # for each layer [2, B, past tokens, heads, D]
    mask: Tensor | None  # [B, 1, tokens, past tokens + tokens] bool, True = may read
    written: list[Tensor] | None  # collects [2, B, tokens, heads, D] a layer when this call encodes


class CausalProcessor:
    """Self-attention of one layer. Takes the place of diffusers' `WanAttnProcessor`."""

    _attention_backend = None  # diffusers expects these two on every processor
    _parallel_config = None

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Call = None):
        call = rotary_emb
        q = rotate(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), call)  # [B, tokens, heads, D]
        k = rotate(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), call)
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        q, k = q.type_as(v), k.type_as(v)  # autocast on a GPU leaves the norms, and so queries and keys, in float32
        if call.written is not None:
            call.written.append(torch.stack([k, v]))
        if call.kv is not None:
            past_k, past_v = call.kv[self.layer]
            k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)  # [B, past + tokens, heads, D]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask)
        out = out.transpose(1, 2).flatten(2, 3).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](out))


def rotate(x: Tensor, call: Call) -> Tensor:
    """Rotary embedding: neighbouring channels are a complex number. x [B, tokens, heads, D]"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # there are no complex numbers of 16 bits
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # [B, tokens, heads, D / 2]
    return torch.view_as_real(pairs * call.turn).flatten(-2).type_as(x)


class FrameRope(nn.Module):
    """Stands where the stock model asks for its positions, and hands out the `Call` that is under way."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.split = [stock.t_dim, stock.h_dim, stock.w_dim]
        self.register_buffer("freqs_cos", stock.freqs_cos, persistent=False)
        self.register_buffer("freqs_sin", stock.freqs_sin, persistent=False)
        self.call: Call | None = None

    def turn(self, frames: Tensor, height: int, width: int) -> Tensor:
        """frames [b, n] absolute -> cos + i sin [b, n * height * width, 1, D / 2]"""
        if int(frames.max()) >= len(self.freqs_cos):
            raise ValueError(
                f"frame {int(frames.max())} is past the table of {len(self.freqs_cos)} positions: make the video "
                f"shorter, or load the transformer with a larger rope_max_seq_len"
            )
        out = []
        for table in (self.freqs_cos, self.freqs_sin):
            t, h, w = table.split(self.split, 1)
            b, n = frames.shape
            grid = (b, n, height, width, -1)
            parts = [t[frames][:, :, None, None], h[:height][None, None, :, None], w[:width][None, None, None]]
            out.append(torch.cat([part.expand(grid) for part in parts], -1).flatten(1, 3)[:, :, None])
        cos, sin = (table[..., 0::2].float() for table in out)  # the stock tables hold each angle twice
        return torch.complex(cos, sin)

    def forward(self, hidden_states: Tensor) -> Call:
        return self.call


class WanBackbone(nn.Module):
    """The backbone of the pocket model and of Wan2.1-1.3B: `velocity` and `encode`, all that KVPO asks of a model.

    `transformer`: a `WanTransformer3DModel`, changed in place (processors and positions; no weight is touched).
    """

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer
        transformer.rope = FrameRope(transformer.rope)
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(CausalProcessor(layer))

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    def tokens(self, height: int, width: int) -> int:
        """Tokens a frame of latents [*, height, width] becomes."""
        _, p_h, p_w = self.transformer.config.patch_size
        return (height // p_h) * (width // p_w)

    def forward(self, x, sigma, frames, text, kv=None, mask=None, written=None) -> Tensor:
        """The general call. x [B, F, C, H, W]; sigma [B] or [B, F]; frames [F] or [B, F] absolute; text [B, L, D];
        kv [layers, 2, B, past tokens, heads, D]; mask [B, F, past frames + F] bool (True = may read), default all.
        -> velocity, shape of x. Text and kv of batch 1 serve the whole batch."""
        b, n, _, height, width = x.shape
        frames = torch.as_tensor(frames, device=x.device)
        frames = frames[None] if frames.ndim == 1 else frames
        if frames.shape[1] != n:
            raise ValueError(f"x holds {n} frames, but {frames.shape[1]} absolute frame numbers were given")
        per_frame = self.tokens(height, width)
        _, p_h, p_w = self.transformer.config.patch_size
        if kv is not None and kv.shape[2] != b:
            kv = kv.expand(-1, -1, b, -1, -1, -1)
        if mask is not None:
            mask = mask.repeat_interleave(per_frame, 1).repeat_interleave(per_frame, 2)[:, None]
        timestep = 1000.0 * sigma.to(x)
        if timestep.ndim == 2:
            timestep = timestep.repeat_interleave(per_frame, 1)
        rope = self.transformer.rope
        # apart, because a gradient that comes to one layer's part would fill the size of all
        layers = None if kv is None else kv.unbind(0)
        rope.call = Call(rope.turn(frames, height // p_h, width // p_w), layers, mask, written)
        try:
            velocity = self.transformer(
                hidden_states=x.transpose(1, 2),
                timestep=timestep,
                encoder_hidden_states=text.expand(b, -1, -1),
                return_dict=False,
            )[0]
        finally:
            rope.call = None
        return velocity.transpose(1, 2)

    def velocity(
        self, x: Tensor, sigma: Tensor, start: int | Tensor, text: Tensor, kv: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Velocity of noisy blocks that begin at absolute frame `start` (an int, or [B]). `mask` as in `forward`.
        x [B, F, C, H, W], sigma [B] -> like x."""
        frames = torch.as_tensor(start)[..., None] + torch.arange(x.shape[1])
        return self(x, sigma, frames, text, kv, mask)

    @torch.no_grad()
    def encode(
        self, x0: Tensor, start: int, text: Tensor, kv: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Keys and values of a clean block (timestep 0), to append to a history. `mask` as in `forward`.
        x0 [B, F, C, H, W] -> [layers, 2, B, F, tokens a frame, heads, D]"""
        written: list[Tensor] = []
        frames = torch.arange(start, start + x0.shape[1])
        self(x0, x0.new_zeros(len(x0)), frames, text, kv, mask, written)
        return torch.stack(written).unflatten(3, (x0.shape[1], -1))

    @torch.no_grad()
    def text_keys(self, text: Tensor) -> Tensor:
        """Mean key of the text in the cross-attention of every layer, padding included: what a memory bank is ranked
        against (bank.py). text [B, L, D] -> [layers, B, heads, D of a head]"""
        words = self.transformer.condition_embedder.text_embedder(text)
        cross = [block.attn2 for block in self.transformer.blocks]
        return torch.stack([a.norm_k(a.to_k(words)).unflatten(2, (a.heads, -1)).mean(1) for a in cross])
