"""The options of a training run, with their defaults, their bounds, and the authors' numbers in one place."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

SEEDS = {"least": -(2**63), "below": 2**63}  # what torch's generators take


def knob(default, help="", *, official=None, **bounds):
    """A field of a configuration. `help`: what its flag's help says. `official`: what compat="official" fills in where
    nothing is given. The bounds are those of `check_bounds`."""
    return dataclasses.field(
        default=default if official is None else None,
        metadata=bounds | {"help": help, "ours": default, "official": official},
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
    """Raises ValueError naming the option. `least` and `most` may be reached, `above` and `below` not; `of`: all that
    it may be."""
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
    seed: int = knob(0, **SEEDS)
    max_train_steps: int = knob(60, least=1)
    num_frames: int = knob(39, "length of the videos: 39 a single prompt, 147 four segments", least=3, multiple=3)
    num_segments: int = knob(1, "prompts a script; 1, or up to 4 in long videos", least=1)
    learning_rate: float = knob(1e-3, above=0)
    lr_warmup_steps: int = knob(2, least=0)
    lr_scheduler: str = knob("constant", "linear: falls to 0 over the run, warm-up or not", of=("constant", "linear"))
    adam_weight_decay: float = knob(0.0, least=0)
    max_grad_norm: float = knob(1.0, above=0)
    rank: int = knob(16, "of the LoRA", least=1, most=4096)
    lora_alpha: int = knob(16, least=1)
    ema_decay: float = knob(0.95, least=0, below=1)
    num_generations: int = knob(8, "branches G", least=2)
    groups_per_update: int = knob(1, "scripts whose gradients are averaged in one update", least=1)
    in_order: bool = knob(False, "scripts in their own order, not reshuffled every time round")
    num_iterations: int = knob(1, "optimizer steps on an update's groups; energies without gradient stay", least=1)
    old_policy_every: int = knob(1, "updates between two refreshes of the rollouts' policy", least=1)
    fork: int = knob(0, "ours: the frame at which every group forks; 0: drawn", least=0, multiple=3)
    nearest: int = knob(2, "nearest past frames that every branch keeps; the rest is routed", official=1, least=0)
    perturb_num_blocks: int = knob(5, "routed blocks after the fork", least=1)
    local_frames: int = knob(0, "ours: replayed and scored frames after the fork; 0: its chunk's", least=0, multiple=3)
    grad_steps: int = knob(4, "denoising steps that carry gradient", official=2, least=1, most=4)
    tau: float = knob(0.0, "temperature; 0: set by the first groups' energies", official=2.0, least=0)
    tau_groups: int = knob(8, "groups that set tau", least=1)
    tau_target: float = knob(0.4, "spread of the log scores -E / tau in a group that tau is set for", above=0)
    kl_coef: float = knob(1.0, official=10.0, least=0)
    anchor_in_group: bool = knob(False, "ours: the anchor is one of the continuations that the policy chooses among")
    prefix_coef: float = knob(0.0, "ours: weight of the preservation of the shared prefix; 0: none", least=0)
    clip_range_low: float = knob(0.1, "acts only where old_policy_every lets the old policy lag", above=0)
    clip_range_high: float = knob(0.2, "likewise", above=0)
    adv_clip_max: float = knob(2.5, above=0)
    adv_eps: float = knob(1e-8, "added to the spread that a reward is divided by; larger: noise counts less", above=0)
    local_weight: float = knob(1.0, least=0)
    global_weight: float = knob(0.5, least=0)
    fuse_mode: str = knob("std", "std: over the anchor; zscore: over the group's mean", of=("std", "zscore", "none"))
    global_frames: int = knob(36, "frames after the fork's chunk that the global reward sees", least=0, multiple=3)
    unsafe_scale: float = knob(0.0, "factor on the loss when no branch beats the anchor", official=0.5, least=0)
    compat: str = knob("", "official: as the authors, where nothing else is given", of=("", "official"))
    checkpointing_steps: int = knob(0, "updates between checkpoints; 0: one only if a run is stopped", least=0)
    checkpoints_total_limit: int = knob(2, least=1)
    resume_from_checkpoint: str = knob("", '"latest", or the path of a checkpoint-N folder')
    branch_batch: int = knob(0, "branches that run at once; 0: all", least=0)
    replay_batch: int = knob(0, "replayed steps that run at once; 0: all", least=0)

    def __post_init__(self):
        settle(self)
        if self.compat and self.fork:
            raise ValueError(f'no fork with compat "official", whose plan draws it, got {self.fork}')
        if self.compat and self.local_frames:
            raise ValueError(f'no local_frames with compat "official", got {self.local_frames}')
        if 0 < self.local_frames < 3 * self.perturb_num_blocks:
            raise ValueError(
                f"local_frames must hold the {self.perturb_num_blocks} routed blocks of 3 frames, got "
                f"{self.local_frames}"
            )
        if not self.local_weight and not self.global_weight:
            raise ValueError("local_weight and global_weight are both 0, so nothing would be learned: raise one")

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
