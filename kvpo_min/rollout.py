"""Streaming generation, forking and replay: everything that touches the history of keys and values.

1. `KVHistory`: frame -> its keys and values. Immutable, so whoever holds one (a fork, a replay, a checkpointed
   forward) keeps what it saw. Prefix frames are stored once for all branches.
2. `generate`: block by block, 4 steps each: predict x0, re-noise with the given noise, then encode the clean block.
3. `fork`: one prefix, then G branches and the anchor in one batch, from the same noise; each branch reads the frames
   of its route while `perturb_num_blocks` blocks are made (all steps and the encoding), afterwards the ordinary ones.
4. `replay`: velocities of any policy at the recorded noisy inputs, under the ordinary context. All steps and branches
   of all blocks in one batch, because the context between blocks is the branch's own stored x0. Where that is too
   much at once, `pieces` cuts a replay into small ones.

Numbered differences from the authors' code (their files in docs/paper_map.md):
1. A prompt switch that falls on the fork re-encodes the history first; the authors miss it.
2. Routed frames are looked up by their absolute number; theirs are read 3 frames late once the cache has rolled.
3. The encoding adds no noise to the context.
4. `context="own"` is their replay (the replaying policy's own last prediction between blocks), block after block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kvpo_min.chr import Plan, Window, ordinary_frames, routed_frames
from kvpo_min.tve import Trajectory

if TYPE_CHECKING:
    from kvpo_min.bank import Bank

# Batch size of a replay on a CPU: larger ones overflow its caches.
AT_ONCE = 48


class Backbone(Protocol):
    """All that sampling, forking and replay ask of a model (`wan/backbone.py` is one). `start` is the block's first
    absolute frame, an int or [B]. `text` [b, L, D] and `kv` are broadcast if b = 1.

    Training also moves tensors to `device` and, unless `train` is given `policies`, puts LoRA on the linear layers of
    `transformer` that have the (diffusers) names in `policies.LORA_TARGETS`."""

    device: torch.device

    def velocity(self, x: Tensor, sigma: Tensor, start: int | Tensor, text: Tensor, kv: Tensor | None) -> Tensor:
        """[B, F, C, H, W], [B] -> v = noise - x0, same shape; `kv` is read only. With `prefix_coef`, also the mask of
        `WanBackbone.velocity`."""

    def encode(self, x0: Tensor, start: int, text: Tensor, kv: Tensor | None) -> Tensor:
        """Clean block -> its keys and values [layers, 2, B, F, tokens a frame, heads, D], without gradient.
        With a memory bank, also `text_keys` and the mask of `WanBackbone.encode` (bank.py)."""


@dataclass(frozen=True)
class KVHistory:
    """Keys and values of past frames, by absolute frame number: [layers, 2, b, tokens, heads, D], b = 1 where
    shared."""

    frames: dict[int, Tensor] = field(default_factory=dict)

    def append(self, start: int, kv: Tensor) -> KVHistory:
        """A new history that also holds the frames of kv [layers, 2, B, F, tokens, heads, D] from `start` on."""
        return KVHistory(self.frames | {start + f: part for f, part in enumerate(kv.unbind(3))})

    def keep(self, sink: int, newest: int) -> KVHistory:
        """A new history without the frames that no later block can read: the sink and the `newest` others stay."""
        last = max(self.frames, default=0)
        return KVHistory({f: kv for f, kv in self.frames.items() if f < sink or f > last - newest})

    def read(self, frames: Tensor, bank: Tensor | None = None) -> Tensor | None:
        """Gathers frames [L] (the same for all) or [B, L] -> [layers, 2, B or 1, L * tokens, heads, D]; None for L = 0.
        A frame that is not there is an error, never skipped (the authors skip it: causal_model.py:150).
        bank [layers, 2, B or 1, n, tokens, heads, D]: entries of a memory bank, which are read before them."""
        missing = sorted(set(frames.flatten().tolist()) - set(self.frames))
        if missing:
            raise KeyError(f"frames {missing} are not in the history, which holds {sorted(self.frames)}")
        entries = () if bank is None else bank.unbind(3)
        if frames.shape[-1] + len(entries) == 0:
            return None
        if frames.ndim == 1:
            columns = [*entries, *(self.frames[f] for f in frames.tolist())]
            b = max(c.shape[2] for c in columns)
            return torch.cat([c.expand(-1, -1, b, -1, -1, -1) for c in columns], 3)
        n_layers, two, _, tokens, *rest = self.frames[int(frames[0, 0])].shape
        length = len(entries) + frames.shape[1]
        out = self.frames[int(frames[0, 0])].new_empty(n_layers, two, len(frames), length, tokens, *rest)
        for i, kv in enumerate(entries):
            out[:, :, :, i] = kv
        for g, row in enumerate(frames.tolist()):  # copied once, into place: it is the largest tensor of a rollout
            for i, f in enumerate(row, len(entries)):
                kv = self.frames[f]
                out[:, :, g, i] = kv[:, :, 0 if kv.shape[2] == 1 else g]
        return out.flatten(3, 4)


def read_together(history: KVHistory, reads: Sequence[Tensor], block: int) -> tuple[Tensor, Tensor]:
    """What blocks that read different numbers of frames read, for one call: keys and values filled up with zeros to
    the longest, [layers, 2, blocks, tokens, heads, D], and the mask that hides those, [blocks, F, past frames + F]. One
    of them at least must read a frame. reads: frames [L] of each; block: F."""
    longest = max(len(frames) for frames in reads)
    mask = torch.zeros(len(reads), block, longest + block, dtype=torch.bool)
    mask[:, :, longest:] = True
    first = next(iter(history.frames.values()))  # [layers, 2, 1, tokens a frame, heads, D]
    kv = first.new_zeros(*first.shape[:2], len(reads), longest, *first.shape[3:])
    for b, frames in enumerate(reads):
        mask[b, :, : len(frames)] = True
        for i, frame in enumerate(frames.tolist()):
            kv[:, :, b, i] = history.frames[frame][:, :, 0]
    return kv.flatten(3, 4), mask.to(kv.device)


@dataclass(frozen=True)
class Stream:
    """A video under way."""

    x0: tuple[Tensor, ...] = ()  # finished blocks, each [B, F, C, H, W]
    history: KVHistory = KVHistory()
    frame: int = 0  # next frame
    segment: int = 0  # whose words rule
    bank: Bank | None = None  # MemFlow's memory (bank.py); `Stream(bank=Bank())` begins a video that has one

    @property
    def latents(self) -> Tensor:
        """[B, T, C, H, W]; blocks made before a fork are repeated for every branch."""
        b = max(block.shape[0] for block in self.x0)
        return torch.cat([block.expand(b, -1, -1, -1, -1) for block in self.x0], 1)


def keep_frames(stream: Stream, frames: set[int]) -> Stream:
    """The same stream with the keys and values of these frames alone, so that the others can be freed."""
    return replace(stream, history=KVHistory({f: kv for f, kv in stream.history.frames.items() if f in frames}))


def one_of(stream: Stream, k: int) -> Stream:
    """Video k of a batch under way, as a stream of its own."""

    def row(x: Tensor, dim: int) -> Tensor:
        return x if x.shape[dim] == 1 else x.narrow(dim, k, 1).clone()  # a view would keep the whole batch in memory

    history = KVHistory({f: row(kv, 2) for f, kv in stream.history.frames.items()})
    return replace(stream, x0=tuple(row(x, 0) for x in stream.x0), history=history)


@dataclass(frozen=True)
class Sampler:
    """What stays fixed while videos are made."""

    sigmas: Tensor  # [S] descending, first 1
    window: Window = Window()
    switches: tuple[int, ...] = ()  # frames at which the next segment's words take over
    eta: float = 1.0  # share of fresh noise in every re-noising: 1 the distilled model's sampler, 0 the ODE (Euler)
    kernel: Callable | None = None  # another step instead: x, v, sigma, next sigma -> mean, std (compare/baselines.py)


def draw_noise(n_blocks: int, n_steps: int, shape: Sequence[int], generator: torch.Generator, batch: int = 1) -> Tensor:
    """All the noise of a video: initial noise and re-noise of every block. shape (F, C, H, W) -> [batch, blocks, S,
    F, C, H, W]"""
    return torch.randn(batch, n_blocks, n_steps, *shape, generator=generator, dtype=torch.float32, device="cpu")


def denoise(
    backbone: Backbone, noise: Tensor, sigmas: Tensor, start: int, text: Tensor, kv: Tensor | None, eta=1.0, kernel=None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sampler: predict x0, re-noise to the next level (authors: streaming_training.py:187-203; the same numbers as
    diffusers' `FlowMatchEulerDiscreteScheduler(shift=5, stochastic_sampling=True)`; eta 0: without
    stochastic_sampling). The last step gives x0 and no noise, whatever the `kernel`.
    noise [B, S, F, C, H, W] -> x0 [B, F, C, H, W], inputs z [B, S, ...] and predictions [B, S, ...] of every step."""
    x = noise[:, 0]
    z = []
    predictions = []
    for s, sigma in enumerate(sigmas):
        z.append(x)
        v = backbone.velocity(x, sigma.expand(len(x)), start, text, kv)
        x0 = x - sigma * v
        predictions.append(x0)
        if s + 1 < len(sigmas) and kernel:
            mean, std = kernel(x, v, sigma, sigmas[s + 1])
            x = mean + std * noise[:, s + 1]
        elif s + 1 < len(sigmas):
            renoise = noise[:, s + 1] if eta == 1 else x + (1 - sigma) * v  # the noise that v believes is in x
            if 0 < eta < 1:
                renoise = eta * noise[:, s + 1] + (1 - eta**2) ** 0.5 * renoise
            x = (1 - sigmas[s + 1]) * x0 + sigmas[s + 1] * renoise
    return x0, torch.stack(z, 1), torch.stack(predictions, 1)


def segment_at(frame: int, switches: Sequence[int]) -> int:
    """Which segment's words rule at `frame`."""
    return sum(switch <= frame for switch in switches)


def stale_from(frame: int, window: Window) -> int:
    """The first frame that a prompt switch at `frame` encodes again; its old keys are replaced before they are read."""
    first = max(window.sink, frame - window.attended)
    return -(-first // window.block) * window.block


def switch_reach(window: Window) -> int:
    """How many frames before a prompt switch are encoded again, or read for that."""
    return window.attended + window.past


def gather(history: KVHistory, frames: Tensor, bank: Bank | None) -> Tensor | None:
    """`history.read`, the entries of a memory bank first if there is one."""
    return history.read(frames) if bank is None else history.read(frames, bank.kv)


def switch_prompt(backbone: Backbone, stream: Stream, text: Tensor, sampler: Sampler, segment: int) -> Stream:
    """Re-encodes the recent past under new words, block by block (authors: diversity_sampling.py:243-309, there in
    one pass).
    The last window of frames is encoded again; the sink and older frames keep the keys of the old words."""
    window, history = sampler.window, stream.history
    bank = stream.bank and stream.bank.at_switch(partial(backbone.text_keys, text))
    if bank is not None and bank.compat:
        history = bank.encode_again(backbone, stream.x0, history, text, window)
        return replace(stream, history=history, segment=segment, bank=bank)
    blocks = dict(zip(range(0, stream.frame, window.block), stream.x0, strict=True))
    for start in range(stale_from(stream.frame, window), stream.frame, window.block):
        own = backbone.encode(blocks[start], start, text, gather(history, ordinary_frames(start, window), bank))
        history = history.append(start, own)
    return replace(stream, history=history, segment=segment, bank=bank)


@torch.no_grad()
def generate(
    backbone: Backbone,
    stream: Stream,
    texts: Sequence[Tensor],
    noise: Tensor,
    stop: int,
    sampler: Sampler,
    reads: Callable[[int], Tensor] | None = None,
    record: Callable[[int, Tensor, Tensor], None] | None = None,
    routed_end: int | None = None,
) -> Stream:
    """Continues a video up to frame `stop`. Memory for keys and values does not grow with the video's length.

    texts: one [B or 1, L, D] a segment; noise [B or 1, blocks of the whole video, S, F, C, H, W]; `reads(start)`
    gives the frames a block reads (default `ordinary_frames`); `record(start, z, x0)` sees every block's
    trajectory. From `routed_end` on only ordinary frames are read, so fewer stay resident.
    Raises ValueError when the noise ends before `stop` or `stop` cuts a block.
    """
    window = sampler.window
    if stop % window.block or stop // window.block > noise.shape[1] or stop < stream.frame:
        raise ValueError(
            f"cannot generate up to frame {stop}: it must be a multiple of {window.block}, and there is noise for "
            f"{noise.shape[1] * window.block} frames; {stream.frame} are made already"
        )
    if stop > stream.frame and len(texts) <= segment_at(stop - window.block, sampler.switches):
        raise ValueError(f"{len(texts)} texts are too few: the words switch at frames {sampler.switches} before {stop}")
    unrouted = min(window.history, window.sink + switch_reach(window))  # frames that are needed where nothing is routed
    for start in range(stream.frame, stop, window.block):
        kv = None  # freed before the next ones are gathered
        segment = segment_at(start, sampler.switches)
        if segment != stream.segment:
            stale = stale_from(start, window)  # freed first: a branch may hold gigabytes of it
            stream = keep_frames(stream, {f for f in stream.history.frames if f < stale})
            stream = switch_prompt(backbone, stream, texts[segment], sampler, segment)
        if stream.bank is not None:
            stream = replace(stream, bank=stream.bank.merge(partial(backbone.text_keys, texts[segment])))
        kv = gather(stream.history, reads(start) if reads else ordinary_frames(start, window), stream.bank)
        block_noise = noise[:, start // window.block]
        if kv is not None:
            b = max(len(block_noise), kv.shape[2])
            block_noise = block_noise.expand(b, *block_noise.shape[1:])
        how = sampler.eta, sampler.kernel
        x0, z, predictions = denoise(backbone, block_noise, sampler.sigmas, start, texts[segment], kv, *how)
        if record is not None:
            record(start, z, predictions)
        # frames that no later block can read go before the new ones come
        routed = routed_end is None or start + window.block < routed_end
        newest = (window.history if routed else unrouted) - window.sink - window.block
        stream = replace(stream, history=stream.history.keep(window.sink, newest))
        own = backbone.encode(x0, start, texts[segment], kv)
        bank = stream.bank and stream.bank.record(start, own)
        history = stream.history.append(start, own)
        stream = Stream((*stream.x0, x0), history, start + window.block, segment, bank)
        del history, own, bank  # or a prompt switch could not free them
    return stream


@dataclass(frozen=True)
class Rollout:
    """One group: G branches and, last in the batch, the anchor. (`pieces` makes smaller ones.)"""

    prefix: Stream  # up to the fork, B = 1; every replay starts from its keys and values, the old policy's
    videos: Tensor  # [G + 1, T, C, H, W] latents up to the last scored frame
    trajectory: Trajectory  # of all G + 1, from the fork to the end of its chunk
    plan: Plan
    text: Tensor  # [1, L, D] words that rule at the fork


def fork(
    backbone: Backbone,
    texts: Sequence[Tensor],
    noise: Tensor,
    plan: Plan,
    stop: int,
    record_until: int,
    sampler: Sampler,
    nearest: int,
    branch_batch: int | None = None,
    prefix: Stream | None = None,
) -> Rollout:
    """One prefix, then G routed branches and the anchor, all from the same noise [1, blocks, S, F, C, H, W].
    Noise [G + 1, ...] gives each its own from the fork on (for comparison: exploring by noise); the prefix uses the
    last.

    plan.routes [G, n_routed]; blocks in [fork, fork + perturb_num_blocks * block) are routed. `record_until`: end of
    the trajectory (the fork's chunk). `branch_batch` bounds how many run at once; the numbers do not depend on it.
    """
    window, num_generations = sampler.window, len(plan.routes)
    if not 0 <= plan.fork < record_until <= stop:
        raise ValueError(
            f"expected 0 <= fork < record_until <= stop (frames), got {plan.fork}, {record_until} and {stop}"
        )
    if inside := [frame for frame in sampler.switches if plan.fork < frame < record_until]:
        raise ValueError(
            f"the words change at frame {inside[0]}, inside the trajectory [{plan.fork}, {record_until}), which is "
            "replayed under the words of the fork: let prompts switch where chunks begin (chr.chunk_starts)"
        )
    prefix = generate(backbone, prefix or Stream(), texts, noise[-1:], plan.fork, sampler)
    segment = segment_at(plan.fork, sampler.switches)
    if segment != prefix.segment:  # a switch on the fork itself: new words first, then the snapshot
        prefix = switch_prompt(backbone, prefix, texts[segment], sampler, segment)
    routed_end = plan.fork + plan.perturb_num_blocks * window.block

    videos, recorded = [], []
    for members in torch.arange(num_generations + 1).split(branch_batch or num_generations + 1):
        trail: list[tuple[Tensor, Tensor]] = []

        def reads(start: int, members=members) -> Tensor:  # a default binds this round's
            rows = ordinary_frames(start, window).expand(len(members), -1)
            if start >= routed_end:
                return rows
            routed = routed_frames(plan, start, window, nearest)
            routed = torch.cat([routed, ordinary_frames(start, window)[None]])  # the anchor is the last row
            return routed[members]

        def record(start: int, z: Tensor, x0: Tensor, trail=trail) -> None:
            if start < record_until:
                trail.append((z, x0))

        own = noise if len(noise) == 1 else noise[members]
        stream = generate(backbone, prefix, texts, own, stop, sampler, reads, record, routed_end)
        videos.append(stream.latents)
        del stream  # its history, before the next branches make theirs
        recorded.append([torch.stack(part, 1) for part in zip(*trail, strict=True)])  # [b, B, S, F, C, H, W]
    z, x0 = (torch.cat(part) for part in zip(*recorded, strict=True))
    return Rollout(prefix, torch.cat(videos), Trajectory(z, x0, sampler.sigmas), plan, texts[segment])


def replay(
    backbone: Backbone,
    rollout: Rollout,
    sampler: Sampler,
    grad_steps: int = 0,
    replay_batch: int | None = None,
    context: str = "stored",
    branches: int | None = None,
    n_steps: int = 0,
) -> Tensor:
    """Velocities of the active policy at a rollout's noisy inputs, under the ordinary context (paper: u against
    v_theta).

    -> [G, B, S, F, C, H, W]; the first `grad_steps` steps carry gradient. `branches`: how many (default: all but the
    anchor). context="stored": between blocks the branch's own x0 is encoded, so blocks are independent and run in one
    batch. context="own": the replaying policy's own last prediction is encoded, block after block (authors:
    kvpo.py:2370-2388). No gradient flows through what is read. `replay_batch`: forwards at once; memory of contexts
    and graph is not bounded by it (`pieces` bounds both). `n_steps`: only the first steps (0: all), with context
    "stored".
    """
    window = sampler.window
    start = rollout.prefix.frame
    trajectory = rollout.trajectory
    g = len(trajectory.z) - 1 if branches is None else branches
    if n_steps and (context != "stored" or not grad_steps <= n_steps <= len(sampler.sigmas)):
        raise ValueError(
            f'n_steps must be 0 or, with context "stored", grad_steps..{len(sampler.sigmas)}, got {n_steps} with '
            f"{context!r}"
        )
    z, stored = trajectory.z[:g, :, : n_steps or None], trajectory.x0[:g]  # [G, B, S, F, C, H, W]
    n_blocks, n_steps = z.shape[1:3]
    if context not in ("stored", "own") or not 0 <= grad_steps <= n_steps or not 0 < g <= len(trajectory.z):
        raise ValueError(
            f'context must be "stored" or "own", grad_steps 0..{n_steps} and branches 1..{len(trajectory.z)}, got '
            f"{context!r}, {grad_steps} and {g}"
        )
    history = rollout.prefix.history
    bank = rollout.prefix.bank
    contexts = []
    predicted = []
    for b in range(n_blocks):
        here = start + b * window.block
        bank = bank and bank.merge(partial(backbone.text_keys, rollout.text))
        kv = gather(history, ordinary_frames(here, window), bank)  # [layers, 2, G, ...], or 1 for the first block
        if context == "own":
            one = _velocities(backbone, z[:, b : b + 1], sampler, here, rollout.text, [kv], grad_steps, replay_batch)
            predicted.append(one)
            x0 = (z[:, b, -1] - sampler.sigmas[-1] * one[:, 0, -1]).detach()
        else:
            contexts.append(kv)
            x0 = stored[:, b, -1]
        if b + 1 < n_blocks:
            own = backbone.encode(x0, here, rollout.text, kv)
            history, bank = history.append(here, own), bank and bank.record(here, own, replaying=True)
    if context == "own":
        return torch.cat(predicted, 1)
    return _velocities(backbone, z, sampler, start, rollout.text, contexts, grad_steps, replay_batch)


def _velocities(backbone, z, sampler, start, text, contexts, grad_steps, replay_batch) -> Tensor:
    """z [G, B, S, F, C, H, W], contexts: kv of each block, [layers, 2, G or 1, ...] -> velocities like z; one batch
    with and one without gradient. What branches share, the first step after the fork, is replayed once."""
    g, n_blocks, n_steps = z.shape[:3]
    starts = start + sampler.window.block * torch.arange(n_blocks)
    begin_alike = contexts[0].shape[2] == 1 and bool((z[:, 0, 0] == z[0, 0, 0]).all())  # one past, one noise
    contexts = [kv.expand(-1, -1, g, -1, -1, -1) for kv in contexts]
    parts = []
    for steps, with_grad in ((range(grad_steps), True), (range(grad_steps, n_steps), False)):
        if not len(steps):
            continue
        s = torch.tensor(steps)
        index = torch.cartesian_prod(torch.arange(g), torch.arange(n_blocks), s)  # [G * B * S', 3]
        again = (index[:, 0] > 0) & (index[:, 1:] == 0).all(1) & begin_alike  # what row 0 is already
        out = []
        with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
            rows = index[~again]
            for i in rows.split(replay_batch or (AT_ONCE if z.device.type == "cpu" else len(rows))):
                x, sigma = z[i[:, 0], i[:, 1], i[:, 2]], sampler.sigmas[i[:, 2]]
                read = [contexts[b][:, :, g] for g, b in i[:, :2].tolist()]
                one = (i[:, :2] == i[:1, :2]).all()  # steps of one branch and block share their context
                kv = read[0][:, :, None] if one else torch.stack(read, 2)
                out.append(backbone.velocity(x, sigma, starts[i[:, 1]], text, kv))
            row_of = ((~again).cumsum(0) - 1).masked_fill(again, 0)
            parts.append(torch.cat(out)[row_of].unflatten(0, (g, n_blocks, len(s))))
    return torch.cat(parts, 2)


def pieces(
    backbone: Backbone, rollout: Rollout, sampler: Sampler, replay_batch: int, n_steps: int = 0,
    context: str = "stored", branches: int = 0,
) -> Iterator[tuple[tuple[slice, slice, slice], Rollout, Sampler]]:  # fmt: skip
    """Splits a replay of the first `n_steps` steps (0: all) into rollouts of one block and at most `replay_batch`
    forwards: first the steps of a branch, which share a context, then several branches. Between blocks x0 is encoded
    as in `replay`; context="own" costs one extra forward a block.
    `branches`: how many (default: all but the anchor). Yields where the piece belongs in [G, B, S], its rollout, its
    sampler."""
    window = sampler.window
    trajectory = rollout.trajectory
    n_blocks, all_steps = trajectory.z.shape[1:3]
    if replay_batch < 1 or not 0 <= n_steps <= all_steps:
        raise ValueError(
            f"replay_batch must be at least 1 and n_steps 0..{all_steps}, got {replay_batch} and {n_steps}"
        )
    n_steps = n_steps or all_steps
    branches = branches or len(rollout.plan.routes)
    at_once = min(replay_batch, n_steps)
    together = max(1, replay_batch // n_steps)
    for first in range(0, branches, together):
        members = slice(first, min(first + together, branches))
        history, bank = rollout.prefix.history, rollout.prefix.bank
        for b in range(n_blocks):
            here = rollout.prefix.frame + b * window.block
            for s in range(0, n_steps, at_once):
                where = (members, slice(b, b + 1), slice(s, min(s + at_once, n_steps)))
                sigmas = sampler.sigmas[where[2]]
                part = replace(
                    rollout,
                    prefix=Stream((), history, here, bank=bank),
                    trajectory=Trajectory(trajectory.z[where], trajectory.x0[where], sigmas),
                )
                yield where, part, replace(sampler, sigmas=sigmas)
            if b + 1 < n_blocks:
                bank = bank and bank.merge(partial(backbone.text_keys, rollout.text))  # as `replay` did for this block
                kv = gather(history, ordinary_frames(here, window), bank)
                x0 = trajectory.x0[members, b, -1]
                if context == "own":
                    z, sigma = trajectory.z[members, b, -1], sampler.sigmas[-1]
                    with torch.no_grad():
                        x0 = z - sigma * backbone.velocity(z, sigma.expand(len(z)), here, rollout.text, kv)
                own = backbone.encode(x0, here, rollout.text, kv)
                bank = bank and bank.record(here, own, replaying=True)
                history = history.append(here, own).keep(window.sink, window.past)
                del kv, own  # before the next pieces gather theirs
