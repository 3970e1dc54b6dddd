"""Makes the pocket model from nothing: autoencoder -> many-step teacher -> 4-step student distilled on its own
rollouts.

1. `train_autoencoder`: diffusers `AutoencoderTiny`, 64x64 RGB -> latents [8, 8, 8], trained on clean frames of the
   world.
2. `train_teacher`: flow matching by teacher forcing (a clean and a noisy copy of a clip in one sequence under a block
   mask), with more of the kinds of block that are rare in clips: the first of a video, the first under new words, and
   one whose past goes another way than the words say.
3. `train_student`: distribution matching (DMD) on the student's own rollouts: real score = teacher, guided by the
   words; fake score = a copy that is trained on the student's samples (Self-Forcing, arXiv 2506.08009; DMD2, arXiv
   2405.14867).

History dropout, in the teacher's masks and in the student's rollouts: in a part of the blocks the visible past is the
sink, the nearest frame or two, and a random choice of older frames. A routed history (CHR) is then one the model has
met.

Every stage is resumable: its folder holds weights, optimizers, step and random state, written aside and renamed.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from kvpo_min.pocket import world
from kvpo_min.rollout import denoise
from kvpo_min.tve import schedule
from kvpo_min.wan import WanBackbone

LATENT = (8, 8, 8)  # channels, height, width
MAY_BE_0 = ("text_dropout", "history_dropout", "guidance", "ema_decay")  # all else of `DistillConfig` is above 0


@dataclass
class DistillConfig:
    """Sizes and rates, the recipe found while the weights that ship were made. How they were: docs/LOG.md."""

    output_dir: str = "pocket"  # holds autoencoder/, teacher/, student/
    seed: int = 0
    device: str = "cpu"
    autoencoder_steps: int = 2400
    autoencoder_learning_rate: float = 3e-3
    teacher_steps: int = 2400
    teacher_learning_rate: float = 2e-2  # of the matrices (Muon); a fifth of it for everything else (AdamW)
    teacher_batch: int = 2  # clips a process
    first_blocks: int = 48  # first blocks a process, besides the clips
    switch_blocks: int = 24  # blocks at a change of the words a process, besides the clips
    turned_blocks: int = 32  # blocks whose past goes another way than the words say a process, besides the clips
    text_dropout: float = 0.1  # share of the clips without words, so that the student's target can be guided
    history_dropout: float = 0.5  # share of the blocks that read a random past
    student_steps: int = 24  # of four rollouts each, and one of first blocks
    student_learning_rate: float = 1e-4
    fake_learning_rate: float = 2e-4
    fake_updates: int = 2  # of the fake score, for one of the student
    student_batch: int = 4  # rollouts a process
    student_first_blocks: int = 32  # first blocks a process
    guidance: float = 3.0  # by the words, of the teacher's velocity that the student is led by
    ema_decay: float = 0.9  # of the student
    stories: int = 6000
    checkpointing_steps: int = 100

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in MAY_BE_0 else 1
            if f.type == "int" and f.name != "seed" and value < least:
                raise ValueError(f"{f.name} must be at least {least}, got {value}")
            if f.type == "float" and not (0 <= value < math.inf and (value or f.name in MAY_BE_0)):
                raise ValueError(f"{f.name} must be above 0 and finite, got {value}")
        if max(self.text_dropout, self.history_dropout) > 1 or self.ema_decay >= 1:
            raise ValueError(
                f"text_dropout and history_dropout are shares of 1, and ema_decay is below 1, got {self.text_dropout}, "
                f"{self.history_dropout} and {self.ema_decay}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must lie in -2**63 .. 2**63 - 1, got {self.seed}")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, or not on this machine
            raise ValueError(f"device {self.device!r} is not there: {error}") from None


def loop(
    folder: Path,
    total: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    generator: torch.Generator,
    step: Callable[[int], float],
    every: int,
) -> None:
    """Runs `step(i)` for i < total under a progress bar, from the last checkpoint in `folder` if there is one."""
    path, done = folder / f"training_state{rank() or ''}.pt", 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in (modules | optimizers).items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        done = state["step"]
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(done, total), initial=done, total=total, desc=folder.name, mininterval=10, disable=rank() > 0)
    mean = None
    for i in bar:
        loss = step(i)
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        bar.set_postfix_str(f"{mean:.4f}", refresh=False)
        if (i + 1) % every == 0 or i + 1 == total:
            state = {name: part.state_dict() for name, part in (modules | optimizers).items()}
            state |= {"generator": generator.get_state(), "rng": torch.get_rng_state(), "step": i + 1}
            torch.save(state, aside := path.with_suffix(".aside"))
            os.replace(aside, path)


def warm_cosine(i: int, total: int, warmup: int) -> float:
    """Learning-rate factor: linear up, then a cosine down to 2%."""
    if i < warmup:
        return (i + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (i - warmup) / max(1, total - warmup))).item())


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, all of one shape in one batch, in float32. The numbers are those of
    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw", weight_decay=0)`, whose iterations run in bfloat16: on a CPU
    without it they take longer than the step (docs/LOG.md)."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                update = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in same])
                for p, direction in zip(same, orthogonalised(update), strict=True):
                    p.add_(direction, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalised(x: Tensor) -> Tensor:
    """Newton-Schulz iteration (K. Jordan's coefficients): the singular values of x [N, R, C] go to about 1."""
    if x.shape[1] > x.shape[2]:
        return orthogonalised(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


# ---------------------------------------------------------------------------------------------------------- autoencoder


def new_autoencoder():
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(24,) * 4, decoder_block_out_channels=(24,) * 4, latent_channels=LATENT[0],
        num_encoder_blocks=(0, 1, 1, 2), num_decoder_blocks=(2, 1, 1, 0),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def random_states(n: int, generator: torch.Generator) -> Tensor:
    """Uniform clean states [n, 6]."""
    sizes = torch.tensor([4, 2, 6, 2, 32, 32])
    states = (torch.rand(n, 6, generator=generator) * sizes).long()
    states[:, 4:] *= 2
    return states


def train_autoencoder(config: DistillConfig) -> nn.Module:
    """Trains the autoencoder on clean frames and saves it in diffusers layout under `output_dir/autoencoder`."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = new_autoencoder().to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), config.autoencoder_learning_rate, betas=(0.9, 0.99))

    def step(i: int) -> float:
        factor = warm_cosine(i, config.autoencoder_steps, 100)
        optimizer.param_groups[0]["lr"] = config.autoencoder_learning_rate * factor
        x = world.render(random_states(32, generator)).to(config.device, memory_format=torch.channels_last) * 2 - 1
        z = model.encoder(x)
        # noise on the latents: the decoder must forgive the small errors of a generator
        error = model.decoder(z + 0.05 * torch.randn_like(z)) - x
        loss = error.square().mean() + 0.5 * error.abs().mean() + 1e-3 * (z.square() - 1).clamp(min=0).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return error.square().mean().item()

    folder = Path(config.output_dir) / "autoencoder"
    loop(folder, config.autoencoder_steps, {"model": model}, {"optimizer": optimizer}, generator, step,
         config.checkpointing_steps)  # fmt: skip
    model.eval()
    with torch.no_grad():  # latents of unit scale, so that sigma means the same everywhere
        z = model.encoder(world.render(random_states(512, generator)).to(config.device) * 2 - 1)
    model.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    model.save_pretrained(folder)
    return model


# --------------------------------------------------------------------------------------------------------------- clips

SINK, OLD, PAST, BLOCK = 3, 6, 6, 3  # frames: sink, frames from further back, ordinary past, block
BLOCKS = 4  # noisy blocks a clip
STORY_FRAMES = 147


@dataclass(frozen=True)
class Stories:
    """Training stories: latents of every clean frame there is, and for each story its frames and words."""

    latents: Tensor  # [98304, 8, 8, 8] fp16, one row a state of the world
    rows: Tensor  # [N, 147] int32, row of each frame
    text: Tensor  # [N, 4, words, text dim]; stories of one segment repeat it
    segments: Tensor  # [N] number of segments: 1 or 4


def state_row(states: Tensor) -> Tensor:
    """states [..., 6] -> row of the table of all clean frames [...]"""
    shape, size, colour, background, y, x = states.unbind(-1)
    return ((((shape * 2 + size) * 6 + colour) * 2 + background) * 32 + y // 2) * 32 + x // 2


def encode_world(autoencoder, path: Path) -> Tensor:
    """Latents of all 98304 clean frames, computed once and kept in `path`. -> [98304, 8, 8, 8] fp16, unit scale"""
    from safetensors.torch import load_file, save_file

    if path.exists():
        return load_file(path)["latents"]
    sizes, states = [4, 2, 6, 2, 32, 32], []
    index = torch.arange(torch.tensor(sizes).prod())
    for size in reversed(sizes):
        states.insert(0, index % size)
        index = index // size
    states = torch.stack(states, 1)
    states[:, 4:] *= 2
    out = []
    for part in tqdm(states.split(256), desc="every clean frame", mininterval=5):
        out.append(to_latent(autoencoder, world.render(part).to(autoencoder.device)).half().cpu())
    save_file({"latents": torch.cat(out)}, path)
    return torch.cat(out)


@torch.no_grad()
def to_latent(autoencoder, pixels: Tensor) -> Tensor:
    """pixels [N, 3, 64, 64] in [0, 1] -> latents [N, 8, 8, 8] of mean 0 and unit scale"""
    z = autoencoder.encoder((pixels * 2 - 1).to(memory_format=torch.channels_last))
    return ((z - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor).contiguous()


def tell_stories(n: int, latents: Tensor, seed: int) -> Stories:
    """Simulates `n` stories of 147 frames: four fifths have four segments, the rest one."""
    generator = torch.Generator().manual_seed(seed)
    rows, texts, segments = [], [], []
    for i in tqdm(range(n), desc="stories", mininterval=5):
        count = 1 if i % 5 == 0 else 4
        script = world.sample_script(generator, count)
        rows.append(state_row(world.simulate(script, STORY_FRAMES, generator)))
        text = world.embed(world.segments_of(script))
        texts.append(text.expand(4, -1, -1) if count == 1 else text)
        segments.append(count)
    return Stories(latents, torch.stack(rows).int(), torch.stack(texts), torch.tensor(segments))


@dataclass(frozen=True)
class Clip:
    """A training clip: `BLOCKS` blocks from frame `start` on, what came before them, and who may read what."""

    noisy_frames: Tensor  # [B, 12] absolute
    clean_frames: Tensor  # [B, 15] absolute: 6 before the first noisy block, then its blocks but the last
    far_frames: Tensor  # [B, 9] absolute: sink, then two blocks from further back (-1: none)
    noisy: Tensor  # [B, 12, C, H, W] latents
    clean: Tensor  # [B, 15, C, H, W]
    far: Tensor  # [B, 9, C, H, W]
    text: Tensor  # [B, words, text dim] of the segment that rules the noisy blocks
    sink_text: Tensor
    old_text: Tensor  # [B, 2, words, text dim] of the two old blocks

    def to(self, device) -> Clip:
        return Clip(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def sample_clips(stories: Stories, n: int, generator: torch.Generator, start: int | None = None) -> Clip:
    """Draws clips whose noisy blocks lie inside one segment: a quarter begin the video (nothing to go by but the
    words, the hardest case), a quarter lie elsewhere in the first 39 frames, a quarter begin with new words (where the
    past does not say what comes next: what words mean is learned there). `start` fixes the first frame."""
    story = torch.randint(len(stories.rows), (n,), generator=generator)
    borders = torch.tensor([0, *world.SWITCHES, STORY_FRAMES])
    segment = torch.randint(1, 4, (n,), generator=generator)
    early = torch.rand(n, generator=generator)
    segment[early < 0.5] = 0
    room = (borders[segment + 1] - borders[segment] - BLOCKS * BLOCK) // BLOCK + 1
    first = borders[segment] + BLOCK * (torch.rand(n, generator=generator) * room).long()
    first[early < 0.25] = 0
    first[early > 0.75] = borders[segment[early > 0.75]]
    if start is not None:
        first, segment = torch.full_like(first, start), torch.full_like(segment, world.segment_at(start, 4))
    return clip_at(stories, story, segment, first, generator)


def clip_at(
    stories: Stories, story: Tensor, segment: Tensor, first: Tensor, generator: torch.Generator,
    video: Tensor | None = None,
) -> Clip:  # fmt: skip
    """The clips of given stories [B] from frame `first` [B] on. `video` [B, T, C, H, W]: take the frames from there
    instead (the student's own past; frames after T repeat the last one until they are replaced)."""
    n = len(story)
    noisy = first[:, None] + torch.arange(BLOCKS * BLOCK)
    clean = first[:, None] + torch.arange(-PAST, (BLOCKS - 1) * BLOCK)
    far_blocks = ((first - PAST - SINK) // BLOCK).clamp(min=0)  # whole blocks between the sink and the window
    old = (torch.rand(n, 2, generator=generator) * far_blocks[:, None]).long()  # two of them, the same one at times
    old = torch.where(far_blocks[:, None] > 0, SINK + BLOCK * old, -BLOCK)
    old_frames = (old[:, :, None] + torch.arange(BLOCK)).flatten(1)
    old_frames[:, BLOCK:][old[:, 0] == old[:, 1]] = -1  # a block read twice would count twice
    far = torch.cat([torch.arange(SINK).expand(n, -1), old_frames], 1)

    def latents(frames: Tensor) -> Tensor:
        if video is not None:
            return video[torch.arange(n)[:, None], frames.clamp(0, video.shape[1] - 1)]
        return stories.latents[stories.rows[story[:, None], frames.clamp(min=0)].long()].float()

    old_segment = (old[:, :, None] >= torch.tensor(world.SWITCHES)).sum(-1)
    return Clip(
        noisy, clean, far.clamp(min=-1), latents(noisy), latents(clean), latents(far),
        stories.text[story, segment], stories.text[story, 0], stories.text[story[:, None], old_segment],
    )  # fmt: skip


def clip_mask(clip: Clip, generator: torch.Generator, dropout: float) -> Tensor:
    """Who reads whom: [B, 15 clean + 12 noisy queries, 9 far + 15 clean + 12 noisy keys] bool.

    Ordinary: the sink, the 6 frames before the block, the block itself. With probability `dropout` a noisy block
    reads the sink, its nearest 1 or 2 frames and a random choice of the older ones instead: history dropout."""
    queries = torch.cat([clip.clean_frames, clip.noisy_frames], 1)
    start = queries.div(BLOCK, rounding_mode="floor") * BLOCK  # [B, Q] first frame of the block asking
    start = start[:, :, None]
    far, clean, noisy = clip.far_frames[:, None], clip.clean_frames[:, None], clip.noisy_frames[:, None]
    n_clean = clean.shape[2]
    is_noisy = torch.arange(queries.shape[1])[None, :, None] >= n_clean
    b, q = queries.shape

    sink = (torch.arange(far.shape[2]) < SINK) & (start >= SINK)  # [B, Q, 9]
    near = (clean >= SINK) & (clean >= start - PAST) & (clean < start)  # [B, Q, 15]
    past = torch.cat([sink, near], 2)

    known = torch.cat([far, clean], 2)
    usable = (known >= SINK) & (known < start)
    usable[:, :, :SINK] = False  # the sink has places of its own
    blocks = n_clean // BLOCK + BLOCKS
    nearest = torch.randint(1, 3, (b, blocks, 1), generator=generator).repeat_interleave(BLOCK, 1)  # one draw a block
    is_near = usable & (known >= start - nearest)
    chance = torch.rand(b, blocks, known.shape[2], generator=generator).repeat_interleave(BLOCK, 1)
    chance = torch.where(usable & ~is_near, chance, -1.0)
    order = chance.argsort(2, descending=True).argsort(2)
    dropped = is_near | ((order < PAST - nearest) & (chance >= 0))
    dropped[:, :, :SINK] |= sink[:, :, :SINK]
    chosen = (torch.rand(b, blocks, 1, generator=generator) < dropout).repeat_interleave(BLOCK, 1) & is_noisy
    past = torch.where(chosen, dropped, past)

    own_clean = ~is_noisy & (clean.div(BLOCK, rounding_mode="floor") * BLOCK == start)
    own_noisy = is_noisy & (noisy.div(BLOCK, rounding_mode="floor") * BLOCK == start)
    past[:, :, far.shape[2] :] |= own_clean
    return torch.cat([past, own_noisy.expand(b, q, -1)], 2)


@torch.no_grad()
def far_kv(backbone: nn.Module, clip: Clip) -> Tensor:
    """Keys and values of the sink and the two old blocks, each encoded as a rollout would. -> [.., B, 9 * tokens,
    ..]"""
    sink = backbone.encode(clip.far[:, :SINK], 0, clip.sink_text, None)
    parts = [sink]
    for k in range(2):
        here = slice(SINK + k * BLOCK, SINK + (k + 1) * BLOCK)
        written: list[Tensor] = []
        x0 = clip.far[:, here]
        backbone(x0, x0.new_zeros(len(x0)), clip.far_frames[:, here].clamp(min=0), clip.old_text[:, k],
                 sink.flatten(3, 4), written=written)  # fmt: skip
        parts.append(torch.stack(written).unflatten(3, (BLOCK, -1)))
    return torch.cat(parts, 3).flatten(3, 4)


def teacher_forcing(backbone: nn.Module, clip: Clip, x: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
    """Velocity of all noisy blocks of a clip in one forward. x [B, 12, C, H, W], sigma [B, 12] -> like x"""
    frames = torch.cat([clip.clean_frames.clamp(min=0), clip.noisy_frames], 1)
    levels = torch.cat([torch.zeros_like(clip.clean_frames, dtype=sigma.dtype), sigma], 1)
    out = backbone(torch.cat([clip.clean, x], 1), levels, frames, clip.text, far_kv(backbone, clip), mask)
    return out[:, clip.clean.shape[1] :]


def shifted(u: Tensor, shift: float = world.SHIFT) -> Tensor:
    """Uniform numbers to noise levels, as the sampler's schedule is shifted."""
    return shift * u / (1 + (shift - 1) * u)


def noise_levels(*size: int, generator: torch.Generator) -> Tensor:
    """Noise levels to train at: five in six between the sampler's last and first, the rest below. Nearly noise-free
    frames have the largest velocity errors and the least to teach: which sprite, where, is decided above."""
    u = torch.rand(*size, generator=generator)
    low = torch.rand(*size, generator=generator) < 1 / 6
    return shifted(torch.where(low, 0.25 * u, 0.25 + 0.75 * u))


def without_words(text: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Empties a random `share` of the texts [B, words, text dim]."""
    return text * (torch.rand(len(text), 1, 1, generator=generator) >= share)


def first_blocks(stories: Stories, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """First blocks alone: the hardest thing to learn (no past to go by) and the cheapest to show.
    -> latents [n, 3, C, H, W] and words [n, words, text dim] of `n` stories"""
    story = torch.randint(len(stories.rows), (n,), generator=generator)
    return stories.latents[stories.rows[story, :BLOCK].long()].float(), stories.text[story, 0]


def switch_blocks(stories: Stories, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The first blocks under new words, each with the sink and the 6 frames before it: what words change is learned
    here, and in long clips such blocks are rare.
    -> past [n, 9, C, H, W], block [n, 3, C, H, W], words of the sink and of the block [n, words, text dim], frame"""
    several = (stories.segments > 1).nonzero()[:, 0]
    story = several[torch.randint(len(several), (n,), generator=generator)]
    segment = int(torch.randint(1, len(world.SWITCHES) + 1, (), generator=generator))
    start = world.SWITCHES[segment - 1]
    frames = torch.cat([torch.arange(SINK), start + torch.arange(-PAST, BLOCK)])
    latents = stories.latents[stories.rows[story][:, frames].long()].float()
    past, x0 = latents.split([SINK + PAST, BLOCK], 1)
    return past, x0, stories.text[story, 0], stories.text[story, segment], start


def turned_blocks(stories: Stories, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    """Second, third or fourth blocks whose past went any way, while they go the way that the words say. No story shows
    it, but a model's own video does once its first block went wrong: the words win.
    -> past [n, 3 to 9, C, H, W], block [n, 3, C, H, W], words [n, words, text dim], frame"""

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    start = BLOCK * int(torch.randint(1, (SINK + PAST) // BLOCK + 1, (), generator=generator))
    look = [draw(high) for high in (len(world.SHAPES), len(world.RADII), len(world.COLOURS), len(world.BACKGROUNDS))]
    was, will, speed = draw(5), draw(5), torch.tensor(world.SPEEDS)[draw(len(world.SPEEDS))]
    heading = torch.where(torch.arange(start + BLOCK) < start, was[:, None], will[:, None])  # [n, T]
    steps = torch.tensor([*world.DIRECTIONS.values(), (0, 0)])[heading] * speed[:, None, None]  # [n, T, 2]
    place = (2 * torch.stack([draw(32), draw(32)], 1)[:, None] + steps.cumsum(1)) % world.SIZE
    states = torch.cat([torch.stack(look, 1)[:, None].expand(-1, start + BLOCK, -1), place], 2)  # [n, T, 6]
    verbs = [*(f"moves {name}" for name in world.DIRECTIONS), "rests"]
    shapes, colours, named = world.SHAPES, list(world.COLOURS), draw(2)
    words = zip(look[0].tolist(), look[2].tolist(), named.tolist(), will.tolist(), strict=True)
    texts = [" ".join(f"a {colours[c] if name else ''} {shapes[k]} {verbs[way]}".split()) for k, c, name, way in words]
    past, x0 = stories.latents[state_row(states)].float().split([start, BLOCK], 1)
    return past, x0, world.embed(texts), start


def encode_past(backbone: WanBackbone, past: Tensor, sink_text: Tensor, text: Tensor, start: int) -> Tensor:
    """Keys and values of the frames of `past`, the last of which lies before `start`: the sink under its words, the
    rest under the new ones, as after a prompt switch. -> [layers, 2, B, frames * tokens, heads, D]"""
    kv = backbone.encode(past[:, :SINK], 0, sink_text, None).flatten(3, 4)
    for begin in range(SINK, past.shape[1], BLOCK):
        here = start - past.shape[1] + begin
        kv = torch.cat([kv, backbone.encode(past[:, begin : begin + BLOCK], here, text, kv).flatten(3, 4)], 3)
    return kv


def block_loss(backbone, x0: Tensor, text: Tensor, generator: torch.Generator, start: int = 0, kv=None) -> Tensor:
    """Flow matching of single blocks x0 [B, 3, C, H, W] that begin at frame `start` and read `kv`."""
    sigma = noise_levels(len(x0), generator=generator).to(x0)
    noise = torch.randn(x0.shape, generator=generator).to(x0)  # drawn on the CPU: the same on every device
    s = sigma[:, None, None, None, None]
    v = backbone.velocity((1 - s) * x0 + s * noise, sigma, start, text, kv)
    return (v - (noise - x0)).square().mean()


def new_transformer():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=48, in_channels=LATENT[0],
        out_channels=LATENT[0], text_dim=world.TEXT_DIM, freq_dim=128, ffn_dim=432, num_layers=6, rope_max_seq_len=2048,
    )  # fmt: skip


def flow_matching_loss(backbone, clip: Clip, generator: torch.Generator, mask: Tensor) -> Tensor:
    """Mean squared error of the velocity noise - x0 of the clip's noisy blocks, one noise level a block."""
    levels = noise_levels(len(clip.noisy), BLOCKS, generator=generator)
    sigma = levels.repeat_interleave(BLOCK, 1)  # [B, 12]
    noise, sigma = torch.randn(clip.noisy.shape, generator=generator).to(clip.noisy), sigma.to(clip.noisy)
    s = sigma[:, :, None, None, None]
    x = (1 - s) * clip.noisy + s * noise
    v = teacher_forcing(backbone, clip, x, sigma, mask)
    return (v - (noise - clip.noisy)).square().mean()


# ------------------------------------------------------------------------------------------------------------- teacher


@torch.no_grad()
def ema_update(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, weight by weight."""
    for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def average_gradients(model: nn.Module) -> None:
    """Under torchrun: the mean over processes of every gradient, in one all-reduce. Alone: nothing."""
    if dist.is_initialized():
        gradients = [weight.grad for weight in model.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g) / dist.get_world_size())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def train_teacher(config: DistillConfig, stories: Stories) -> WanBackbone:
    """Trains the many-step causal teacher by flow matching and saves its moving average under `output_dir/teacher`."""
    torch.manual_seed(config.seed + 1)
    generator = torch.Generator().manual_seed(config.seed + 1 + 1000 * rank())
    model = WanBackbone(new_transformer()).to(config.device)
    ema = copy.deepcopy(model)
    matrices = [p for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon, adamw = Muon(matrices, config.teacher_learning_rate), torch.optim.AdamW(others, betas=(0.9, 0.95))

    def step(i: int) -> float:
        rate = config.teacher_learning_rate * warm_cosine(i, config.teacher_steps, 30)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = rate, rate / 5
        clip = sample_clips(stories, config.teacher_batch, generator)
        clip = replace(clip, text=without_words(clip.text, config.text_dropout, generator))
        mask = clip_mask(clip, generator, config.history_dropout).to(config.device)
        loss = flow_matching_loss(model, clip.to(config.device), generator, mask)
        x0, text = first_blocks(stories, config.first_blocks, generator)
        text = without_words(text, config.text_dropout, generator)
        loss = loss + block_loss(model, x0.to(config.device), text.to(config.device), generator)
        *parts, start = switch_blocks(stories, config.switch_blocks, generator)
        parts[3] = without_words(parts[3], config.text_dropout, generator)
        past, x0, sink_text, text = (part.to(config.device) for part in parts)
        kv = encode_past(model, past, sink_text, text, start)
        loss = loss + block_loss(model, x0, text, generator, start, kv)
        *parts, start = turned_blocks(stories, config.turned_blocks, generator)
        past, x0, text = (part.to(config.device) for part in parts)
        text = without_words(text, config.text_dropout, generator)
        kv = encode_past(model, past, text, text, start)
        loss = loss + block_loss(model, x0, text, generator, start, kv)
        model.zero_grad()
        loss.backward()
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        ema_update(ema, model, min(0.995, (1 + i) / (10 + i)))
        return loss.item()

    folder = Path(config.output_dir) / "teacher"
    loop(folder, config.teacher_steps, {"model": model, "ema": ema}, {"muon": muon, "adamw": adamw}, generator, step,
         config.checkpointing_steps)  # fmt: skip
    if rank() == 0:
        ema.transformer.save_pretrained(folder)
    return ema


# ------------------------------------------------------------------------------------------------------------- student


def student_rollout(
    student: WanBackbone, clip: Clip, mask: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The student's own blocks from a clip's start on, 4 steps each, reading what `mask` (from `clip_mask`) allows.

    One random step a rollout carries gradient (Self-Forcing's exit step); the context is what the last step gave,
    detached.
    -> x0 at that step, with gradient, and final x0; both [B, 12, C, H, W]"""
    sigmas, n_far = schedule(shift=world.SHIFT).to(clip.far), clip.far.shape[1]
    n_clean = clip.clean.shape[1]
    exit_step = int(torch.randint(len(sigmas), (), generator=generator))
    kv, live, final = far_kv(student, clip), [], []

    def encode(x0: Tensor, i: int, kv: Tensor) -> Tensor:  # clean block i of the clip
        rows, seen = slice(i * BLOCK, (i + 1) * BLOCK), n_far + i * BLOCK
        written: list[Tensor] = []
        with torch.no_grad():
            student(x0, x0.new_zeros(len(x0)), clip.clean_frames[:, rows].clamp(min=0), clip.text, kv,
                    mask[:, rows, : seen + BLOCK], written)  # fmt: skip
        return torch.cat([kv, torch.stack(written)], 3)

    for i in range(PAST // BLOCK):
        kv = encode(clip.clean[:, i * BLOCK : (i + 1) * BLOCK], i, kv)
    for j in range(BLOCKS):
        rows = slice(n_clean + j * BLOCK, n_clean + (j + 1) * BLOCK)
        seen = n_far + PAST + j * BLOCK
        may_read = torch.cat([mask[:, rows, :seen], mask.new_ones(len(mask), BLOCK, BLOCK)], 2)
        frames = clip.noisy_frames[:, j * BLOCK : (j + 1) * BLOCK]
        x = torch.randn(clip.noisy[:, :BLOCK].shape, generator=generator).to(clip.noisy)
        for s, sigma in enumerate(sigmas):
            with torch.set_grad_enabled(s == exit_step):
                x0 = x - sigma * student(x, sigma.expand(len(x)), frames, clip.text, kv, may_read)
            if s == exit_step:
                live.append(x0)
                x0 = x0.detach()
            if s + 1 < len(sigmas):
                renoise = torch.randn(x.shape, generator=generator).to(x)
                x = (1 - sigmas[s + 1]) * x0 + sigmas[s + 1] * renoise
        final.append(x0)
        if j + 1 < BLOCKS:
            kv = encode(x0, PAST // BLOCK + j, kv)
    return torch.cat(live, 1), torch.cat(final, 1)


def guided(velocity: Callable[[Tensor], Tensor], text: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): velocity(no words) + guidance * (velocity(text) - velocity(no
    words)). 1 is no guidance."""
    mute = velocity(torch.zeros_like(text))
    return mute + guidance * (velocity(text) - mute)


def dmd_loss(x0: Tensor, real: Callable, fake: Callable, generator: torch.Generator) -> Tensor:
    """Distribution matching (arXiv 2311.18828, eq. 7): the gradient with respect to x0 is fake - real, both denoised
    estimates at a random noise level, divided by the mean distance to the real one.
    x0 [B, F, C, H, W]; `real`, `fake`: (noisy [B, F, ...], sigma [B, F]) -> velocity -> ()"""
    levels = shifted(0.02 + 0.96 * torch.rand(len(x0), x0.shape[1] // BLOCK, generator=generator))
    levels = levels.repeat_interleave(BLOCK, 1).to(x0)
    s = levels[:, :, None, None, None]
    with torch.no_grad():
        x = (1 - s) * x0 + s * torch.randn(x0.shape, generator=generator).to(x0)
        towards = x - s * real(x, levels)
        gradient = (x - s * fake(x, levels)) - towards
        gradient = gradient / (x0 - towards).abs().mean((1, 2, 3, 4), keepdim=True)
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def train_student(
    config: DistillConfig, stories: Stories, teacher: WanBackbone, initial: WanBackbone | None = None
) -> WanBackbone:
    """Distils the 4-step student from the teacher and saves its moving average under `output_dir/student`.
    `initial`: what student and fake score begin as, an earlier student perhaps; default the teacher."""
    torch.manual_seed(config.seed + 2)
    generator = torch.Generator().manual_seed(config.seed + 2 + 1000 * rank())
    student, fake, ema = (copy.deepcopy(initial or teacher).to(config.device).requires_grad_(True) for _ in range(3))
    teacher.requires_grad_(False)
    ema.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), config.student_learning_rate, betas=(0.0, 0.99))
    fake_optimizer = torch.optim.AdamW(fake.parameters(), config.fake_learning_rate, betas=(0.0, 0.99))

    def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def one_clip(clip: Clip, learn: bool) -> Tensor:
        """Rolls the student out over a clip and updates both scores; -> its blocks [B, 12, C, H, W]."""
        mask = clip_mask(clip, generator, config.history_dropout).to(config.device)
        clip = clip.to(config.device)
        live, final = student_rollout(student, clip, mask, generator)
        own = torch.cat([clip.clean[:, :PAST], final[:, :-BLOCK]], 1)  # the student's past, where the clip's was
        clip = replace(clip, clean=own, noisy=live.detach())
        if learn:

            def real(x: Tensor, sigma: Tensor) -> Tensor:
                return guided(lambda text: teacher_forcing(teacher, replace(clip, text=text), x, sigma, mask),
                              clip.text, config.guidance)  # fmt: skip

            loss = dmd_loss(live, real, lambda x, sigma: teacher_forcing(fake, clip, x, sigma, mask), generator)
            update(student, optimizer, loss)
            ema_update(ema, student, config.ema_decay)
        for _ in range(config.fake_updates):
            losses.append(flow_matching_loss(fake, clip, generator, mask))
            update(fake, fake_optimizer, losses[-1])
        return final

    def one_start(learn: bool) -> None:
        """The same for many first blocks at once, the student's hardest."""
        x0, text = (part.to(config.device) for part in first_blocks(stories, config.student_first_blocks, generator))
        sigmas = schedule(shift=world.SHIFT).to(x0)
        noise = torch.randn(len(x0), len(sigmas), *x0.shape[1:], generator=generator).to(x0)
        exit_step = int(torch.randint(len(sigmas), (), generator=generator))
        sigma = sigmas[exit_step].expand(len(x0))
        with torch.no_grad():
            _, z, _ = denoise(student, noise, sigmas, 0, text, None)
        live = z[:, exit_step] - sigmas[exit_step] * student.velocity(z[:, exit_step], sigma, 0, text, None)
        if learn:

            def real(x: Tensor, sigma: Tensor) -> Tensor:
                return guided(lambda text: teacher.velocity(x, sigma[:, 0], 0, text, None), text, config.guidance)

            loss = dmd_loss(live, real, lambda x, sigma: fake.velocity(x, sigma[:, 0], 0, text, None), generator)
            update(student, optimizer, loss)
            ema_update(ema, student, config.ema_decay)
        for _ in range(config.fake_updates):
            losses.append(block_loss(fake, live.detach(), text, generator))
            update(fake, fake_optimizer, losses[-1])

    losses: list[Tensor] = []

    def step(i: int) -> float:
        losses.clear()
        learn = i >= 4  # first the fake score learns what the student makes
        n = config.student_batch
        story, zeros = torch.randint(len(stories.rows), (n,), generator=generator), torch.zeros(n, dtype=torch.long)
        video = torch.zeros(n, 1, *LATENT)
        for start in range(0, world.SWITCHES[0] - BLOCKS * BLOCK, BLOCKS * BLOCK):  # three clips on its own past
            clip = clip_at(stories, story, zeros, zeros + start, generator, video)
            final = one_clip(clip, learn).cpu()
            video = torch.cat([video, final], 1) if start else final
        one_clip(sample_clips(stories, n, generator), learn)  # and one on the past of a story, anywhere
        one_start(learn)
        return torch.stack(losses).mean().item()

    folder = Path(config.output_dir) / "student"
    loop(folder, config.student_steps, {"student": student, "fake": fake, "ema": ema},
         {"optimizer": optimizer, "fake_optimizer": fake_optimizer}, generator, step,
         min(10, config.checkpointing_steps))  # fmt: skip
    if rank() == 0:
        ema.transformer.save_pretrained(folder)
    return ema


# ----------------------------------------------------------------------------------------------------------------- all


def distill(config: DistillConfig) -> Path:
    """Runs the three stages, each from its last checkpoint, and writes the weights in fp16 to `output_dir/weights`, the
    folder that `load_pocket(folder=...)` reads. Under torchrun the stages run on all processes, one thread each."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        train_autoencoder(config)
    if dist.is_initialized():
        dist.barrier()
    from diffusers import AutoencoderTiny, WanTransformer3DModel

    autoencoder = AutoencoderTiny.from_pretrained(folder / "autoencoder").to(memory_format=torch.channels_last).eval()
    if rank() == 0:
        encode_world(autoencoder, folder / "latents.safetensors")
    if dist.is_initialized():
        dist.barrier()
    stories = tell_stories(config.stories, encode_world(autoencoder, folder / "latents.safetensors"), config.seed + 1)
    train_student(config, stories, train_teacher(config, stories))
    if rank() == 0:
        transformers = {name: WanTransformer3DModel.from_pretrained(folder / name) for name in ("teacher", "student")}
        for name, part in ({"autoencoder": autoencoder} | transformers).items():
            part.register_to_config(_name_or_path=name)  # not the path of the machine that made it
            part.half().save_pretrained(folder / "weights" / name)
    return folder / "weights"
