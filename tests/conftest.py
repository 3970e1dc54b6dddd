"""A tiny random backbone and a pipeline around it: none of these needs the weights that ship with the package."""

import pytest
import torch

from kvpo_min.pocket import world
from kvpo_min.train import Pipeline
from kvpo_min.wan import WanBackbone

LATENT = (8, 4, 4)  # C, H, W: 4 tokens a frame


def tiny_transformer(seed=0, layers=2):
    """A stock `WanTransformer3DModel` with random weights, 2 heads a layer."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8,
            text_dim=world.TEXT_DIM, freq_dim=32, ffn_dim=48, num_layers=layers, rope_max_seq_len=160,
        )  # fmt: skip
    return transformer.eval().requires_grad_(False)


def tiny_pipeline(seed=0):
    """A new pipeline, the same for the same seed. Pixels are a fixed mixture of the latents, 16 times as large."""
    mixture = torch.randn(3, LATENT[0], generator=torch.Generator().manual_seed(7))

    def decode(latents):
        pixels = torch.einsum("kc,ntchw->ntkhw", mixture, latents).sigmoid()
        return pixels.repeat_interleave(16, -2).repeat_interleave(16, -1)

    return Pipeline(
        backbone=WanBackbone(tiny_transformer(seed)),
        decode=decode,
        embed=world.embed,
        latent_shape=LATENT,
        switches=world.SWITCHES,
        segments=world.segments_of,
        reward_prompts=world.resolve,
        read=world.judge,
        judge=world.correctness,
        sample_scripts=world.prompt_set,
        name="tiny",
    )


@pytest.fixture(scope="module")
def one_thread():
    """These models are so small that a second thread only costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_transformer():
    return tiny_transformer


@pytest.fixture(scope="session")
def make_backbone():
    return lambda seed=0, layers=2: WanBackbone(tiny_transformer(seed, layers))


@pytest.fixture(scope="session")
def make_pipeline():
    return tiny_pipeline
