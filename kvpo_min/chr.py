"""Causal history routing (CHR): which past frames each branch may read. KVPO, arXiv 2605.14278, routing section.

An autoregressive video model denoises one block of frames while attending to a window of past frames: the first ones
(the sink) and the last ones. CHR explores by changing only this window. For a few blocks from one fork on, every branch
reads the sink, its own few routed frames drawn from the older history, and the nearest frames; noise and solver stay as
they are.

Everything is a frame number counted from the start of the video, and every count is of PAST frames: the block being
denoised always sees itself and is counted nowhere here.

Paper / authors' code / this file:
1. Counting. The authors' m_nearest_frames includes the current block, so their m is `nearest + block` here.
2. Pool. Paper: all frames between the sink and the nearest ones. Authors: one block less, because they subtract m from
   the fork, so the frames fork-4..fork-2 are read by no branch. Here: as the paper; `gap=window.block` is theirs.
3. Draw. Paper: each branch uniformly, without replacement (`uniform_routes`). Authors: shifted windows of a single
   permutation (`dispersed_routes`), where neighbouring branches mostly share all frames but one.
4. Look-up. Once their cache has rolled, the authors read every routed frame one block later than planned. Frames are
   absolute here, so there is nothing to shift.
Symbols: G branches, L frames read. DS, KV, CM: pipeline/diversity_sampling.py, trainer/kvpo.py and
wan/modules/causal_model.py of the authors' LongLive variant.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

DROPPED, SINK, ROUTED, NEAREST, BANK = 0, 1, 2, 3, 4  # labels of `route_mask`


@dataclass(frozen=True)
class Window:
    """Attention window of one block, in frames. Raises ValueError for sizes that cannot work."""

    sink: int = 3  # first frames of the video, always read
    past: int = 6  # other past frames a block reads
    block: int = 3  # frames denoised together
    history: int = 33  # frames kept resident, sink included; routing cannot reach further back

    def __post_init__(self):
        for name, size in vars(self).items():
            if not isinstance(size, int):
                raise ValueError(f"Window.{name} must be a whole number of frames, got {size!r}")
        for name, least in (("sink", 0), ("past", 1), ("block", 1), ("history", self.sink + self.past)):
            if getattr(self, name) < least:
                raise ValueError(f"Window.{name} must be at least {least} frames, got {getattr(self, name)}")

    @property
    def attended(self) -> int:
        """Frames that attention sees at once: sink, past and the block itself."""
        return self.sink + self.past + self.block


@dataclass(frozen=True)
class Plan:
    """What one group of branches does differently from the anchor."""

    fork: int  # first frame of the first routed block; everything before it is shared
    pool: range  # frames that could be drawn
    routes: Tensor  # [G, n_routed] routed frames of each branch, ascending; the same in all routed blocks
    perturb_num_blocks: int  # routed blocks, counted from the fork
    slots: bool = False  # the authors' MemFlow: routes are slots of the rolling cache (`slot_frames`), not frames


def chunk_starts(num_frames: int, first: int = 21, rest: int = 18) -> list[int]:
    """First frames of the chunks of a video of `num_frames` frames: `first` frames, then `rest` each (DS:417-438)."""
    if min(num_frames, first, rest) < 1:
        raise ValueError(f"num_frames, first and rest must be at least 1 frame, got {num_frames}, {first}, {rest}")
    return [0, *range(first, num_frames, rest)]


def chunk_of(frame: int, num_frames: int) -> range:
    """The frames of the chunk that holds `frame`. From a fork to the end of its chunk the authors replay and score."""
    if not 0 <= frame < num_frames:
        raise ValueError(f"frame must be one of the video, 0..{num_frames - 1}, got {frame}")
    starts = [*chunk_starts(num_frames), num_frames]
    k = bisect.bisect(starts, frame)
    return range(starts[k - 1], starts[k])


def ordinary_frames(start: int, window: Window) -> Tensor:
    """Frames [L] that an unrouted block at `start` reads: the sink, then the last `past` ones, ascending (CM:395-413).

    L is sink + past once start >= sink + past; a block nearer to the start of the video reads what there is.
    """
    if start < 0:
        raise ValueError(f"start must be a frame number, 0 or more, got {start}")
    last = range(max(window.sink, start - window.past), start)
    return torch.tensor([*range(min(window.sink, start)), *last], dtype=torch.long)  # [L]


def pool(fork: int, window: Window, nearest: int, perturb_num_blocks: int, gap: int = 0) -> range:
    """Frames that may be routed to blocks fork, ..., fork + block * (perturb_num_blocks - 1); empty if there are none.

    The oldest must still be resident when the last of these blocks is made. The newest lies before the `nearest`
    frames, and `gap` frames before those. gap 0 is the paper's; gap = window.block is the authors' (DS:86-113).
    """
    if not 0 <= nearest < window.past:
        raise ValueError(f"nearest must be 0..{window.past - 1}, to leave room for a routed frame, got {nearest}")
    if fork < 0 or perturb_num_blocks < 1 or gap < 0:
        raise ValueError(
            "fork must be a frame, perturb_num_blocks at least 1 and gap 0 or more, "
            f"got {fork}, {perturb_num_blocks} and {gap}"
        )
    last = fork + window.block * (perturb_num_blocks - 1)
    lo = max(window.sink, last - (window.history - window.sink))
    return range(lo, max(lo, fork - nearest - gap))


def eligible_forks(
    num_frames: int, window: Window, nearest: int, perturb_num_blocks: int,
    first_chunks: int = 7, first: int = 21, rest: int = 18, gap: int = 0, slots: bool = False,
) -> list[int]:  # fmt: skip
    """Starts of the blocks where a group can fork (rule of DS:86-113), ascending, possibly none.

    A fork needs a full attention window of frames before it, `perturb_num_blocks` whole blocks in its chunk, a chunk
    among the `first_chunks`, and a pool of at least past - nearest frames: a routed block reads exactly as many frames
    as an ordinary one, so that anchor and branches run as one batch. `slots`: those of `slot_pool`, sink included.
    """
    if perturb_num_blocks < 1:
        raise ValueError(f"perturb_num_blocks must be at least 1 block, got {perturb_num_blocks}")
    if first % window.block or rest % window.block:
        raise ValueError(f"chunks must hold whole blocks of {window.block} frames, got chunks of {first} and {rest}")
    forks, starts = [], chunk_starts(num_frames, first, rest)
    for start, end in list(zip(starts, [*starts[1:], num_frames], strict=True))[:first_chunks]:
        for fork in range(start, end - perturb_num_blocks * window.block + 1, window.block):
            if slots:
                spare = len(slot_pool(fork, window, nearest)) - window.sink
            else:
                spare = len(pool(fork, window, nearest, perturb_num_blocks, gap))
            if spare >= window.past - nearest and fork >= window.attended:
                forks.append(fork)
    return forks


def uniform_routes(frames: Sequence[int], n_routed: int, num_generations: int, generator: Generator) -> Tensor:
    """Each branch draws `n_routed` of `frames` uniformly, none twice: [G, n_routed], ascending (the paper's)."""
    _check_draw(frames, n_routed, num_generations)
    index = torch.stack([torch.randperm(len(frames), generator=generator)[:n_routed] for _ in range(num_generations)])
    return torch.tensor(frames)[index].sort(dim=1).values  # [G, n_routed]


def dispersed_routes(frames: Sequence[int], n_routed: int, num_generations: int, generator: Generator) -> Tensor:
    """Branches take shifted windows of one shared permutation of `frames`: [G, n_routed], ascending (DS:366-415).

    The shift is len(frames) // G, at least 1: with a shift of 1 two neighbours differ in a single frame, and when
    n_routed is the whole pool all branches are the same.
    """
    _check_draw(frames, n_routed, num_generations)
    permutation = torch.randperm(len(frames), generator=generator)
    shift = max(1, len(frames) // num_generations)
    slots = torch.arange(num_generations)[:, None] * shift + torch.arange(n_routed)  # [G, n_routed]
    return torch.tensor(frames)[permutation[slots % len(frames)]].sort(dim=1).values  # [G, n_routed]


def plan(
    num_frames: int, window: Window, nearest: int, perturb_num_blocks: int, num_generations: int, generator: Generator,
    fork: int = 0,
) -> Plan:  # fmt: skip
    """The paper's plan: a uniform fork, then uniform routes of past - nearest frames. Arguments as `eligible_forks`.
    `fork` (ours): a fixed fork, one of those, else ValueError; 0: drawn."""
    forks = eligible_forks(num_frames, window, nearest, perturb_num_blocks)
    if fork and fork not in forks:
        raise ValueError(f"fork must be one of {forks}, or 0 to draw it, got {fork}")
    fork = fork or _pick(forks, generator)
    frames = pool(fork, window, nearest, perturb_num_blocks)
    return Plan(
        fork, frames, uniform_routes(frames, window.past - nearest, num_generations, generator), perturb_num_blocks
    )


def plan_official(
    seed: int, sample_idx: int, seed_context: int,
    num_frames: int, window: Window, nearest: int, perturb_num_blocks: int, num_generations: int,
    first_chunks: int = 7, first: int = 21, rest: int = 18, slots: bool = False,
) -> Plan:  # fmt: skip
    """The authors' plan, integer for integer (DS:39-183): two generators seeded one apart, gap, dispersed routes.

    `seed_context` tells the updates apart: the authors use (update + 1) * 1_000_003 (KV:997-998). `slots`: the plan of
    their MemFlow (its DS:36-136), whose routes are slots of the rolling cache, as many as the window has past frames
    less `nearest`; the sink keeps no place of its own.
    """
    seed = seed + 97 * sample_idx + seed_context
    gap = window.block
    chunks = first_chunks, first, rest
    forks = eligible_forks(num_frames, window, nearest, perturb_num_blocks, *chunks, gap, slots)
    fork = _pick(forks, Generator().manual_seed(seed))
    n_routed = window.past - nearest
    if slots:
        frames, n_routed = slot_pool(fork, window, nearest), window.sink + n_routed
    else:
        frames = pool(fork, window, nearest, perturb_num_blocks, gap)
    routes = dispersed_routes(frames, n_routed, num_generations, Generator().manual_seed(seed + 1))
    return Plan(fork, frames, routes, perturb_num_blocks, slots)


def slot_pool(fork: int, window: Window, nearest: int) -> range:
    """Slots that the authors' MemFlow may route to a fork: all resident frames, sink included, but the last `nearest` +
    block (MemFlow's DS:77-84)."""
    return range(max(0, min(fork, window.history) - nearest - window.block))


def slot_frames(routes: Tensor, start: int, window: Window) -> Tensor:
    """Frames [G, L] that branches read when the authors' MemFlow makes the routed block at `start`: those in the slots
    `routes` [G, n_routed] of its cache, then the nearest ones that fill the window; no sink (its CM:190-228).

    Slot s holds frame s while s is in the sink or the cache has not rolled, afterwards frame end - history + s, where
    `end` is that of the block. So what a slot holds moves on with every block."""
    end, filled = start + window.block, window.history - window.block
    nearest = window.sink + window.past - routes.shape[1]
    if nearest < 0 or routes.min() < 0 or routes.max() >= min(start, filled) - nearest:
        raise ValueError(
            f"the block at frame {start} can read slots 0..{min(start, filled) - nearest - 1}, "
            f"{window.sink + window.past} at most, got {routes.tolist()}"
        )
    moved = routes + max(0, end - window.history)
    frames = torch.where(routes < window.sink, routes, moved)  # [G, n_routed]
    last = torch.arange(start - nearest, start, device=routes.device).expand(len(routes), -1)
    return torch.cat([frames, last], 1)


def prefix_frames(plan: Plan, window: Window) -> set[int]:
    """Frames before the fork that the routes of a plan need."""
    if not plan.slots:
        return set(plan.routes.flatten().tolist())
    blocks = range(plan.fork, plan.fork + plan.perturb_num_blocks * window.block, window.block)
    read = torch.cat([slot_frames(plan.routes, start, window) for start in blocks], 1)
    return {f for f in read.flatten().tolist() if f < plan.fork}


def routed_frames(plan: Plan, start: int, window: Window, nearest: int) -> Tensor:
    """Frames [G, L] that each branch of a plan reads, besides a bank, when the routed block at `start` is made."""
    return slot_frames(plan.routes, start, window) if plan.slots else branch_frames(plan.routes, start, window, nearest)


def branch_frames(routes: Tensor, start: int, window: Window, nearest: int) -> Tensor:
    """Frames [G, L] that each branch reads when the routed block at `start` is made: sink, routed, nearest; ascending.

    `routes` [G, n_routed] stay the same in all routed blocks while the nearest frames move with `start` (CM:103-170).
    Raises ValueError for a frame that does not exist yet, or that would be read twice.
    """
    if routes.ndim != 2 or 0 in routes.shape or routes.is_floating_point() or nearest < 0:
        raise ValueError(
            f"routes must be frame numbers [G, n_routed] and nearest 0 or more, got {list(routes.shape)} of "
            f"{routes.dtype} and {nearest}"
        )
    shared = torch.tensor([*range(window.sink), *range(start - nearest, start)], dtype=torch.long, device=routes.device)
    frames = torch.cat([shared.expand(len(routes), -1), routes], dim=1).sort(dim=1).values  # [G, L]
    if frames.min() < 0 or frames.max() >= start:
        raise ValueError(
            f"a block at frame {start} can read frames 0..{start - 1}, got {frames.min()}..{frames.max()}: "
            "route frames before the fork, and fork after the sink"
        )
    if (frames.diff(dim=1) == 0).any():
        raise ValueError(
            f"a frame would be read twice: routed frames must lie in {window.sink}..{start - nearest - 1} "
            f"(after the sink, before the nearest) and differ within a branch, got {routes.tolist()}"
        )
    return frames


def route_mask(frames: Tensor, start: int, window: Window, nearest: int, bank: Tensor | None = None) -> Tensor:
    """What each past frame is to each branch: int8 [G, start] of DROPPED, SINK, ROUTED, NEAREST. `frames` is [G, L].

    For an ordinary block give `ordinary_frames(start, window)[None]` and nearest = window.past. `bank` [G or 1, n]
    (`Bank.held`): frames of a memory bank; BANK where nothing but the bank shows them.
    """
    if frames.numel() and not (0 <= frames.min() and frames.max() < start):
        raise ValueError(f"a block at frame {start} can read frames 0..{start - 1}, got {frames.tolist()}")
    label = torch.full_like(frames, ROUTED)
    label[frames >= start - nearest] = NEAREST
    label[frames < window.sink] = SINK
    mask = torch.full((len(frames), start), DROPPED, dtype=torch.int8, device=frames.device)
    if bank is not None:
        if bank.numel() and not (0 <= bank.min() and bank.max() < start):
            raise ValueError(f"a bank before frame {start} holds frames 0..{start - 1}, got {bank.tolist()}")
        mask.scatter_(1, bank.to(frames.device).expand(len(frames), -1), BANK)
    return mask.scatter(1, frames, label.to(torch.int8))  # [G, start]


def overlap(routes: Tensor) -> Tensor:
    """How alike the branches' windows are: Jaccard index of every two rows of `routes` [G, n] -> [G, G], 1 = same."""
    shared = (routes[:, None, :, None] == routes[None, :, None, :]).sum(dim=(2, 3))  # [G, G]
    return shared / (2 * routes.shape[1] - shared)


def _check_draw(frames: Sequence[int], n_routed: int, num_generations: int) -> None:
    if n_routed < 1 or num_generations < 1:
        raise ValueError(f"n_routed and num_generations must be at least 1, got {n_routed} and {num_generations}")
    if len(frames) < n_routed:
        raise ValueError(f"cannot draw {n_routed} frames from a pool of {len(frames)}: fork later, or route fewer")


def _pick(forks: list[int], generator: Generator) -> int:
    if not forks:
        raise ValueError("no block can fork: make the video longer, the window smaller, or perturb_num_blocks fewer, "
                         "which must fit into one chunk")  # fmt: skip
    return forks[int(torch.randint(len(forks), (1,), generator=generator))]
