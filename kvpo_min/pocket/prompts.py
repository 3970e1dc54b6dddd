"""Which scripts a run trains on and which are held out, how long its videos are, and whether they can be made."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch

from kvpo_min.chr import Window
from kvpo_min.kvpo import make_plan
from kvpo_min.pocket.world import SWITCHES, parse, prompt_set, read_prompts

EVAL_SEED = 1_000_000  # of the held-out prompts; the same for every run, so that runs can be compared


def count_segments(scripts: Sequence[str], real: bool = False) -> int:
    """How many segments each script has. Raises ValueError when they differ or are more than can be told."""
    counts = {len(script.split(" | ") if real else parse(script)): script for script in reversed(scripts)}
    if len(counts) > 1:
        examples = "; ".join(f"{n}: '{script}'" for n, script in sorted(counts.items()))
        raise ValueError(f"all scripts must have the same number of segments, got {examples}")
    (n, script), *_ = counts.items()
    if n > len(SWITCHES) + 1:
        raise ValueError(f"a script has at most {len(SWITCHES) + 1} segments, got {n}: '{script}'")
    return n


def video_length(num_frames: int, n_segments: int) -> int:
    """`num_frames`, or for 0 the usual length for that many segments. Raises ValueError as `check_length` does."""
    length = num_frames or (*SWITCHES, 147)[n_segments - 1]
    check_length(length, n_segments)
    return length


def check_length(num_frames: int, n_segments: int) -> None:
    """Raises ValueError when `num_frames` are no whole blocks, or when the last segment would never be shown."""
    if num_frames < 3 or num_frames % 3:
        raise ValueError(f"num_frames must be a multiple of 3 (frames are made in blocks of 3), got {num_frames}")
    begins = (0, *SWITCHES)[n_segments - 1]
    if num_frames <= begins:
        raise ValueError(f"num_frames must be above {begins}, where segment {n_segments} begins, got {num_frames}")


def run_prompts(config, prompts: str = "", event: str = "", eval_prompts: int = 32) -> tuple[list[str], list[str]]:
    """Training scripts, of the file `prompts` or drawn, and held-out scripts from another seed. `event`: words that all
    drawn ones hold. Raises ValueError when they do not fit the mode."""
    if not 1 <= config.num_segments <= len(SWITCHES) + 1:
        raise ValueError(f"num_segments must be 1 to {len(SWITCHES) + 1}, got {config.num_segments}")
    if not prompts and config.seed == EVAL_SEED:
        raise ValueError(f"seed {EVAL_SEED} draws the held-out prompts; take another one for training")
    drawn = (config.num_segments, config.seed, event)
    scripts = read_prompts(prompts) if prompts else prompt_set(256, *drawn)
    if count_segments(scripts) != config.num_segments:
        raise ValueError(
            f"num_segments is {config.num_segments}, but the scripts have {count_segments(scripts)} segments, "
            f"like '{scripts[0]}'"
        )
    if config.in_order and not prompts:
        scripts = dealt(scripts)
    return scripts, prompt_set(eval_prompts, config.num_segments, EVAL_SEED, event)


def dealt(scripts: Sequence[str]) -> list[str]:
    """The same scripts in another order: each six in a row begin in the six scenes. So an update of six groups has as
    many heroes that should stay where memory leads them as heroes that should leave. Drawn by chance an update may hold
    one kind alone, and teach to go on, or to go back, wherever the hero is."""
    hands: dict[str, list[str]] = {}
    for script in scripts:
        hands.setdefault(parse(script)[0].place, []).append(script)
    rounds = zip_longest(*(hands[place] for place in sorted(hands, key=str)))
    return [script for each in rounds for script in each if script is not None]


def check_geometry(config, bank: bool = False) -> None:
    """Raises ValueError when the videos of a run cannot be made, or leave no block at which a group could fork.
    `bank`: whether they are made with a memory bank."""
    check_length(config.num_frames, config.num_segments)
    try:
        make_plan(config, 0, 0, Window(), torch.Generator(), bank)
    except ValueError as error:
        sizes = f"num_frames {config.num_frames}, perturb_num_blocks {config.perturb_num_blocks}"
        raise ValueError(f"{sizes} and nearest {config.nearest}: {error}") from None
