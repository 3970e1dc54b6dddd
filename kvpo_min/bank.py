"""MemFlow's memory bank: a few old frames that every block reads besides its window. MemFlow, arXiv 2512.14699.

1. Each layer keeps the keys and values of `size` old frames: whole frames, keys rotated where they were made.
2. Every `interval` blocks the first frame of the block just encoded is set aside: it is *pending*.
3. Before the next block is made, or encoded again, the pending frame is *merged* into the bank.
4. A full bank makes room first: entries are ranked against the words, the best size - 1 stay, the pending one is last.
5. score = mean over heads, words and tokens of <key of the word in cross-attention, key of the frame> / sqrt(D).
   The words of padding count. No threshold, no softmax; the pending frame does not compete.
6. Layers rank for themselves, so they come to keep different frames; so do the branches of a group.
7. Attention reads [sink | bank | last frames | block]; a frame that is held twice, or in the window too, counts twice.
8. An entry keeps the keys of its recording, also when a prompt switch encodes the frame again.
9. A bank is a value: `record` and `merge` return new ones. Whoever holds one (a fork, a replay, a forward that gradient
   checkpointing runs again) keeps what it saw.

Faults of the authors' code; `compat="official"` has them, the default what stands after the colon:
a. The pending frame is merged before every block, so a full bank fills with its copies: it is merged once.
b. At a prompt switch the text keys are still zero in two merges, and ties decide: the new words rank.
c. A replay records nothing, so its bank stands still at the fork: it records as generation does, and the anchor's
   energy is 0.
d. A prompt switch encodes 12 frames in one pass in which every frame reads the last 9: block by block, as they were
   made (here too the bank, which may hold a frame of the block or a later one, is read whole).
e. Routed blocks read slots of a cache that rolls on, and no sink (`chr.slot_frames`): the frames of the plan, and the
   sink (`chr.branch_frames`).
In neither: under gradient checkpointing their merge runs again in backward, on a bank that is another by then.
Their scores are computed in bfloat16, these in float32. CM, KV, DS: wan/modules/causal_model.py, trainer/kvpo.py and
pipeline/diversity_sampling.py of the authors' MemFlow variant.
Symbols: b branches (1 where shared), n entries, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bank:
    """Entries of all layers, and the pending frame. `Bank()` is empty. Raises ValueError for sizes that cannot work."""

    size: int = 3  # frames that a layer keeps
    interval: int = 3  # blocks from one recorded frame to the next
    compat: str = ""  # "official": with the authors' faults, see above
    kv: Tensor | None = None  # [layers, 2, b, n, tokens, H, D]
    frames: Tensor | None = None  # [layers, b, n] frame of each entry
    pending: Tensor | None = None  # [layers, 2, b, tokens, H, D]
    pending_frame: int | None = None
    recorded: int = 0  # frames that were ever recorded
    wordless: bool = False  # official: the next merge finds text keys of zero (CM:1344-1349)

    def __post_init__(self):
        for name in ("size", "interval"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"Bank.{name} must be 1 or more, got {getattr(self, name)!r}; None is no bank")
        if self.compat not in ("", "official"):
            raise ValueError(f'compat must be "" or "official", got {self.compat!r}')

    def record(self, start: int, kv: Tensor, replaying: bool = False) -> Bank:
        """After the block at `start` was encoded as kv [layers, 2, B, F, tokens, H, D]: every `interval`-th block's
        first frame becomes pending (CM:1102-1135)."""
        if start // kv.shape[3] % self.interval or (replaying and self.compat):
            return self
        first = kv[:, :, :, 0].clone()  # a view would keep the whole block in memory
        return replace(self, pending=first, pending_frame=start, recorded=self.recorded + 1)

    def merge(self, text_keys: Callable[[], Tensor]) -> Bank:
        """Before a block: the pending frame, if there is one, enters the bank (CM:1138-1168). `text_keys()` -> mean key
        of the words in force in each layer [layers, B or 1, H, D]; asked for only where entries are ranked."""
        if self.pending is None:
            return self if not self.wordless else replace(self, wordless=False)
        if self.recorded > self.size and self.kv is not None:
            words = torch.zeros_like(self.kv[:, 0, :, 0, 0]) if self.wordless else text_keys()
            bank = self.put_last(self.kept(self.scores(words)))
        else:  # room is left; where the authors merge the same frame again, it replaces itself
            n = 0 if self.kv is None else min(self.kv.shape[3], self.recorded - 1)
            bank = self.put_last(torch.arange(n).expand(len(self.pending), 1, -1))
        once = {} if self.compat else {"pending": None, "pending_frame": None}
        return replace(bank, wordless=False, **once)

    def scores(self, text_keys: Tensor) -> Tensor:
        """How well each entry's keys fit the words (CM:1214-1228). text_keys [layers, B or 1, H, D] -> [layers, B, n];
        the mean over words and tokens is taken first, since the product is linear in both."""
        keys = self.kv[:, 0].mean(3, dtype=torch.float32)  # [layers, b, n, H, D]
        return (text_keys[:, :, None].to(keys) * keys).sum(-1).mean(-1) / keys.shape[-1] ** 0.5

    def kept(self, scores: Tensor) -> Tensor:
        """Slots [layers, B, size - 1] of the best entries, best first (CM:1209, 1232-1233). At a tie the first one
        counts; with compat it is whichever torch.topk returns, as there."""
        if self.compat:
            return scores.topk(self.size - 1).indices
        return scores.argsort(dim=-1, descending=True, stable=True)[..., : self.size - 1]

    def put_last(self, kept: Tensor) -> Bank:
        """The entries in the slots `kept` [layers, b or 1, k], in this order, then the pending frame."""
        layers, two, _, *entry = self.pending.shape
        k, held = kept.shape[2], 1 if self.kv is None else self.kv.shape[2]
        b = max(kept.shape[1], held, self.pending.shape[2])
        kv = self.pending.new_empty(layers, two, b, k + 1, *entry)  # filled in place: entries are large
        frames = torch.full((layers, b, k + 1), self.pending_frame, device=kv.device)
        for layer in range(layers if k else 0):
            for g in range(b):
                row, slots = g if held > 1 else 0, kept[layer, g if kept.shape[1] > 1 else 0]
                kv[layer, :, g, :k] = self.kv[layer, :, row, slots]
                frames[layer, g, :k] = self.frames[layer, row, slots]
        kv[:, :, :, k] = self.pending
        return replace(self, kv=kv, frames=frames)

    def at_switch(self, text_keys: Callable[[], Tensor]) -> Bank:
        """New words: the pending frame is merged before the recent past is encoded again (DS:237-255)."""
        if not self.compat:
            return self.merge(text_keys)
        return replace(replace(self, wordless=True).merge(text_keys), wordless=True)

    def last_window(self, history, stop: int, window) -> tuple[int, Tensor | None, Tensor]:
        """Official: what the one pass reads that encodes the frames before `stop` again (DS:193-255): every frame sees
        sink, bank and the last past + block frames. -> its first frame; kv of sink and bank; mask [1, F, past + F] of
        frames for `WanBackbone`, half a GiB at full size while the pass runs."""
        first = max(0, stop - window.attended)
        kv = history.read(torch.arange(min(window.sink, stop)), self.kv)
        n_past = min(window.sink, stop) + (0 if self.kv is None else self.kv.shape[3])
        mask = torch.ones(1, stop - first, n_past + stop - first, dtype=torch.bool)
        mask[:, :, n_past : n_past + max(window.sink, stop - window.past - window.block) - first] = False
        return first, kv, mask if kv is None else mask.to(kv.device)

    def encode_again(self, backbone, blocks: Sequence[Tensor], history, text: Tensor, window):
        """Official: the recent past under new words, in one pass. blocks [B, F, C, H, W] of the whole video -> history.
        The sink keeps its keys."""
        first, kv, mask = self.last_window(history, window.block * len(blocks), window)
        recent, b = blocks[first // window.block :], max(block.shape[0] for block in blocks)
        x0 = torch.cat([block.expand(b, *block.shape[1:]) for block in recent], 1)[:, first % window.block :]
        skip = max(0, window.sink - first)
        own = backbone.encode(x0, first, text, kv, mask)[:, :, :, skip:]
        return history.append(first + skip, own)

    def held(self) -> Tensor:
        """Frames [b, layers * n] that any layer holds, for pictures; entries may repeat."""
        if self.frames is None:
            return torch.empty(1, 0, dtype=torch.long)
        return self.frames.transpose(0, 1).flatten(1)


def sparse_activation(query: Tensor, key: Tensor, value: Tensor, chunk: int, top_k: int) -> tuple[Tensor, Tensor]:
    """MemFlow's "sparse memory activation" (CM:105-188): of the frames in sink and bank each head reads only `top_k`,
    those whose mean key fits the mean query best, in their order. Off in every config of theirs, so no rollout calls
    it. query [B, tokens, H, D]; key, value [B, frames * chunk, H, D] -> both [B, top_k * chunk, H, D]"""
    if key.shape != value.shape or key.shape[1] % chunk or not 0 < top_k <= key.shape[1] // chunk:
        raise ValueError(
            f"expected key and value [B, frames * {chunk}, H, D] of at least {top_k} frames, got {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    means = key.unflatten(1, (-1, chunk)).mean(2)  # [B, frames, H, D]
    scores = torch.einsum("bhd,bfhd->bhf", query.mean(1), means)
    frames = scores.topk(top_k).indices.sort().values  # [B, H, top_k]
    index = frames.transpose(1, 2)[:, :, None, :, None]  # [B, top_k, 1, H, 1]
    return tuple(torch.take_along_dim(x.unflatten(1, (-1, chunk)), index, 1).flatten(1, 2) for x in (key, value))
