"""The arena (`kvpo-min arena`): KVPO, Astrolabe and what a user would pick instead, on one model, at equal cost.

Cost is counted in forward passes of the generator: one block of one video at one noise level, or its encoding. A hook
on the backbone counts them while a method trains, and counts apart those that a gradient came back through. A run goes
on until its budget is spent, so it may exceed it by less than one update; where the rate falls, it makes as many
updates as come nearest to the budget. Evaluation is not part of it. What a method
computes and does not use counts: the anchor's row, the last step of a Gaussian replay, groups that train nothing.

The modes "settles" and "wanders" are two regimes of one world. Films end with the block in which the event is decided,
by memory or by noise, every group forks there, and all is trained with the settings of `kvpo-min demo`
(pocket/recipe.py): several groups an update, several steps on each, a rate that falls to 0, and preservation of the
prefix (--set prefix_coef=0: none, as in the papers). "short" and "long" are the modes of `kvpo-min train`.

The same for every method: base checkpoint, the 256 training scripts of a seed, reward, G, LoRA, AdamW, group k of a
seed with its script, fork and noise, the preservation, and the evaluation prompts, each with a noise of its own. What
holds the prefix has one weight, so a method's loss is scaled until its first gradient is as large as KVPO's (Adam sees
no other difference). Not the same:
- "kvpo" is kvpo.py, with anchor, safety rule, KL and, where films go on after the fork's chunk, the global reward.
- "astrolabe" is `astrolabe.train`, at a constant rate: its active window stands for the fork, its weight decay is its
  paper's 1e-4, and nothing preserves the prefix. "fresh+nft" is its bare objective in the common loop.
- an update's further steps: "kvpo" takes the policy as it is now for the old one, so that its ratio is 1; the others
  keep that of the rollouts, so that their clips act.
- all others and the cells of the grid ("exploration+policy") are a `baselines.Method`. "routing+energy" is KVPO without
  anchor, safety rule and KL, "routing+distance" the same with a latent distance.
- "best_of_n" (whole video) and "best_of_n_chunks" train nothing; what they cost is `passes_per_video`.

Learning rates are swept on `sweep_seed` and on evaluation prompts that no result is measured on; the best reward there
chooses the rate of the other seeds. One row of the CSV is one (run, budget); it is on the disk before the next one is
begun, and what is in the file is not computed again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from kvpo_min import kvpo
from kvpo_min.chr import Window, chunk_starts
from kvpo_min.compare import astrolabe
from kvpo_min.compare.baselines import EXPLORATIONS, METHODS, POLICIES, REFUSED, Method, best_of_n, check_cell
from kvpo_min.config import SEEDS, TrainConfig, check_bounds, check_weights, knob, nearest_known, settle
from kvpo_min.pipeline import Pipeline, observe, pooled, sample, score
from kvpo_min.pocket import recipe
from kvpo_min.pocket.prompts import EVAL_SEED, check_geometry, dealt
from kvpo_min.pocket.world import DAYLIGHT, SWITCHES, liked_scenes, prompt_set
from kvpo_min.policies import add_policies, base_hash
from kvpo_min.rewards import Mixture
from kvpo_min.rollout import draw_noise
from kvpo_min.system import say
from kvpo_min.train import train

MODES = {"settles": (30, 1), "wanders": (27, 1), "short": (39, 1), "long": (147, 4)}  # frames, prompts a script
REGIMES = {  # words that the scripts hold, taste, and where every group forks
    "settles": (recipe.EVENT, ",".join(DAYLIGHT), 27),
    "wanders": ("from the,wanders", "left", 24),
}
TRAINED = ("kvpo", "astrolabe", "flow_grpo", "dance_grpo", "cm_grpo", "neighbor_grpo", "ar_copo", "diffusion_nft",
           "rwr")  # fmt: skip
UNTRAINED = ("best_of_n", "best_of_n_chunks")
GRID = [f"{e}+{p}" for e in EXPLORATIONS for p in POLICIES]
SCRIPTS = 256  # training scripts of a seed
NOISE = 99_999  # seed of the evaluation noise
AGAIN = 16  # evaluation prompts that get a second video from other noise, for the diversity

# fields of the configurations that --set may not give: the arena does, or has no use for them
GIVEN = ("seed", "learning_rate", "num_frames", "num_segments", "max_train_steps", "output_dir", "checkpointing_steps",
         "checkpoints_total_limit", "resume_from_checkpoint", "ema_decay")  # fmt: skip
LOOP = ("num_generations", "perturb_num_blocks", "nearest", "max_grad_norm", "adam_weight_decay", "rank", "lora_alpha",
        "groups_per_update", "in_order", "num_iterations", "old_policy_every", "fork", "prefix_coef", "grad_steps",
        "adv_eps", "lr_scheduler", "lr_warmup_steps", "branch_batch")  # fmt: skip

HERE = ("model", "mode", "event", "like", "weights", "set", "eval_prompts")  # what all runs of one call share
KEY = ("method", *HERE, "purpose", "learning_rate", "seed", "asked", "budget")  # a row is known by these
PAIRED = ("vq", "mq", "ta", "reward", "judge_all")  # sem: standard error over prompts of after - before
PLAIN = ("judge_valid", "judge_colour", "judge_shape", "judge_motion", "judge_scene", "judge_journey",
         "judge_remembered", "judge_coherent", "judge_liked", "judge_liked_anew", "judge_distance", "sharpness",
         "motion_energy", "diversity")  # fmt: skip
COLUMNS = (*KEY, "forwards", "backwards", "updates", "seconds", "passes_per_video",
           *(f"{name}_{when}" for name in PAIRED for when in ("before", "after", "sem")),
           *(f"{name}_{when}" for name in PLAIN for when in ("before", "after")), "note", "settings")  # fmt: skip


@dataclass(frozen=True)
class ArenaOptions:
    """Compares methods on one model, at equal cost"""

    csv: str = knob("", "file that every measurement is appended to; what is in it is not computed again")
    methods: str = knob("main", "names with commas between: kvpo, rwr, routing+distance, ...; or main, grid")
    seeds: str = knob("0,1,2", 'that are reported; "": sweep the learning rates and stop')
    learning_rates: str = knob("3e-3,1e-2,3e-2", "swept on sweep_seed; a single one is taken as it is")
    sweep_seed: int = knob(100, "on which each method's learning rate is chosen; never reported", **SEEDS)
    forwards: int = knob(25000, "budget of a run: forward passes of the generator")
    evaluations: int = knob(5, "of a run, evenly spaced, the last when the budget is spent", least=1)
    mode: str = knob("settles", "settles: memory decides; wanders: noise does; short; long", of=tuple(MODES))
    event: str = knob("", 'words that every script must hold; "": those of the mode, in short and long "settles"')
    eval_prompts: int = knob(128, "held-out scripts; with 64 their noise is worth as much as a gain", least=2)
    set: str = knob("", "other settings of the methods, for ablations: name=value with commas between")
    vq: float = knob(3.0, "weight of visual quality in the reward")
    mq: float = knob(0.1, "weight of motion quality")
    ta: float = knob(3.0, "weight of text alignment")
    like: str = knob("", 'scenes that visual quality prefers, or a side of the picture; "": those of the mode')
    model: str = knob("", "folder with autoencoder/ and student/; empty: the embedded model")
    plan: bool = knob(False, "measure one update of each method, print what would run and how long it takes, stop")

    def __post_init__(self):
        settle(self)
        event, like, _ = REGIMES.get(self.mode, ("settles", ",".join(DAYLIGHT), 0))
        object.__setattr__(self, "event", self.event or event)
        object.__setattr__(self, "like", self.like or like)
        if not self.csv:
            raise ValueError("--csv FILE is required")
        if self.evaluations > self.forwards:
            raise ValueError(f"evaluations must be 1 to forwards, got {self.evaluations} and {self.forwards}")
        check_weights(self.vq, self.mq, self.ta)
        liked_scenes(self.like)


# ------------------------------------------------------------------------------------------------- methods and settings


def methods_of(text: str) -> list[str]:
    """Names with commas between; "main" is all that train and Best-of-N, "grid" the cells that make sense.
    Raises ValueError, for a refused cell with the reason."""
    groups = {"main": [*TRAINED, *UNTRAINED], "grid": [c for c in GRID if tuple(c.split("+")) not in REFUSED]}
    names = [name for part in text.split(",") for name in groups.get(part, [part])]
    for name in names:
        if "+" in name:
            check_cell(*name.split("+", 1))
        elif name not in groups["main"]:
            raise ValueError(f"unknown method '{name}'{nearest_known(name, [*groups, *groups['main']])}")
    return list(dict.fromkeys(names))


def cell_of(method: str) -> Method | None:
    """The cell of the grid that is trained; None for a method with a loop of its own, or without any."""
    if method in ("kvpo", "astrolabe", *UNTRAINED):
        return None
    return METHODS[method] if method in METHODS else Method(*method.split("+"))


def known_settings(method: str) -> list[str]:
    """The names that --set may give: those that the method reads."""
    if method in UNTRAINED:
        return ["num_generations"]
    if cell := cell_of(method):
        return [*LOOP, *(["tau", "tau_groups", "tau_target"] if cell.policy in ("distance", "energy") else [])]
    kind = astrolabe.AstrolabeConfig if method == "astrolabe" else TrainConfig
    return [f.name for f in fields(kind) if f.name not in GIVEN]


def changes(text: str) -> dict[str, str]:
    """a=1,b=2 -> {"a": "1", "b": "2"}"""
    parts = [part.partition("=") for part in text.split(",") if part]
    if bad := [name for name, equals, _ in parts if not equals]:
        raise ValueError(f"--set takes name=value with commas between, got {bad[0]!r}")
    names = [name.strip() for name, _, _ in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--set gives {twice[0]} twice; keep one")
    return {name.strip(): value.strip() for name, _, value in parts}


def config_of(method: str, options: ArenaOptions, learning_rate: float, seed: int):
    """The method's own configuration, with what --set changes. Raises ValueError for a name that it does not read."""
    num_frames, num_segments = MODES[options.mode]
    cell = cell_of(method)
    kind, known = astrolabe.AstrolabeConfig if method == "astrolabe" else TrainConfig, known_settings(method)
    given = {"seed": seed, "num_frames": num_frames, "max_train_steps": 10**9}
    if kind is TrainConfig:
        given |= {"num_segments": num_segments, "lr_warmup_steps": 0}
    if options.mode in REGIMES:
        fork = REGIMES[options.mode][2]
        names = {f.name for f in fields(kind)}
        given = {name: value for name, value in recipe.TRAINING.items() if name in names} | given | {"fork": fork}
        if kind is astrolabe.AstrolabeConfig:
            given |= {"window_frames": num_frames - fork, "kl_coef": kind.kl_coef, "max_grad_norm": kind.max_grad_norm}
        elif cell and cell.policy == "distance":
            given["tau"] = 0.0  # distances have a scale of their own
    if cell and cell.policy not in ("distance", "energy"):
        given["tau"] = 1.0  # which it does not read; 0 would be set by its first groups
    if method not in UNTRAINED:
        given["learning_rate"] = learning_rate
    kinds = typing.get_type_hints(kind)
    for name, text in changes(options.set).items():
        if name not in known:
            have = [other for other in methods_of(options.methods) if name in known_settings(other)]
            what_to_do = f"; --methods {','.join(have)} has it" if have else nearest_known(name, known)
            raise ValueError(f"--set {name}: {method} has no such setting{what_to_do}")
        of = kinds[name]
        try:
            given[name] = {"true": True, "false": False}[text.lower()] if of is bool else of(text)
        except (ValueError, KeyError):
            raise ValueError(f"--set {name}={text}: expected a {of.__name__}") from None
    return kind(**given)


def settings_of(method: str, config) -> dict:
    """Every number that the method reads, by name: what the CSV keeps under `settings`."""
    own, cell = {}, cell_of(method)
    if cell:
        own = {f.name: getattr(cell, f.name) for f in fields(cell)} | {"kernel": cell.kernel.__name__}
    return own | {name: getattr(config, name) for name in known_settings(method)}


# ------------------------------------------------------------------------------------------------------------- counting


@contextlib.contextmanager
def counting(backbone: torch.nn.Module, counts: Counter) -> Iterator[None]:
    """Adds to counts["forward"] every block of every video that the backbone is called with while this lasts, and to
    counts["backward"] those whose output a gradient arrives at."""

    def passed(module, args, out: Tensor) -> None:
        n = out.shape[0] * out.shape[1] // Window().block  # [B, F, C, H, W]
        counts["forward"] += n
        if out.requires_grad:
            out.register_hook(lambda grad: counts.update(backward=n))

    handle = backbone.register_forward_hook(passed)
    try:
        yield
    finally:
        handle.remove()


# ----------------------------------------------------------------------------------------------------------- evaluation


def sharpness(pixels: Tensor) -> Tensor:
    """[N]: mean squared second difference of neighbouring pixels, down and across. pixels [N, T, 3, H, W]"""
    return sum(pixels.diff(n=2, dim=dim).square().mean((1, 2, 3, 4)) for dim in (-2, -1))


def motion_energy(pixels: Tensor) -> Tensor:
    """[N]: mean squared change of a pixel from frame to frame. pixels [N, T, 3, H, W]"""
    return pixels.diff(dim=1).square().mean((1, 2, 3, 4))


def diversity(reading, n: int, again: int) -> float:
    """How much two videos of the same words differ: the share of frames in which the judge reads another colour, shape,
    scene or motion. For i < again, videos i and n + i tell the same script from different noise."""
    named = [getattr(reading, f.name) for f in fields(reading)]
    named = [r for r in named if r.ndim == 2 and not r.is_floating_point()]  # [N, T] what is shown, not how well
    return torch.stack([r[:again] != r[n : n + again] for r in named]).any(0).float().mean().item()


def rows_of(reading, index: slice):
    return type(reading)(**{f.name: getattr(reading, f.name)[index] for f in fields(reading)})


def twice(scripts: Sequence[str]) -> list[str]:
    """What is sampled for an evaluation: every script, and the first ones once more."""
    return [*scripts, *scripts[:AGAIN]]


@torch.no_grad()
def measure(pipeline: Pipeline, scripts: Sequence[str], rewards: Mixture, videos: Iterator[Tensor]) -> dict:
    """-> {"each": {name of PAIRED: [n]}, a number for each of PLAIN, "passes_per_video"}. videos: latents
    [b, T, C, H, W] of `twice(scripts)`, in any batches."""
    n = len(scripts)
    told = twice(scripts)
    counts = Counter()
    looks = []

    def decode(latents: Tensor) -> Tensor:
        pixels = pipeline.decode(latents)
        looks.append(torch.stack([sharpness(pixels), motion_energy(pixels)]))
        return pixels

    with counting(pipeline.backbone, counts):
        scores, reading = pooled([observe(replace(pipeline, decode=decode), told, rewards, videos)])
    each = {name: s[:n].double() for name, s in scores.items()}
    each["reward"] = rewards.total(each)
    looks = torch.cat(looks, 1)[:, :n].mean(1)
    out = {"sharpness": looks[0].item(), "motion_energy": looks[1].item()}
    if reading is not None:
        judged = pipeline.judge(rows_of(reading, slice(n)), list(scripts))
        out |= {f"judge_{name.replace(' ', '_')}": value for name, value in judged.items() if name != "all"}
        alone = [pipeline.judge(rows_of(reading, slice(i, i + 1)), [scripts[i]])["all"] for i in range(n)]
        each["judge_all"] = torch.tensor(alone, dtype=torch.double)
        out["diversity"] = diversity(reading, n, len(told) - n)
    return out | {"each": each, "passes_per_video": counts["forward"] / len(told)}


def ordinary(pipeline: Pipeline, scripts: Sequence[str], num_frames: int) -> Iterator[Tensor]:
    """The videos of the active policy, for `measure`."""
    return sample(pipeline, twice(scripts), num_frames, seed=NOISE)


def best_videos(
    pipeline: Pipeline, scripts: Sequence[str], rewards: Mixture, config: TrainConfig, method: str, seed: int
) -> Iterator[Tensor]:
    """The same for Best-of-N: the first of the N = G candidates has the noise that `ordinary` gives it."""
    sampler = pipeline.sampler(config.num_segments, routed=False)
    num_frames = config.num_frames
    n = config.num_generations
    block = sampler.window.block
    borders = [*(chunk_starts(num_frames)[1:] if method == "best_of_n_chunks" else []), num_frames]
    shape = (num_frames // block, len(sampler.sigmas), (block, *pipeline.latent_shape))
    others = torch.Generator().manual_seed(seed)
    for i, script in enumerate(twice(scripts)):
        texts = [pipeline.embed([text]) for text in pipeline.segments(script)]
        own = draw_noise(*shape, torch.Generator().manual_seed(NOISE + 10_000 * i))
        noise = torch.cat([own, draw_noise(*shape, others, batch=n - 1)]).to(pipeline.backbone.device)

        def judge(latents: Tensor, first: int, script=script) -> Tensor:
            pixels = pipeline.decode(latents)
            return rewards.total(score(pipeline, rewards, pixels, [script] * n, first))

        yield best_of_n(pipeline.backbone, texts, noise, borders, sampler, judge)[0].latents


def compared(before: dict, after: dict) -> dict[str, float]:
    """Two evaluations, from `measure` -> the columns PAIRED and PLAIN of a row."""
    out = {"passes_per_video": after["passes_per_video"]}
    for name in before["each"]:
        a, b = before["each"][name], after["each"][name]
        sem = (b - a).std() / len(a) ** 0.5
        out |= {f"{name}_before": a.mean(), f"{name}_after": b.mean(), f"{name}_sem": sem}
    for name in PLAIN:
        if name in before:
            out |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    return {name: float(value) for name, value in out.items()}


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One training run, or one Best-of-N; evaluated at each of its budgets."""

    method: str
    purpose: str  # "sweep": chooses a learning rate; "result": is reported
    learning_rate: float  # nan: a sweep has yet to choose it; 0: nothing is trained
    seed: int
    budgets: tuple[int, ...]  # forward passes, ascending; 0: nothing is trained

    def key(self, here: dict[str, str], budget: int) -> dict[str, str]:
        """The columns that tell the row of that budget from all others; here: those that all runs of a call share."""
        own = {"method": self.method, "purpose": self.purpose, "learning_rate": f"{self.learning_rate:g}",
               "seed": str(self.seed), "asked": str(self.budgets[-1]), "budget": str(budget)}  # fmt: skip
        return {name: (own | here)[name] for name in KEY}


def numbers(text: str, kind: type, flag: str) -> list:
    try:
        return [*dict.fromkeys(kind(part) for part in text.split(","))] if text else []
    except ValueError:
        raise ValueError(f"--{flag} takes numbers with commas between, got {text!r}") from None


def shared_key(options: ArenaOptions, rewards: Mixture) -> dict[str, str]:
    weights = " ".join(f"{name}={weight:g}" for name, weight in rewards.weights.items())
    canonical = ",".join(f"{name}={value}" for name, value in sorted(changes(options.set).items()))
    return {"model": options.model, "mode": options.mode, "event": options.event,
            "like": ",".join(sorted(liked_scenes(options.like))), "weights": weights, "set": canonical,
            "eval_prompts": str(options.eval_prompts)}  # fmt: skip


def runs_of(options: ArenaOptions, here: dict[str, str], rows: Sequence[dict[str, str]]) -> list[Run]:
    """All runs that are asked for, the sweeps first, then seed by seed. A method whose sweep gave no finite reward has
    no further runs."""
    rates = numbers(options.learning_rates, float, "learning_rates")
    points = tuple(round(options.forwards * k / options.evaluations) for k in range(1, options.evaluations + 1))
    names = methods_of(options.methods)
    sweeps = {}
    results = []
    for name in names:
        if name in TRAINED or "+" in name:
            last = points[-1:]
            sweeps[name] = [Run(name, "sweep", rate, options.sweep_seed, last) for rate in rates if len(rates) > 1]
    for seed in numbers(options.seeds, int, "seeds"):
        for name in names:
            if name in UNTRAINED:
                results.append(Run(name, "result", 0.0, seed, (0,)))
            elif (rate := best_rate(sweeps[name], here, rows) if sweeps[name] else rates[0]) is not None:
                results.append(Run(name, "result", rate, seed, points))
    return [*itertools.chain(*sweeps.values()), *results]


def best_rate(sweep: Sequence[Run], here: dict[str, str], rows: Sequence[dict[str, str]]) -> float | None:
    """The learning rate with the largest gain in reward; nan while some are missing, None if none is finite."""
    gains = {}
    for run in sweep:
        row = find(rows, run.key(here, run.budgets[-1]))
        if row is None:
            return math.nan
        gain = float(row["reward_after"] or "nan") - float(row["reward_before"] or "nan")
        if not row["note"] and math.isfinite(gain):
            gains[run.learning_rate] = gain
    return max(gains, key=gains.get) if gains else None


def find(rows: Sequence[dict[str, str]], key: dict[str, str]) -> dict[str, str] | None:
    return next((row for row in rows if all(row[name] == value for name, value in key.items())), None)


def left(options: ArenaOptions, here: dict[str, str], rows: Sequence[dict[str, str]]) -> list[Run]:
    """The runs of which the file lacks a row."""
    return [run for run in runs_of(options, here, rows) if any(not find(rows, run.key(here, b)) for b in run.budgets)]


def updates(
    pipeline: Pipeline, method: str, scripts: Sequence[str], rewards: Mixture, config, policies, scale: float = 1.0
) -> Iterator[dict]:
    """Trains and yields the log of every update. `scale`: of the loss of a method of baselines.py."""
    if method == "astrolabe":
        yield from astrolabe.train(pipeline, scripts, rewards, config, policies)
        return
    cell = cell_of(method)
    method = replace(cell, scale=scale) if cell else kvpo
    for step in train(pipeline, scripts, rewards, config, policies, method=method):
        yield step.log()


def scripts_of(options: ArenaOptions, config, seed: int) -> list[str]:
    scripts = prompt_set(SCRIPTS, MODES[options.mode][1], seed, options.event)
    return dealt(scripts) if getattr(config, "in_order", False) else scripts


def first_update(make_pipeline, method: str, rewards: Mixture, options: ArenaOptions) -> tuple[int, float]:
    """-> forward passes of a method's update, and the norm of its first gradient, on the sweep's seed. Groups that set
    tau come before it and are not counted."""
    config = config_of(method, options, 1e-30, options.sweep_seed)  # a rate that moves nothing
    pipeline = make_pipeline()
    sets_tau = isinstance(config, TrainConfig) and not config.tau
    if isinstance(config, TrainConfig):
        config = replace(config, unsafe_scale=1.0)
    scripts, counts = scripts_of(options, config, options.sweep_seed), Counter()
    stream = updates(pipeline, method, scripts, rewards, config, add_policies(pipeline, config))
    with counting(pipeline.backbone, counts):
        log = next(stream)
        if sets_tau:
            counts.clear()
            log = next(stream)
    return counts["forward"], log["grad_norm"]


@dataclass
class Costs:
    """What `first_update` found, each method measured once a call."""

    make_pipeline: Callable[[], Pipeline]
    rewards: Mixture
    options: ArenaOptions
    known: dict[str, tuple[int, float]] = field(default_factory=dict)

    def of(self, method: str) -> tuple[int, float]:
        if method not in self.known:
            kept = [f"{k}={v}" for k, v in changes(self.options.set).items() if k in known_settings(method)]
            options = replace(self.options, set=",".join(kept))
            self.known[method] = first_update(self.make_pipeline, method, self.rewards, options)
        return self.known[method]

    def settle(self, method: str, config, forwards: int):
        """-> the configuration with as many updates as the budget holds, if its rate falls, and the loss's scale."""
        if getattr(config, "lr_scheduler", "") == "linear":
            config = replace(config, max_train_steps=max(1, round(forwards / self.of(method)[0])))
        scale = 1.0
        if cell_of(method) and config.prefix_coef:
            norm, ours = self.of(method)[1], self.of("kvpo")[1]
            if not norm or not ours:
                who = method if ours else "kvpo"
                raise ValueError(
                    f"the first update of {who} has no gradient to scale losses by: take another sweep_seed"
                )
            scale = ours / norm
        return config, scale


def compete(
    pipeline: Pipeline, prompts: Sequence[str], rewards: Mixture, run: Run, options: ArenaOptions, before: dict,
    lacking: Sequence[int], costs: Costs,
) -> Iterator[tuple[int, dict]]:  # fmt: skip
    """One run on a pipeline of its own -> (budget, the row without its key) for each of the `lacking` budgets. A run
    whose loss, gradient or rewards are not finite has rows with a note, and no numbers after it."""
    config = config_of(run.method, options, run.learning_rate, run.seed)
    kept = settings_of(run.method, config)
    counts = Counter(forward=0, backward=0)
    steps = 0
    seconds = 0.0
    note = ""
    stream = None
    if run.method not in UNTRAINED:
        config, scale = costs.settle(run.method, config, run.budgets[-1])
        kept |= {"loss_scale": scale}
        policies = add_policies(pipeline, config)
        stream = updates(
            pipeline, run.method, scripts_of(options, config, run.seed), rewards, config, policies, scale
        )  # fmt: skip
    settings = {"settings": json.dumps(kept)}
    for budget in run.budgets:
        begun, row = time.perf_counter(), {}
        with counting(pipeline.backbone, counts):
            while counts["forward"] < budget and not note:
                try:
                    log = next(stream, None)
                except FloatingPointError as error:
                    note = f"diverged: {error}"
                    continue
                if log is None:  # all updates of a rate that falls are made
                    break
                steps += bool(log.get("grad_norm"))  # groups that set tau or are unsafe move nothing
                if not counts["forward"]:
                    raise ValueError("the passes of this backbone cannot be counted: its velocity and encode must call "
                                     "its forward once each, as WanBackbone's do")  # fmt: skip
        seconds += time.perf_counter() - begun
        if budget not in lacking:  # an interrupted run came this far
            continue
        if not note:
            made = ordinary(pipeline, prompts, config.num_frames)
            if run.method in UNTRAINED:
                made = best_videos(pipeline, prompts, rewards, config, run.method, run.seed)
            try:
                row = compared(before, measure(pipeline, prompts, rewards, made))
            except FloatingPointError as error:
                note = f"diverged: {error}"
        spent = {"forwards": counts["forward"], "backwards": counts["backward"], "updates": steps, "seconds": seconds}
        yield budget, spent | row | settings | {"note": note}


def eval_prompts(options: ArenaOptions, run: Run) -> list[str]:
    """The prompts that a run is measured on: of a sweep others than of a result."""
    seed, n_segments = EVAL_SEED + (run.purpose == "sweep"), MODES[options.mode][1]
    return prompt_set(options.eval_prompts, n_segments, seed, options.event)


def check(options: ArenaOptions, here: dict[str, str], rows: Sequence[dict[str, str]]) -> None:
    """Raises ValueError before any work: wrong names, seeds that evaluate, or rows made with other settings."""
    seeds, rates = numbers(options.seeds, int, "seeds"), numbers(options.learning_rates, float, "learning_rates")
    if not rates:
        raise ValueError("--learning_rates takes at least one number")
    if not seeds and (len(rates) == 1 or {*methods_of(options.methods)} <= {*UNTRAINED}):
        raise ValueError("without --seeds learning rates are swept, and here are none: give several, or give seeds")
    for seed in seeds:
        check_bounds("seeds", seed, **SEEDS)
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"learning_rates must be above 0 and finite, got {rate}")
    if {*seeds, options.sweep_seed} & {EVAL_SEED, EVAL_SEED + 1}:
        raise ValueError(f"the seeds {EVAL_SEED} and {EVAL_SEED + 1} draw the evaluation prompts; take others")
    if options.sweep_seed in seeds:
        raise ValueError(f"seed {options.sweep_seed} chooses the learning rates, so it cannot be reported: take others")
    for method in methods_of(options.methods):
        config = config_of(method, options, 1e-4, 0)
        if isinstance(config, TrainConfig):
            check_geometry(config)
        elif config.selective and config.primary not in ("vq", "mq", "ta"):
            raise ValueError(f"--set primary={config.primary}: expected vq, mq or ta")
        else:
            astrolabe.window_starts(config, Window(), SWITCHES[: MODES[options.mode][1] - 1])
        now = settings_of(method, config)
        for row in rows:
            if row["method"] == method and all(row[name] == here[name] for name in HERE):
                then = json.loads(row["settings"])
                if other := [name for name in now if name in then and now[name] != then[name]]:
                    raise ValueError(f"{options.csv} holds rows of {method} made with {other[0]} {then[other[0]]!r}, "
                                     f"now it is {now[other[0]]!r}: name another file")  # fmt: skip


def arena(make_pipeline: Callable[[], Pipeline], rewards: Mixture, options: ArenaOptions) -> Iterator[dict[str, str]]:
    """Computes what the CSV lacks and yields each row once it is on the disk."""
    path = Path(options.csv)
    here = shared_key(options, rewards)
    before = {}
    rows = read_rows(path, mend=True)
    check(options, here, rows)
    costs = Costs(make_pipeline, rewards, options)
    if "grid" in options.methods.split(","):
        for (exploration, policy), reason in REFUSED.items():
            say(f"{exploration}+{policy} is refused: {reason}")
    while todo := left(options, here, rows):  # a sweep that is complete names the next learning rates
        run, pipeline = todo[0], make_pipeline()
        base = base_hash(pipeline.backbone.transformer)
        for row in rows:
            if all(row[name] == here[name] for name in HERE) and json.loads(row["settings"]).get("base", base) != base:
                raise ValueError(f"{path} holds rows of {row['method']} made on other base weights: name another file")
        prompts = eval_prompts(options, run)
        if run.purpose not in before:
            made = ordinary(pipeline, prompts, MODES[options.mode][0])
            before[run.purpose] = measure(pipeline, prompts, rewards, made)
        lacking = [budget for budget in run.budgets if not find(rows, run.key(here, budget))]
        for budget, found in compete(pipeline, prompts, rewards, run, options, before[run.purpose], lacking, costs):
            found["settings"] = json.dumps(json.loads(found["settings"]) | {"base": base})
            values = run.key(here, budget) | found
            row = {name: cell_text(values.get(name, "")) for name in COLUMNS}
            append_row(path, row)
            rows.append(row)
            yield row


def plan(make_pipeline: Callable[[], Pipeline], rewards: Mixture, options: ArenaOptions) -> str:
    """What `arena` would do, as a markdown table. An evaluation, one update of each method and one Best-of-N are really
    made and timed on few prompts; the update is one whose group trains, with the whole replay."""
    here, rows = shared_key(options, rewards), read_rows(Path(options.csv))
    check(options, here, rows)
    todo, (num_frames, n_segments) = left(options, here, rows), MODES[options.mode]
    few, videos = prompt_set(2, n_segments, EVAL_SEED, options.event), len(twice(range(options.eval_prompts)))

    def timed(call: Callable, *args) -> float:
        begun = time.perf_counter()
        call(*args)
        return time.perf_counter() - begun

    pipeline = make_pipeline()
    for _ in range(2):  # the first call pays for what is loaded once
        evaluation = timed(measure, pipeline, few, rewards, ordinary(pipeline, few, num_frames)) * videos / 4
    total = evaluation * len({run.purpose for run in todo})
    lines = ["| method | runs left | passes a run | an update: forward | backward | seconds | minutes |",
             "|---" * 7 + "|"]  # fmt: skip
    for method in dict.fromkeys(run.method for run in todo):
        mine = [run for run in todo if run.method == method]
        pipeline = make_pipeline()
        config = config_of(method, options, 1e-4, 0)
        counts = Counter(forward=0, backward=0)
        if method in UNTRAINED:
            made = best_videos(pipeline, few[:1], rewards, config, method, 0)
            one, cost = timed(measure, pipeline, few[:1], rewards, made), "- | - | -"
            seconds = one * videos / 2 * len(mine)
        else:
            if isinstance(config, TrainConfig):
                config = replace(config, tau=1.0, unsafe_scale=1.0)
            scripts = scripts_of(options, config, 0)
            stream = updates(pipeline, method, scripts, rewards, config, add_policies(pipeline, config))
            with counting(pipeline.backbone, counts):
                one = timed(next, stream)
            cost = f"{counts['forward']:,} | {counts['backward']:,} | {one:.1f}"
            seconds = one * sum(math.ceil(run.budgets[-1] / counts["forward"]) for run in mine)
            seconds += evaluation * sum(len(run.budgets) for run in mine)
        lines.append(f"| {method} | {len(mine)} | {mine[0].budgets[-1]:,} | {cost} | {seconds / 60:.1f} |")
        total += seconds
    budgets = sum(run.budgets[-1] for run in todo)
    minutes = f"{total / 60:.0f} minutes on this machine as loaded now; an evaluation takes {evaluation:.0f} s"
    return "\n".join([*lines, "", f"{len(todo)} runs, {budgets:,} forward passes of training, {minutes}"])


# ------------------------------------------------------------------------------------------------------------------ CSV


def cell_text(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: Path, mend: bool = False) -> list[dict[str, str]]:
    """The rows of the file, without one that was cut off while it was written; `mend` also removes that one from the
    file. Raises ValueError, and leaves the file as it is, when it has other columns or a damaged row."""
    if not path.exists():
        return []
    content, header = path.read_bytes(), ",".join(COLUMNS).encode()
    end = content.rfind(b"\n") + 1
    if not end and not header.startswith(content):
        raise ValueError(f"{path} is no file of this arena: it begins {content[:40]!r}; name another file")
    try:
        reader = csv.DictReader(io.StringIO(content[:end].decode()), strict=True)
        columns, rows = reader.fieldnames, list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no file of this arena: {error}; name another file") from None
    if end and tuple(columns or ()) != COLUMNS:
        raise ValueError(f"{path} is no file of this arena: its columns are {columns}; name another file")
    for number, row in enumerate(rows, start=1):
        try:
            whole = None not in row and isinstance(json.loads(row["settings"]), dict)
            for name in (*COLUMNS[COLUMNS.index("forwards") : COLUMNS.index("note")], "learning_rate", "seed"):
                float(row[name] or "nan")
        except (ValueError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: row {number} is damaged: expected {len(COLUMNS)} columns, numbers, settings "
                             f"in JSON")  # fmt: skip
    if mend and end < len(content):
        say(f"{path}: the last line was cut off; it is removed")
        os.truncate(path, end)
    return rows


def append_row(path: Path, row: dict[str, str]) -> None:
    """Adds one line, and the header to an empty file; on return it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with path.open("a", encoding="utf-8", newline="") as file:
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def line(row: dict[str, str]) -> str:
    """A row, for the terminal."""
    head = f"{row['method']} {row['set']}".strip() + f", {row['purpose']}, seed {row['seed']}"
    head += f", learning rate {row['learning_rate']}" if float(row["learning_rate"]) else ""
    if row["note"]:
        return f"{head}: {row['note']}"
    changes = []
    for name in ("reward", "judge_all"):
        if row[f"{name}_after"]:
            before, after, sem = (float(row[f"{name}_{when}"]) for when in ("before", "after", "sem"))
            changes.append(f"{name} {after - before:+.3f} ± {sem:.3f}")
    return f"{head}, {int(row['forwards']):,} forward passes: {', '.join(changes)}; {float(row['seconds']):.0f} s"
