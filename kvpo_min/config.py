"""The options of a training run, with their defaults, their bounds, and the authors' numbers in one place."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass


def knob(default, official=None, *, least=None, above=None, most=None, below=None, multiple=None, of=None):
    """A field of a configuration and its bounds: `least` and `most` may be reached, `above` and `below` not; `of`: all
    that it may be. `official`: what compat="official" fills in where nothing is given."""
    bounds = {"least": least, "above": above, "most": most, "below": below, "multiple": multiple, "of": of}
    return dataclasses.field(
        default=default if official is None else None,
        metadata=bounds | {"ours": default, "official": official},
    )


def is_open(field: dataclasses.Field) -> bool:
    """Whether a preset has a number of its own for this field, which is filled in where none is given."""
    return field.metadata.get("official") is not None


def settle(config) -> None:
    """For `__post_init__`: fills in what was left open, then checks all bounds. Raises ValueError naming the option."""
    for field in dataclasses.fields(config):
        if is_open(field) and getattr(config, field.name) is None:
            value = field.metadata["official" if getattr(config, "compat", "") == "official" else "ours"]
            object.__setattr__(config, field.name, value)
        if field.metadata:
            check_bounds(field.name, getattr(config, field.name), **field.metadata)


def check_bounds(name: str, value, least=None, above=None, most=None, below=None, multiple=None, of=None, **_) -> None:
    if of is not None:
        if value not in of:
            raise ValueError(f"{name} must be {' or '.join(map(json.dumps, of))}, got {value!r}")
        return
    held = {
        f"at least {least}": least is None or value >= least,
        f"above {above}": above is None or value > above,
        f"at most {most}": most is None or value <= most,
        f"below {below}": below is None or value < below,
        f"a multiple of {multiple}": multiple is None or value % multiple == 0,
        "finite": not isinstance(value, float) or math.isfinite(value),
    }
    if missed := [text for text, holds in held.items() if not holds]:
        raise ValueError(f"{name} must be {' and '.join(missed)}, got {value}")


def under(config, compat: str):
    """The same configuration under another preset, which fills all that presets have numbers of their own for."""
    return dataclasses.replace(
        config, compat=compat, **{f.name: None for f in dataclasses.fields(config) if is_open(f)}
    )


@dataclass(frozen=True)
class TrainConfig:
    """One run. Names are those of diffusers and TRL where they have one, KVPO's words for its own knobs.

    What is not given is filled with our default, or with the authors' under compat="official". Raises ValueError naming
    an option that is out of its bounds."""

    output_dir: str = "kvpo_run"
    seed: int = knob(0, least=-(2**63), below=2**63)
    max_train_steps: int = knob(60, least=1)
    num_frames: int = knob(39, least=3, multiple=3)  # length of the videos: 39 a single prompt, 147 four segments
    num_segments: int = knob(1, least=1)  # prompts a script; 1, or up to 4 in long videos
    learning_rate: float = knob(1e-3, above=0)
    lr_warmup_steps: int = knob(2, least=0)
    lr_scheduler: str = knob("constant", of=("constant", "linear"))  # after the warm-up; linear: down to 0 at the end
    adam_weight_decay: float = knob(0.0, least=0)
    max_grad_norm: float = knob(1.0, above=0)
    rank: int = knob(16, least=1)  # of the LoRA
    lora_alpha: int = knob(16, least=1)
    ema_decay: float = knob(0.95, least=0, below=1)
    num_generations: int = knob(8, least=2)  # branches G
    groups_per_update: int = knob(1, least=1)  # scripts whose gradients are averaged in one update
    in_order: bool = False  # scripts come as they stand, not in a new random order each time round
    num_iterations: int = knob(1, least=1)  # optimizer steps on the groups of an update (TRL's name)
    old_policy_every: int = knob(1, least=1)  # updates between two refreshes of the rollouts' policy
    fork: int = knob(0, least=0, multiple=3)  # ours: the frame at which every group forks; 0: drawn
    nearest: int = knob(2, official=1, least=0)  # nearest past frames that every branch keeps; the rest is routed
    perturb_num_blocks: int = knob(5, least=1)  # routed blocks after the fork
    grad_steps: int = knob(4, official=2, least=1, most=4)  # denoising steps that carry gradient
    tau: float = knob(0.0, official=2.0, least=0)  # temperature; 0: set by the first groups' energies
    tau_groups: int = knob(8, least=1)  # groups that set tau
    tau_target: float = knob(0.4, above=0)  # spread of the log scores -E / tau in a group that tau is set for
    kl_coef: float = knob(1.0, official=10.0, least=0)
    anchor_in_group: bool = False  # ours: the anchor is one of the continuations that the policy chooses among
    prefix_coef: float = knob(0.0, least=0)  # ours: weight of the preservation of the shared prefix; 0: none
    clip_range_low: float = knob(0.1, above=0)
    clip_range_high: float = knob(0.2, above=0)
    adv_clip_max: float = knob(2.5, above=0)
    adv_eps: float = knob(1e-8, above=0)  # added to the spread that a reward is divided by; larger: noise counts less
    local_weight: float = knob(1.0, least=0)
    global_weight: float = knob(0.5, least=0)
    fuse_mode: str = knob("std", of=("std", "zscore", "none"))  # std: over the anchor; zscore: over the group's mean
    global_frames: int = knob(36, least=0, multiple=3)  # frames after the fork's chunk that the global reward sees
    unsafe_scale: float = knob(0.0, official=0.5, least=0)  # factor on the loss when no branch beats the anchor
    compat: str = knob("", of=("", "official"))  # official: as the authors, where nothing else is given
    checkpointing_steps: int = knob(0, least=0)  # updates between checkpoints; 0: one only if a run is stopped
    checkpoints_total_limit: int = knob(2, least=1)
    resume_from_checkpoint: str = ""  # "latest", or the path of a checkpoint-N folder
    branch_batch: int = knob(0, least=0)  # branches that run at once; 0: all
    replay_batch: int = knob(0, least=0)  # replayed steps that run at once; 0: all

    def __post_init__(self):
        settle(self)
        if self.compat and self.fork:
            raise ValueError(f'fork must be 0 with compat "official", whose plan draws it, got {self.fork}')

    @property
    def context(self) -> str:
        """What a replay encodes between blocks: the branch's own x0, or the policy's last prediction (authors)."""
        return "own" if self.compat else "stored"

    @property
    def sigma_floor(self) -> float:
        """Of the energy's weights: 0 the velocity energy (paper), 1 that of x0 (authors)."""
        return 1.0 if self.compat else 0.0


def nearest_known(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else f"; known: {', '.join(known)}"


def check_weights(*weights: float) -> None:
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"the weights vq, mq, ta must be 0 or more and not all 0, got {', '.join(map(str, weights))}")


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuses what torch's generators do not take, before any work."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name} must lie in -2**63 .. 2**63 - 1, got {seed}")
