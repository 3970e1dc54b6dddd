"""Our numbers beside those recorded from the authors' implementation (tests/golden/README.md says what was recorded).

Every function below feeds recorded inputs to the functions that training runs (`chr`, `tve`, `grpo`, `rollout`, `wan`)
and returns pairs {name: (ours, theirs)}; `parity` takes the largest difference of each kind. All sizes come from the
files, so a folder of the same layout with other shapes, seeds and capacities is read in the same way. The MemFlow
variant is in parity_memflow.py.

Where the recordings follow other conventions than this project, each in one place:
1. Counting: their window and their m count the block being denoised, ours count past frames (`recorded.py::window_of`).
2. Look-up: once their cache has rolled, routed frames are read up to one block late (`frames_read`).
3. sigma: the weights of the scores use the level at int(timestep) (`sigma_at_int_timestep`).
4. Replay: between blocks the replaying policy's own prediction is encoded (`replay(context="own")`).
5. Key names: the original Wan names go through diffusers' own converter (`wan/checkpoints.py`).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import torch
from torch import Generator, Tensor

from kvpo_min.checks import parity_memflow as memflow
from kvpo_min.checks.recorded import Pairs, new_backbone, planned_routes, window_of
from kvpo_min.chr import (
    Plan,
    Window,
    branch_frames,
    chunk_starts,
    dispersed_routes,
    eligible_forks,
    ordinary_frames,
    plan_official,
    pool,
)
from kvpo_min.config import TrainConfig, knob
from kvpo_min.grpo import anchor_advantages, fuse, kvpo_loss, safety_scale
from kvpo_min.kvpo import replay_energies, send_back
from kvpo_min.rollout import KVHistory, Sampler, fork
from kvpo_min.tve import energy_weights, gibbs_log_prob, schedule, trajectory_energy
from kvpo_min.wan import WanBackbone
from kvpo_min.wan.checkpoints import wan_from_original

FILES = (
    "schedule.json", "chr_plans.json", "grpo_objective.json", "causal_wan_tiny.json", "causal_wan_tiny.safetensors",
    "causal_wan_tiny_io.safetensors", "kvpo_update_tiny.json", "kvpo_update_tiny.safetensors",
    "wan_1_3b_state_dict_shapes.json",
)  # fmt: skip
MEMFLOW = ("memflow_tiny.json", "memflow_tiny.safetensors", "memflow_tiny_io.safetensors")  # of parity_memflow.py
TAU = 2.0  # the authors' score is -energy / 2


@dataclass(frozen=True)
class ParityOptions:
    """Compares this code with the authors'"""

    golden: str = knob("tests/golden", "folder of recorded numbers; its README.md says what they are")


@dataclass(frozen=True)
class Row:
    """One line of the table. `difference` is absolute, relative to the row's largest recorded number, or a count."""

    file: str
    compared: str
    measure: str  # absolute, relative, count
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN


# ------------------------------------------------------------------------------------------------------------ the table


def parity(folder: str | Path) -> list[Row]:
    """Compares with every file of a folder of recordings. Those of MemFlow may be absent, all three together. Raises
    FileNotFoundError and ValueError naming what is missing or cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: expected recordings as in tests/golden")
    recorded_too = MEMFLOW if any((folder / name).is_file() for name in MEMFLOW) else ()
    if missing := [name for name in (*FILES, *recorded_too) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: tests/golden/README.md lists the files")
    try:
        recorded = {name: read(folder / name) for name in FILES}
        objective = [objective_pairs(case) for case in recorded["grpo_objective.json"]]
        update = recorded["kvpo_update_tiny.json"], recorded["kvpo_update_tiny.safetensors"]
        config, weights = recorded["causal_wan_tiny.json"]["config"], recorded["causal_wan_tiny.safetensors"]
        calls = recorded["causal_wan_tiny.json"], recorded["causal_wan_tiny_io.safetensors"]
        shift = recorded["schedule.json"]["shift"]
        return [
            *rows("schedule.json", [schedule_pairs(recorded["schedule.json"])], "absolute", 1e-6),
            *rows("chr_plans.json", [plan_pairs(case) for case in recorded["chr_plans.json"]], "count", 0),
            *rows("grpo_objective.json", objective, "relative", 1e-5),
            *rows("causal_wan_tiny", [call_pairs(new_backbone(config, weights), *calls)], "absolute", 1e-4),
            *rows("kvpo_update_tiny", [route_pairs(update[0])], "count", 0),
            *rows("kvpo_update_tiny", [update_pairs(config, weights, *update, shift)], "relative", 1e-4),
            *rows("wan_1_3b_state_dict_shapes.json", [key_pairs(recorded[FILES[-1]])], "count", 0),
            *(memflow_rows(*(read(folder / name) for name in recorded_too)) if recorded_too else ()),
        ]
    except KeyError as error:
        raise ValueError(f"{folder} has another layout than tests/golden: {error.args[0]!r} is not there") from error


def memflow_rows(info: dict, weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[Row]:
    """The comparisons with the authors' MemFlow variant (parity_memflow.py)."""
    held, scores, velocities = memflow.call_pairs(new_backbone(info["config"], weights), info, tensors)
    made, replayed = memflow.rollout_pairs(info["config"], weights, info, tensors)
    return [
        *rows("memflow_tiny", [plan_pairs(case, slots=True) for case in info["plans"]], "count", 0),
        *rows("memflow_tiny", [held], "count", 0),
        *rows("memflow_tiny", [scores], "absolute", 1e-5),
        *rows("memflow_tiny", [velocities, made], "absolute", 1e-4),
        *rows("memflow_tiny", [replayed, memflow.sparse_pairs(info, tensors)], "relative", 1e-4),
    ]


def rows(file: str, cases: list[Pairs], measure: str, tolerance: float) -> list[Row]:
    """One row for each name before the "/", over all cases."""
    groups: dict[str, list[tuple]] = {}
    for name, pair in chain.from_iterable(pairs.items() for pairs in cases):
        groups.setdefault(name.split("/")[0], []).append(pair)
    return [
        Row(file, name + (f" ({len(pairs)})" if len(pairs) > 1 else ""), measure, difference(pairs, measure), tolerance)
        for name, pairs in groups.items()
    ]


def difference(pairs: list[tuple], measure: str) -> float:
    """Largest difference of any two numbers, or how many differ ("count"). Infinite where shapes do not agree."""
    gaps, sizes = [], []
    for ours, theirs in ((torch.as_tensor(x).detach().double() for x in pair) for pair in pairs):
        if ours.shape != theirs.shape:
            return math.inf
        gaps.append((ours - theirs).abs().flatten())
        sizes.append(theirs.abs().flatten())
    gap, size = torch.cat(gaps), torch.cat(sizes).max().item()
    if measure == "count":
        return float((gap != 0).sum())
    return gap.max().item() / (size if measure == "relative" and size > 0 else 1.0)


def table(found: list[Row]) -> str:
    """Markdown, columns aligned."""
    cells = [("file", "compared", "largest difference", "tolerance", "ok")]
    for row in found:
        exact = row.measure == "count"
        gap = f"{row.difference:.0f} differ" if exact else f"{row.difference:.1e} {row.measure}"
        cells.append((row.file, row.compared, gap, "0" if exact else f"{row.tolerance:.0e}", "yes" if row.ok else "NO"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def read(path: Path) -> dict | list:
    """A JSON file, or the tensors of a safetensors file by name. Raises ValueError naming a file that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


# ------------------------------------------------------------------------------------ schedule, plans and the objective


def schedule_pairs(recorded: dict) -> Pairs:
    sigma = schedule(len(recorded["denoising_step_list"]), recorded["shift"])
    return {
        "sigma": (sigma, recorded["sigmas"]),
        "timestep in thousands": (sigma, torch.tensor(recorded["warped_timesteps"]) / 1000),
        "sigma at int(timestep)": (sigma_at_int_timestep(sigma, recorded["shift"]), recorded["sigmas_after_int_cast"]),
    }


def sigma_at_int_timestep(sigma: Tensor, shift: float) -> Tensor:
    """Level [S] that the authors find for a step (trainer/kvpo.py:2327): the timestep is cut to an integer, then the
    nearest of 1000 shifted levels is taken. .9375 becomes .9369."""
    grid = schedule(1000, shift)
    return grid[(1000 * grid - (1000 * sigma).int()[:, None]).abs().argmin(1)]


def plan_pairs(case: dict, slots: bool = False) -> Pairs:
    """One CHR plan with its seeds (DS:39-183); `slots`: of the MemFlow variant."""
    c, theirs = case["config"], case["plan"]
    window, nearest = window_of(c["local"], c["sink"], c["m"], c["fpb"], c["local"] + c["slice"])
    layout = dict(first_chunks=c["within"], first=c["chunk"], rest=c["minnew"], slots=slots)
    forks = eligible_forks(c["total"], window, nearest, c["P"], **layout, gap=window.block)
    seeds = case["base_seed"], case["sample_idx"], case["seed_context"]
    plan = plan_official(*seeds, c["total"], window, nearest, c["P"], c["K"], **layout)
    starts = chunk_starts(c["total"], c["chunk"], c["minnew"])
    routed_end = plan.fork + window.block * plan.perturb_num_blocks
    pairs = {
        "chunks": (starts, [chunk["start_frame"] for chunk in theirs["chunks"]]),
        "eligible forks": (len(forks), theirs["eligible_blocks_count"]),
        "fork": (plan.fork, theirs["perturb_block_abs_frame"]),
        "end of the routed blocks": (routed_end, theirs["perturb_block_end_frame"]),
    }
    if slots:
        pairs["slots that can be drawn"] = len(plan.pool), theirs["num_older_available"]
    else:
        theirs_pool = [theirs["stable_older_frame_start"], theirs["stable_older_frame_end"]]
        pairs["pool"] = [plan.pool.start, plan.pool.stop], theirs_pool
    return pairs | {f"{'slots' if slots else 'routes'} of the branches": (plan.routes, planned_routes(theirs))}


def objective_pairs(case: dict) -> Pairs:
    """Rewards -> advantages -> fusion -> loss and its gradient, under both safety rules."""
    pairs, signals = {}, {}
    for name in ("local", "global"):
        rewards = {k: torch.tensor(v) for k, v in case[f"{name}_rewards"].items()}
        signals[name] = anchor_advantages(rewards, case[f"{name}_anchor"], case["weights"])
        pairs[f"advantages/{name}"] = signals[name], case[f"adv_{name}"]
    weights = case["fusion_local_weight"], case["fusion_global_weight"]
    A = fuse(signals["local"], signals["global"], *weights, case["fusion_mode"], case["adv_clip"])
    pairs["fused and clamped advantages"] = A, case["adv_fused"]

    log_p_old, log_p_init = (gibbs_log_prob(-torch.tensor(case[f"log_score_{who}"]), 1.0) for who in ("old", "init"))
    for rule, unsafe in (("mechanism_1", 0.0), ("mechanism_2", 0.5)):
        theirs, scale = case[rule], safety_scale(case["safe"], unsafe)
        log_score = torch.tensor(case["log_score_theta"], requires_grad=True)
        log_p = gibbs_log_prob(-log_score, 1.0)
        loss = kvpo_loss(log_p, log_p_old, log_p_init, A, case["clip_low"], case["clip_high"], case["kl_coef"], scale)
        loss.total.backward()
        pairs[f"ratio/{rule}"] = loss.ratio, theirs["ratio"]
        # Theirs reports 0 for an update that is skipped.
        pairs[f"clipped share/{rule}"] = loss.clip_fraction if scale else 0.0, theirs["clip_fraction"]
        pairs[f"loss/{rule}"] = loss.total, theirs["total_loss"]
        if theirs["loss_scale"] is not None:
            pairs[f"factor of the safety rule/{rule}"] = scale, theirs["loss_scale"]
        if theirs["entropy"] is not None:  # theirs is that of pi * scale, which does not sum to 1 when unsafe
            pairs[f"entropy/{rule}"] = scale * (loss.entropy - math.log(scale)), theirs["entropy"]
        # Theirs has no gradient where the update is skipped; then ours must be 0.
        gradient = theirs["grad_log_score"] or [0.0] * len(log_score)
        pairs[f"gradient of the log scores/{rule}"] = log_score.grad, gradient
    return pairs


# -------------------------------------------------------------------------------------------------- the tiny causal Wan


@torch.no_grad()
def call_pairs(backbone: WanBackbone, info: dict, tensors: dict[str, Tensor]) -> Pairs:
    """Velocities of all recorded calls, in their order; the calls at timestep 0 write the history.

    `info["routed_frames"]` are the frames that were really read. Theirs takes them out of the cache at the first
    routed block and keeps them, so they stay readable here too when the history drops them.
    """
    block, capacity = tensors[info["calls"][0]["input"]].shape[1], info["kv_capacity_frames"]
    config = info["config"]
    window, nearest = window_of(
        config["local_attn_size"], config["sink_size"], info["m_nearest_frames"], block, capacity
    )
    text, routes = tensors["text_embeds"], torch.tensor([info["routed_frames"]])
    history = KVHistory()
    taken = {}
    pairs = {}
    for call in info["calls"]:
        start, x = call["start_frame"], tensors[call["input"]]
        if call["routed"]:
            taken = taken or {f: history.frames[f] for f in info["routed_frames"]}
            kv = KVHistory(history.frames | taken).read(branch_frames(routes, start, window, nearest)[0])
            kind = "velocities of routed blocks"
        else:
            kv = history.read(ordinary_frames(start, window))
            rolled = start + block > capacity
            kind = "velocities after the history has rolled" if rolled else "velocities while the history fills"
        sigma = torch.tensor([call["timestep"] / 1000])
        pairs[f"{kind}/{call['output']}"] = backbone.velocity(x, sigma, start, text, kv), tensors[call["output"]]
        if call["timestep"] == 0:
            history = history.append(start, backbone.encode(x, start, text, kv))
            history = history.keep(window.sink, capacity - window.sink)
    return pairs


def key_pairs(shapes: dict[str, list[int]]) -> Pairs:
    """Keys and shapes of the released 1.3B generator against the stock model, on the meta device."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
        converted = wan_from_original({key: torch.empty(shape) for key, shape in shapes.items()})
    wanted, given = ({key: tuple(x.shape) for key, x in weights.items()} for weights in (model.state_dict(), converted))
    return {
        f"keys of the {len(shapes)} that are left over": (len(shapes) - len(given.items() & wanted.items()), 0),
        f"keys of the {len(wanted)} that are missing": (len(wanted.items() - given.items()), 0),
    }


# ------------------------------------------------------------------------------------------------- a whole KVPO update


def frames_read(planned: Tensor, start: int, window: Window) -> Tensor:
    """Frames [G, n] that the authors' code reads for the planned ones when the first routed block is at `start`.

    Their look-up (wan/modules/causal_model.py:150-156) takes the number of frames that are resident with the block
    itself, but the place where they begin without it. Nothing happens until the cache is full; then every frame is
    read up to one block late.
    """
    end = start + window.block
    resident = min(window.history, end) - window.sink  # without the sink, with the block itself
    return planned + (end - resident) - max(window.sink, start - resident)


def update_window(info: dict) -> tuple[Window, int]:
    plan = info["plan"]
    block = (plan["perturb_block_end_frame"] - plan["perturb_block_abs_frame"]) // plan["perturb_num_blocks"]
    sizes = info["local_attn_size"], info["sink_size"], info["m_nearest_frames"]
    return window_of(*sizes, block, info["kv_capacity_frames"])


def route_pairs(info: dict) -> Pairs:
    """The plan of the update. Its fork was given, so only pool and routes are drawn."""
    theirs, (window, nearest) = info["plan"], update_window(info)
    frames = pool(info["fork_frame"], window, nearest, info["routed_blocks"], gap=window.block)
    seed = theirs["base_seed"] + 97 * theirs["sample_idx"] + theirs["seed_context"] + 1
    routes = dispersed_routes(frames, window.past - nearest, info["num_branches"], Generator().manual_seed(seed))
    return {
        "pool": (
            [frames.start, frames.stop],
            [theirs["stable_older_frame_start"], theirs["stable_older_frame_end"]],
        ),
        "planned routes": (routes, planned_routes(theirs)),
    }


def update_rollout(backbone: WanBackbone, info: dict, tensors: dict[str, Tensor], shift: float):
    """Prefix, routed branches and anchor from the recorded noise. -> rollout, sampler"""
    window, nearest = update_window(info)
    start, routed = info["fork_frame"], info["routed_blocks"]
    routes, planned = torch.tensor(info["branch_frames"]), planned_routes(info["plan"])
    if routes.equal(planned):  # only the plan was recorded: what was read follows from it
        routes = frames_read(planned, start, window)
    renoise = torch.cat([tensors["prefix_renoise"], tensors["fork_renoise"]])  # [blocks, S - 1, F, C, H, W]
    initial = tensors["initial_noise"].unflatten(1, (-1, window.block))[:, : len(renoise), None]
    noise = torch.cat([initial, renoise[None]], 2)  # [1, blocks, S, F, C, H, W]
    sampler = Sampler(schedule(noise.shape[2], shift), window)
    stop = start + (routed + info["tail_blocks"]) * window.block
    plan = Plan(start, range(int(routes.min()), int(routes.max()) + 1), routes, routed)
    return fork(backbone, [tensors["text_embeds"]], noise, plan, stop, stop, sampler, nearest), sampler


def changed(weights: dict[str, Tensor], rule: str) -> dict[str, Tensor]:
    """Weights under a recorded rule such as "every '*.ffn.2.weight' x 1.02"."""
    factors = re.findall(r"'([^']+)' x (\d+(?:\.\d+)?)", rule)
    hits = {pattern: [key for key in weights if fnmatch(key, pattern)] for pattern, _ in factors}
    if not factors or not all(hits.values()):
        raise ValueError(f"theta_rule must name weights and factors like \"'*.ffn.2.weight' x 1.02\", got {rule!r}")
    out = dict(weights)
    for pattern, factor in factors:
        for key in hits[pattern]:
            out[key] = out[key] * float(factor)
    return out


def update_pairs(config: dict, weights: dict, info: dict, tensors: dict[str, Tensor], shift: float) -> Pairs:
    """One update from noise to gradients. The old and the initial policy have the weights that made the rollout. As
    these are whole weights and no adapters, each policy is a backbone of its own; loss and gradient are
    `kvpo.send_back`'s, which reads nothing of a pipeline but its noise levels, and the sampler has them."""
    backbone = new_backbone(config, weights)
    rollout, sampler = update_rollout(backbone, info, tensors, shift)
    n, start = info["num_branches"], info["fork_frame"]
    pairs = {
        "prefix": (rollout.videos[:1, :start], tensors["prefix"]),
        "videos of the branches": (rollout.videos[:n, start:], tensors["branch_videos"]),
        "video of the anchor": (rollout.videos[n:, start:], tensors["anchor_video"]),
        "noisy inputs": (rollout.trajectory.z[:n], torch.stack([tensors[f"x_t_{g}"] for g in range(n)])),
        "clean predictions": (rollout.trajectory.x0[:n], torch.stack([tensors[f"x0_{g}"] for g in range(n)])),
    }
    with torch.no_grad():
        original = replay_energies(backbone, rollout, sampler, context="own")  # [G, B, S]
    backbone = new_backbone(config, changed(weights, info["theta_rule"])).requires_grad_(True)
    low, high = info["clip"]
    options = TrainConfig(clip_range_low=low, clip_range_high=high, kl_coef=info["kl_coef"])
    level = sigma_at_int_timestep(sampler.sigmas, shift)
    for name, theirs in info["expected"].items():
        floor = name.removeprefix("sigma_floor_")
        step_weights = energy_weights(level, float(floor)) * (sampler.sigmas / level).square()
        trained = replay_energies(backbone, rollout, sampler, info["grad_steps"], context="own")
        energies = {
            "default": trained * step_weights,
            "old": original * step_weights,
            "initial": original * step_weights,
        }
        told = zip(("changed", "old", "initial"), ("theta", "old", "init"), energies.values(), strict=True)
        for who, key, each in told:
            scores = -trajectory_energy(each) / TAU  # [G]
            pairs[f"log scores, {who} policy/{floor}"] = scores, theirs[f"log_score_{key}"]
        backbone.zero_grad()
        _, loss = send_back(sampler, options, rollout, energies, torch.tensor(theirs["advantages"]), 1.0, TAU)
        pairs[f"ratio/{floor}"] = loss.ratio, theirs["ratio"]
        pairs[f"loss/{floor}"] = loss.total, theirs["loss"]
        pairs |= gradient_pairs(backbone, theirs, floor, tensors)
    return pairs


def gradient_pairs(backbone: WanBackbone, theirs: dict, floor: str, tensors: dict[str, Tensor]) -> Pairs:
    """Gradients of the recorded tensors, and their norms. The converter names ours: it also takes gradients."""
    prefix, pairs = f"grad_floor{floor}/", {}
    parameters = dict(backbone.transformer.named_parameters())
    for key in (key.removeprefix(prefix) for key in tensors if key.startswith(prefix)):
        ((name, gradient),) = wan_from_original({key: tensors[prefix + key]}).items()
        ours = parameters[name].grad
        pairs[f"gradient of {key}/{floor}"] = ours, gradient
        pairs[f"norm of the gradient of {key}/{floor}"] = ours.norm(), theirs["grad_norms"][key]
    return pairs
