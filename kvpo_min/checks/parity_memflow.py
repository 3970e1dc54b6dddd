"""Our numbers beside those recorded from the authors' MemFlow variant (`memflow_tiny.*`; parity.py is for LongLive's).

The recorded calls are made one by one in their order (`call_pairs`), and a second time by `rollout.generate`, `fork`
and `replay` from the recorded noise (`rollout_pairs`). Both use a bank with compat="official"; where text keys are zero
all scores are equal, and the slots are those that the record says were kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo_min.bank import Bank, sparse_activation
from kvpo_min.checks.recorded import Pairs, new_backbone, window_of
from kvpo_min.chr import Plan, Window, ordinary_frames, slot_frames, slot_pool
from kvpo_min.rollout import KVHistory, Rollout, Sampler, Stream, fork, generate, replay
from kvpo_min.tve import step_energies, trajectory_energy
from kvpo_min.wan import WanBackbone
from kvpo_min.wan.checkpoints import wan_from_original

TAU = 2.0  # the authors' score is -energy / 2


@dataclass(frozen=True)
class Recorded(Bank):
    """A bank whose ties are decided as recorded: on a GPU torch.topk may choose others."""

    ties: Tensor | None = None  # [layers, 1, size - 1]

    def kept(self, scores: Tensor) -> Tensor:
        return self.ties if self.ties is not None and not scores.any() else super().kept(scores)


def settings(info: dict) -> tuple[Window, int, Recorded]:
    """-> window, nearest and the empty bank of a recording"""
    c = info["config"]
    sizes = c["local_attn_size"], c["sink_size"], info["m_nearest_frames"], info["num_frame_per_block"]
    ranked = [call["retrieval"] for call in info["calls"] if call.get("retrieval")]
    wordless = [one for one in ranked if all(layer["text_key_is_zero"] for layer in one)]
    ties = torch.tensor([[layer["kept_slots"]] for layer in wordless[0]]) if wordless else None
    window, nearest = window_of(*sizes, info["kv_capacity_frames"])
    return window, nearest, Recorded(c["bank_size"], c["record_interval"], "official", ties=ties)


@torch.no_grad()
def call_pairs(backbone: WanBackbone, info: dict, tensors: dict[str, Tensor]) -> tuple[Pairs, Pairs, Pairs]:
    """All recorded calls in their order. -> frames that the bank holds and attention reads, scores, velocities"""
    window, _, bank = settings(info)
    history = KVHistory()
    phase = "prefix"
    at_fork = None
    frames_held, scores, velocities = {}, {}, {}
    slots = torch.tensor([info["routed_slots"]])
    for call in info["calls"]:
        if call["phase"] != phase:  # branch and replay both begin with the keys and the bank of the fork
            phase, at_fork = call["phase"], at_fork or (history, bank)
            history, bank = at_fork
        start = call["start_frame"]
        x = tensors[call["input"]]
        text = tensors[f"text_embeds_{call['text']}"]
        stop, where = start + x.shape[1], call["output"]
        before = bank
        if call["kind"] == "recache":
            bank = bank.at_switch(lambda text=text: backbone.text_keys(text))
            first, kv, mask = bank.last_window(history, stop, window)
            near = max(window.sink, stop - window.past - window.block)
            reads, own = [*range(window.sink)], [*range(near, stop)]
        else:
            if call["merges_bank"]:
                bank = bank.merge(lambda text=text: backbone.text_keys(text))
            frames = slot_frames(slots, start, window)[0] if call["routed"] else ordinary_frames(start, window)
            kv = history.read(frames, bank.kv)
            mask = None
            first = start
            reads, own = frames.tolist(), [*range(start, stop)]
        for one in call.get("retrieval", ()):
            words = backbone.text_keys(text) * (not one["text_key_is_zero"])
            scores[f"scores of the entries/{where} {one['layer']}"] = (
                before.scores(words)[one["layer"], 0], torch.tensor(one["scores"])
            )  # fmt: skip
        held = [[]] * len(call["bank"]) if bank.frames is None else bank.frames[:, 0].tolist()
        full = [row + [-1] * (bank.size - len(row)) for row in held]  # -1: an empty slot
        theirs = [[-1 if frame is None else frame for frame in row] for row in call["bank"]]
        frames_held[f"frames in the bank/{where}"] = full, theirs
        read = [sorted([*reads, *row, *own]) for row in held]
        frames_held[f"frames read/{where}"] = read, [sorted(row) for row in call["frames_read"]]
        kind = "velocities of the replay" if phase == "replay" else "velocities of routed blocks"
        if phase != "replay" and not call["routed"]:
            kind = "velocities with a full bank" if bank.recorded > bank.size else "velocities while the bank fills"
        if call["kind"] == "recache":
            kind = "velocities of the pass at the switch"
        sigma = torch.tensor([call["timestep"] / 1000])
        v = backbone(x, sigma, torch.arange(first, stop), text, kv, mask)
        velocities[f"{kind}/{where}"] = v, tensors[where]
        if call["writes_cache"]:
            own = backbone.encode(x, first, text, kv, mask)
            if call["kind"] == "context":
                bank = bank.record(start, own, replaying=phase == "replay")
            skip = max(0, window.sink - first) if call["kind"] == "recache" else 0  # the sink keeps its keys
            history = history.append(first + skip, own[:, :, :, skip:])
            history = history.keep(window.sink, window.history - window.sink)
    return frames_held, scores, velocities


def recorded_noise(info: dict, tensors: dict[str, Tensor], sigmas: Tensor) -> Tensor:
    """The noise [1, blocks, S, F, C, H, W] of which the recorded inputs were made."""
    out = []
    for b in range(info["total_frames"] // info["num_frame_per_block"]):
        z = [tensors[f"in_{b}_{s}"] for s in range(len(sigmas))]
        x0 = [x - sigma * tensors[f"out_{b}_{s}"] for s, (x, sigma) in enumerate(zip(z, sigmas, strict=True))]
        eps = [(z[s] - (1 - sigmas[s]) * x0[s - 1]) / sigmas[s] for s in range(1, len(z))]
        out.append(torch.stack([z[0], *eps], 1))
    return torch.stack(out, 1)


def rollout_of(backbone: WanBackbone, info: dict, tensors: dict[str, Tensor], bank: Bank | None) -> tuple:
    """Prefix, one routed branch and the anchor from the recorded noise.
    -> rollout, sampler, and z and x0 of the prefix, {start: ([1, S, F, C, H, W], same)}"""
    window, nearest, _ = settings(info)
    sampler = Sampler(torch.tensor(info["denoising_timesteps"]) / 1000, window, switches=(info["switch_frame"],))
    noise = recorded_noise(info, tensors, sampler.sigmas)
    start = info["fork_frame"]
    total = info["total_frames"]
    texts, made = [tensors["text_embeds_0"], tensors["text_embeds_1"]], {}

    def record(block: int, z: Tensor, x0: Tensor) -> None:
        made[block] = z, x0

    prefix = generate(backbone, Stream(bank=bank), texts, noise, start, sampler, record=record)
    routes = torch.tensor([info["routed_slots"]])
    plan = Plan(start, slot_pool(start, window, nearest), routes, len(info["routed_blocks"]), slots=True)
    rollout = fork(backbone, texts, noise, plan, total, total, sampler, nearest, prefix=prefix)
    return rollout, sampler, made


def log_score(backbone: WanBackbone, rollout: Rollout, sampler: Sampler, grad_steps: int) -> tuple[Tensor, Tensor]:
    """-> the authors' score () of the branch, at their sigma floor of 1, and the velocities [1, B, S, ...] behind it"""
    v = replay(backbone, rollout, sampler, grad_steps, context="own", branches=1)
    energies = step_energies(v, rollout.trajectory[:1].velocity)
    return -trajectory_energy(energies, sampler.sigmas.square())[0] / TAU, v


def rollout_pairs(config: dict, weights: dict, info: dict, tensors: dict[str, Tensor]) -> tuple[Pairs, Pairs]:
    """The same through `generate`, `fork` and `replay`. -> velocities; score of the branch and its gradients"""
    backbone = new_backbone(config, weights).requires_grad_(True)
    rollout, sampler, made = rollout_of(backbone, info, tensors, settings(info)[2])
    pairs = {}
    scored = {}
    block = info["num_frame_per_block"]
    start = info["fork_frame"]
    for first, (z, x0) in made.items():
        for s, sigma in enumerate(sampler.sigmas):
            name = f"{first // block}_{s}"
            pairs[f"velocities of `generate`/{name}"] = (z[:, s] - x0[:, s]) / sigma, tensors[f"out_{name}"]
    score, v = log_score(backbone, rollout, sampler, info["replay"]["grad_steps"])
    branch = rollout.trajectory.velocity[:1]  # [1, B, S, F, C, H, W]
    for b in range(v.shape[1]):
        for s in range(v.shape[2]):
            name = f"{start // block + b}_{s}"
            pairs[f"velocities of `fork`/{name}"] = branch[:, b, s], tensors[f"out_{name}"]
            pairs[f"velocities of `replay`/{name}"] = v[:, b, s], tensors[f"replay_out_{name}"]
    scored["score of the branch"] = score, info["replay"]["log_score"]
    parameters = dict(backbone.transformer.named_parameters())
    for key in sorted(key for key in tensors if key.startswith("replay_grad/")):
        ((name, gradient),) = wan_from_original({key.removeprefix("replay_grad/"): tensors[key]}).items()
        (ours,) = torch.autograd.grad(score, parameters[name], retain_graph=True)
        scored[f"gradient of {key.removeprefix('replay_grad/')}"] = ours, gradient
    return pairs, scored


def sparse_pairs(info: dict, tensors: dict[str, Tensor]) -> Pairs:
    """`bank.sparse_activation` on the recorded queries, keys and values."""
    sizes = info["sparse_activation"]["chunk_size"], info["sparse_activation"]["top_k"]
    key, value = sparse_activation(*(tensors[f"sma_{name}"] for name in ("query", "key", "value")), *sizes)
    return {
        "keys of the sparse activation": (key, tensors["sma_key_out"]),
        "values of the sparse activation": (value, tensors["sma_value_out"]),
    }
