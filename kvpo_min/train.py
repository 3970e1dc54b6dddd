"""The training loop: `for step in train(pipeline, scripts, rewards, config)` yields one `Step` an update.

What one update does is in kvpo.py; here are the order of the scripts, the optimizer, and updates that are skipped.
Everything random comes from one generator, and a checkpoint (resume.py) holds all of it.

Several processes (torchrun): each works on its share of an update's groups. All draw the plans and noise of all groups,
so that random state, order of scripts and checkpoints are those of a run in one process.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence

import torch

from kvpo_min import kvpo
from kvpo_min.config import TrainConfig
from kvpo_min.kvpo import Group, make_plan, replay_energies
from kvpo_min.pipeline import Pipeline, evaluate, sample, score
from kvpo_min.policies import LORA_TARGETS, acting, adapter_weights, add_policies, copy_adapter
from kvpo_min.resume import check_schedule, checkpoints, find_checkpoint, load_checkpoint, read_state, save_checkpoint
from kvpo_min.rewards import Mixture, NotFinite, RewardError
from kvpo_min.step import Step, group_numbers
from kvpo_min.system import broadcast, gather, join_processes, processes, sum_gradients, uninterrupted
from kvpo_min.tve import calibrate_tau

__all__ = [  # also what lies in the files beside this one, and is documented as importable from here
    "Group", "LORA_TARGETS", "Pipeline", "Step", "TrainConfig", "acting", "adapter_weights", "add_policies",
    "checkpoints", "copy_adapter", "evaluate", "find_checkpoint", "group_numbers", "join_processes", "make_plan",
    "processes", "read_state", "replay_energies", "sample", "save_checkpoint", "score", "train",
]  # fmt: skip
SKIPS = 3  # updates in a row that were skipped, after which a run stops


def train(
    pipeline: Pipeline, scripts: Sequence[str], rewards: Mixture, config: TrainConfig, policies=None,
    save_when_stopped: bool = False, method=kvpo,
) -> Iterator[Step]:  # fmt: skip
    """Trains in place and yields one `Step` an update. `policies`: from `add_policies` (made here if not given).
    `method`: what has kvpo.py's `update`, `again` and `energies_for_tau`, such as one of compare/baselines.py.

    Raises ValueError before the first update when the scripts do not fit the mode. When a reward model fails
    (RewardError), or a reward, video, energy, loss or gradient is not finite (FloatingPointError), the update is
    skipped: weights, optimizer and moving average stay as they are. After the third in a row that error is raised.
    In an update's further iterations (`repeat`) it ends the update instead.

    Whatever ends the run early, Ctrl-C included, a checkpoint of the last whole update is written on the way out, if
    there are checkpoints at all or with `save_when_stopped`. A caller who takes no more updates (`break`) gets none."""
    if not torch.is_grad_enabled():
        raise RuntimeError("training needs gradients: take its updates outside torch.no_grad()")
    check_scripts(pipeline, scripts, config)
    check_share(config)
    rank, world = processes()
    policies = policies if policies is not None else add_policies(pipeline, config)
    weights = adapter_weights(policies, "default")
    optimizer = torch.optim.AdamW(weights.values(), lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    state = {"step": 0, "tau": config.tau, "order": [], "skips": 0, "logs": []}
    if config.resume_from_checkpoint:
        check_schedule(find_checkpoint(config), config)
        state = load_checkpoint(find_checkpoint(config), policies, optimizer, generator)
        state["order"] = [k for k in state["order"] if k < len(scripts)]  # there may be fewer now
    for name in ("default", "old", "ema"):  # GPUs of different kinds may have drawn different A matrices
        broadcast(adapter_weights(policies, name).values())
    if not state["tau"]:
        state["tau"] = find_tau(pipeline, scripts, config, policies, state, generator, method)

    saved, whole = state["step"], (generator.get_state(), list(state["order"]))  # of the last whole update
    try:
        while state["step"] < config.max_train_steps:
            begun = time.perf_counter()
            step = state["step"]
            grad_norm = 0.0
            old_is_current = step % config.old_policy_every == 0
            if old_is_current:
                copy_adapter(policies, "default", "old")
            learning_rate = optimizer.param_groups[0]["lr"] = rate(config, step)
            optimizer.zero_grad()
            groups, failure = own_groups(
                pipeline, scripts, rewards, config, policies, state, generator, old_is_current, method
            )
            told = gather((failure, [group_numbers(g, rewards.weights) for g in groups] if world > 1 else []))
            failure = next((theirs for theirs, _ in told if theirs), None)
            elsewhere = [line for r, (_, lines) in enumerate(told) if r != rank for line in lines]
            if not failure:
                sum_gradients(list(weights.values()))
                grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm).item()
                if not math.isfinite(grad_norm):  # the sum's, so all processes skip alike
                    failure, grad_norm = FloatingPointError(f"the gradient's norm is {grad_norm}, not finite"), 0.0
            with uninterrupted():
                drawn, whole = (generator.get_state(), list(state["order"])), None  # None while half is done
                if grad_norm:  # all groups unsafe: no update, not even a step of the optimizer's momentum
                    optimizer.step()
                    repeat(pipeline, policies, config, groups, state["tau"], optimizer, step, method)
                    copy_adapter(policies, "default", "ema", 1 - config.ema_decay)
                state["step"] = step + 1
                state["skips"] = state["skips"] + 1 if failure else 0
                stop = state["skips"] == SKIPS
                state["skips"] %= SKIPS  # a run that is resumed counts from 0
                seconds = time.perf_counter() - begun
                record = Step(step, [] if failure else groups, state["tau"], grad_norm, learning_rate, seconds,
                              dict(rewards.weights), [] if failure else elsewhere, str(failure or ""))  # fmt: skip
                state["logs"].append(record.log())
                whole = drawn
            due = state["step"] == config.max_train_steps or state["step"] % max(1, config.checkpointing_steps) == 0
            if rank == 0 and config.checkpointing_steps and due:
                save_whole(config, policies, optimizer, generator, state, whole)
                saved = state["step"]
            yield record
            record = groups = None  # what they hold would stay in memory during the next update
            if stop:
                raise too_many_skips(failure, step)
    except (Exception, KeyboardInterrupt):
        if rank == 0 and whole and state["step"] > saved and (config.checkpointing_steps or save_when_stopped):
            save_whole(config, policies, optimizer, generator, state, whole)
        raise


def check_scripts(pipeline: Pipeline, scripts: Sequence[str], config: TrainConfig) -> None:
    """Raises ValueError when the scripts do not have `num_segments` segments, or some would never be shown."""
    n_segments = {len(pipeline.segments(script)) for script in scripts}
    if n_segments != {config.num_segments}:
        raise ValueError(f"num_segments is {config.num_segments}, but the scripts have {sorted(n_segments)} segments")
    begins = (0, *pipeline.switches)[: config.num_segments]
    if len(begins) < config.num_segments or begins[-1] >= config.num_frames:
        raise ValueError(
            f"num_frames is {config.num_frames} and segments begin at {[0, *pipeline.switches]}: "
            f"not all of {config.num_segments} segments would be shown"
        )


def check_share(config: TrainConfig) -> None:
    """Raises ValueError when the groups of an update cannot be shared out evenly."""
    groups, world = config.groups_per_update, processes()[1]
    if groups % world:
        raise ValueError(f"{world} processes cannot share groups_per_update {groups}: give a multiple of {world}")


def find_tau(
    pipeline, scripts, config: TrainConfig, policies, state: dict, generator: torch.Generator, method=kvpo
) -> float:
    """tau from the spread of the first groups' energies; these groups are not trained on."""
    (rank, world), own = processes(), {}
    for k in range(config.tau_groups):
        task = kvpo.draw(pipeline, scripts, state["order"], config, state["step"], generator)
        if k % world == rank:
            own[k] = method.energies_for_tau(pipeline, policies, config, task)
    rows = {k: energies for theirs in gather(own) for k, energies in theirs.items()}
    return calibrate_tau(torch.cat([rows[k] for k in sorted(rows)]), config.tau_target)


def own_groups(
    pipeline, scripts, rewards: Mixture, config: TrainConfig, policies, state: dict, generator: torch.Generator,
    old_is_current: bool, method=kvpo,
) -> tuple[list[Group], Exception | None]:  # fmt: skip
    """This process's share of an update's groups, and what went wrong in one of them, after which none is made."""
    rank, world = processes()
    groups = []
    drawn = [
        kvpo.draw(pipeline, scripts, state["order"], config, state["step"], generator)
        for _ in range(config.groups_per_update)
    ]
    mine = drawn[rank::world]
    together = len(mine) > 1 and not config.branch_batch and pipeline.bank is None
    prefixes = kvpo.make_prefixes(pipeline, config, mine) if together else itertools.repeat(None)
    for task in mine:
        try:
            with acting(policies, "old"):
                prefix = next(prefixes)
            more = (state["tau"], old_is_current, prefix)
            groups.append(method.update(pipeline, policies, rewards, config, task, *more))
        except (RewardError, FloatingPointError) as error:
            return groups, type(error)(str(error))  # the old one's traceback keeps the group's tensors alive
    return groups, None


def rate(config: TrainConfig, step: int, iteration: int = 0) -> float:
    """Learning rate of an optimizer step: up over `lr_warmup_steps` updates, times a factor: 1, or with "linear" one
    that falls from 1 at the first step to 0 at the end of the run."""
    left = 1 - (step + iteration / config.num_iterations) / config.max_train_steps
    falling = left if config.lr_scheduler == "linear" else 1.0
    return config.learning_rate * falling * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))


def repeat(
    pipeline, policies, config: TrainConfig, groups: list[Group], tau: float, optimizer, step: int, method=kvpo
) -> None:
    """The further optimizer steps on an update's groups (`num_iterations`). Where something is not finite it ends
    early, with a warning: what was learned until then stays."""
    weights = adapter_weights(policies, "default").values()
    for done in range(1, config.num_iterations):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate(config, step, done)
        failure = ""
        try:
            for group in groups:
                method.again(pipeline, policies, config, group, tau, done)
        except FloatingPointError as error:
            failure = str(error)
        failure = next(filter(None, gather(failure)), "")
        if not failure:
            sum_gradients(list(weights))
            norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm).item()
            failure = "" if math.isfinite(norm) else f"the gradient's norm is {norm}"
        if failure:
            warnings.warn(f"{done} of {config.num_iterations} iterations were made: {failure}", stacklevel=2)
            return
        optimizer.step()


def save_whole(config, policies, optimizer, generator: torch.Generator, state: dict, whole: tuple) -> None:
    """Saves the state after the last complete update. whole: random state and order of scripts then."""
    generator.set_state(whole[0])
    state["order"] = list(whole[1])
    save_checkpoint(config, policies, optimizer, generator, state)


def too_many_skips(failure: Exception, step: int) -> Exception:
    """What ends a run after the skipped update `step`, with what was wrong in it and what to do."""
    if isinstance(failure, RewardError):
        return RewardError(f"the rewards of {SKIPS} updates in a row could not be had; {failure}")
    what_to_do = (
        "the weights have diverged: start again with a lower learning_rate or a higher kl_coef (or, if you gave tau, "
        "with a larger one)"
    )
    if isinstance(failure, NotFinite):
        what_to_do = "mend that reward or leave it out, then go on"
    return type(failure)(f"updates {step + 1 - SKIPS} to {step} were skipped; in update {step} {failure}: {what_to_do}")
