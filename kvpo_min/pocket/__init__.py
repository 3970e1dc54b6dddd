"""The pocket model: a distilled autoregressive video model of two million parameters that ships with the package."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from kvpo_min.pipeline import Pipeline
from kvpo_min.pocket import world
from kvpo_min.pocket.rewards import Look, MotionQuality, TextAlignment, VisualQuality
from kvpo_min.rewards import Mixture
from kvpo_min.tve import schedule

WEIGHTS = Path(__file__).parent / "weights"  # autoencoder/, teacher/, student/ in diffusers layout, fp16


def load_pocket(
    name: str = "student", folder: str | Path | None = None, device: str = "cpu", like: tuple[str, ...] = world.DAYLIGHT
) -> Pipeline:
    """Loads the embedded model (`name` "student" or "teacher"), or one that `kvpo-min distill` left in `folder`.
    `like`: the taste that the judge counts, from `world.liked_scenes`.

    Raises FileNotFoundError naming the missing folder and how to make it, and ValueError naming one that is damaged, or
    whose parts do not belong together."""
    from diffusers import AutoencoderTiny, WanTransformer3DModel

    from kvpo_min.wan import WanBackbone
    from kvpo_min.wan.checkpoints import from_folder

    like = world.liked_scenes(like)
    folder = Path(folder or WEIGHTS)
    for part in ("autoencoder", name):
        if not (folder / part / "config.json").exists():
            raise FileNotFoundError(f"{folder / part} holds no model; run `kvpo-min distill --output_dir {folder}`")
    autoencoder = from_folder(AutoencoderTiny, folder / "autoencoder").float().to(device)
    autoencoder.to(memory_format=torch.channels_last)
    transformer = from_folder(WanTransformer3DModel, folder / name).float().to(device)
    config, sizes = autoencoder.config, transformer.config
    channels = config.latent_channels
    if (sizes.in_channels, sizes.out_channels, sizes.text_dim) != (channels, channels, world.TEXT_DIM):
        raise ValueError(
            f"{folder}: {name} and autoencoder do not belong together: expected {channels} channels in and out and "
            f"text of {world.TEXT_DIM} numbers, got {sizes.in_channels}, {sizes.out_channels} and {sizes.text_dim}"
        )

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        z = latents.flatten(0, 1) / config.scaling_factor + config.shift_factor
        few = z.split(32)  # what is made on the way then fits a CPU's caches
        parts = [autoencoder.decoder(p.contiguous(memory_format=torch.channels_last)) for p in few]
        pixels = (torch.cat(parts) / 2 + 0.5).clamp(0, 1).contiguous()
        return pixels.unflatten(0, latents.shape[:2])

    return Pipeline(
        backbone=WanBackbone(transformer),
        decode=decode,
        embed=lambda texts: world.embed(texts).to(device),
        sigmas=schedule(shift=world.SHIFT).to(device),
        latent_shape=(config.latent_channels, 8, 8),
        switches=world.SWITCHES,
        segments=world.segments_of,
        reward_prompts=world.resolve,
        read=world.judge,
        judge=functools.partial(world.correctness, like=like),
        sample_scripts=world.prompt_set,
        name=f"pocket-{name}",
    )


def look() -> Look:
    """The pocket world as the analytic rewards see it."""
    shapes = {name: world.masks()[0][k] for k, name in enumerate(world.SHAPES)}
    landscapes = dict(zip(world.SCENES, world.scenes(), strict=True))
    return Look(world.COLOURS, world.OUTLINE, landscapes, shapes, world.DIRECTIONS, world.SIDES)


def pocket_rewards(
    vq: float = 1.0, mq: float = 1.0, ta: float = 1.0, like: tuple[str, ...] = world.DAYLIGHT
) -> Mixture:
    """VQ, MQ and TA on the pocket world, with their weights in the mixture. `like`: what VQ prefers, from
    `world.liked_scenes`."""
    here = look()
    return Mixture(
        {"vq": VisualQuality(here, world.liked_scenes(like)), "mq": MotionQuality(here), "ta": TextAlignment(here)},
        {"vq": vq, "mq": mq, "ta": ta},
    )


def load_model(folder: str, like: str = ",".join(world.DAYLIGHT)) -> Pipeline:
    """The embedded student, or the one in `folder`; `like`: the scenes that its judge counts as liked. Raises
    FileNotFoundError or ValueError naming the folder."""
    from diffusers.utils import logging
    from safetensors import SafetensorError

    logging.set_verbosity_error()  # AutoencoderTiny warns of a key that it wrote itself
    try:
        return load_pocket(folder=folder or None, like=world.liked_scenes(like))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder or 'the embedded weights'} cannot be loaded as a model: {error}") from error
