"""Makes the pocket model from nothing: autoencoder -> many-step teacher -> 4-step student distilled on its own
rollouts.

1. `train_autoencoder`: diffusers `AutoencoderTiny`, 64x64 RGB -> latents [8, 8, 8], trained on clean frames of the
   world.
2. `train_teacher`: flow matching by teacher forcing (a clip is encoded block by block, and noisy blocks are denoised
   against what was encoded before them), with more of the kinds of block that are rare in clips: the first of a video,
   the first under new words, and one whose past goes another way than the words say.
3. `train_student`: distribution matching (DMD) on the student's own rollouts: real score = teacher, guided by the
   words; fake score = a copy that is trained on the student's samples (Self-Forcing, arXiv 2506.08009; DMD2, arXiv
   2405.14867).

History dropout, in the teacher's clips and in the student's rollouts: in a part of the blocks the visible past is the
sink, the nearest frame or two, and a random choice of older frames. A routed history (CHR) is then one the model has
met.

Every stage is resumable: its folder holds weights, optimizers, step and random state, written aside and renamed.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from kvpo_min.chr import Window, branch_frames, chunk_starts, ordinary_frames, pool, uniform_routes
from kvpo_min.config import SEEDS, knob, settle
from kvpo_min.pocket import world
from kvpo_min.rollout import denoise
from kvpo_min.system import load_tensors, processes, read_text, sum_gradients, write_json, writing
from kvpo_min.tve import schedule
from kvpo_min.wan import WanBackbone

LATENT = (8, 8, 8)  # channels, height, width


@dataclass
class DistillConfig:
    """Sizes and rates, the recipe found while the weights that ship were made. How they were: docs/LOG.md."""

    output_dir: str = knob("pocket", "holds autoencoder/, teacher/, student/")
    seed: int = knob(0, **SEEDS)
    device: str = "cpu"
    autoencoder_steps: int = knob(3200, least=1)
    autoencoder_batch: int = knob(16, "frames a process", least=1)
    autoencoder_learning_rate: float = knob(3e-3, above=0)
    teacher_steps: int = knob(2650, least=1)
    teacher_learning_rate: float = knob(2e-2, "of the matrices (Muon); all else, by AdamW, a fifth", above=0)
    teacher_batch: int = knob(3, "clips a process", least=1)
    first_blocks: int = knob(48, "first blocks a process, besides the clips", least=1)
    first_weight: float = knob(1.0, "of their loss", above=0)
    text_dropout: float = knob(0.1, "share of clips without words, for the student's guidance", least=0, most=1)
    student_steps: int = knob(24, "a batch of rollouts and one of first blocks each", least=1)
    student_learning_rate: float = knob(1e-4, above=0)
    fake_learning_rate: float = knob(2e-4, above=0)
    fake_updates: int = knob(2, "of the fake score, for one of the student", least=1)
    student_batch: int = knob(4, "rollouts a process", least=1)
    student_first_blocks: int = knob(48, "first blocks a process, besides", least=1)
    guidance: float = knob(2.0, "by the words, of the teacher that leads the student; 1: none", above=0)
    ema_decay: float = knob(0.9, "of the student", least=0, below=1)
    stories: int = knob(6000, "of one segment; a third as many have four", least=1)
    checkpointing_steps: int = knob(100, least=1)

    def __post_init__(self):
        settle(self)
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
    rank, _ = processes()
    path, done = folder / f"training_state{rank or ''}.pt", 0
    if path.exists():
        try:
            state = load_tensors(path)
            for name, part in (modules | optimizers).items():
                part.load_state_dict(state[name])
            generator.set_state(state["generator"])
            torch.set_rng_state(state["rng"])
            done = state["step"]
        except Exception as error:  # a damaged file can raise nearly anything
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is damaged ({reason}): delete {folder}, and its stage begins anew") from None
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(done, total), initial=done, total=total, desc=folder.name, mininterval=10, disable=rank > 0)
    mean = None
    for i in bar:
        loss = step(i)
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        bar.set_postfix_str(f"{mean:.4f}", refresh=False)
        if (i + 1) % every == 0 or i + 1 == total:
            state = {name: part.state_dict() for name, part in (modules | optimizers).items()}
            state |= {"generator": generator.get_state(), "rng": torch.get_rng_state(), "step": i + 1}
            content = io.BytesIO()  # torch.save to a file does not say when the disk is full
            torch.save(state, content)
            with writing(path.with_suffix(".aside")) as aside:
                aside.write_bytes(content.getbuffer())
            os.replace(aside, path)


def descend(model: nn.Module, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step along the mean gradient of all processes, clipped to a norm of 1. Gradients that are there count too."""
    loss.backward()
    sum_gradients(list(model.parameters()))
    for weight in model.parameters():
        if weight.grad is not None:
            weight.grad /= processes()[1]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


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
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=LATENT[0],
        num_encoder_blocks=(0, 1, 1, 2), num_decoder_blocks=(2, 1, 1, 0),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def random_states(n: int, generator: torch.Generator) -> Tensor:
    """Uniform clean states [n, 6]."""
    looks = [len(part) for part in (world.SHAPES, world.RADII, world.COLOURS, world.SCENES)]
    states = (torch.rand(n, 6, generator=generator) * torch.tensor([*looks, *[world.PLACES] * 2])).long()
    states[:, 4:] *= world.GRID
    return states


def faster() -> torch.autocast:
    """bfloat16 for the autoencoder's convolutions where the processor has units for it: three times as fast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported())


def train_autoencoder(config: DistillConfig) -> nn.Module:
    """Trains the autoencoder on clean frames and saves it in diffusers layout under `output_dir/autoencoder`. Pixels of
    the hero count eightfold: they are a twentieth of the picture, and what the stories are about."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed + 1000 * processes()[0])
    model = new_autoencoder().to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), config.autoencoder_learning_rate, betas=(0.9, 0.99))

    def step(i: int) -> float:
        factor = warm_cosine(i, config.autoencoder_steps, 100)
        optimizer.param_groups[0]["lr"] = config.autoencoder_learning_rate * factor
        states = random_states(config.autoencoder_batch, generator)
        frames, behind = world.render(states), world.scenes()[states[:, 3]]
        weight = 1 + 7 * ((frames - behind).abs().amax(1, keepdim=True) > 0.02).float().to(config.device)
        x = frames.to(config.device, memory_format=torch.channels_last) * 2 - 1
        with faster():
            z = model.encoder(x)
            # noise on the latents: the decoder must forgive the small errors of a generator
            error = (model.decoder(z + 0.05 * torch.randn_like(z)) - x).float()
        z = z.float()
        loss = (weight * (error.square() + 0.5 * error.abs())).mean() + 1e-3 * (z.square() - 1).clamp(min=0).mean()
        descend(model, loss, optimizer)
        return error.square().mean().item()

    folder = Path(config.output_dir) / "autoencoder"
    loop(folder, config.autoencoder_steps, {"model": model}, {"optimizer": optimizer}, generator, step,
         config.checkpointing_steps)  # fmt: skip
    model.eval()
    with torch.no_grad():  # latents of unit scale, so that sigma means the same everywhere
        states = random_states(512, torch.Generator().manual_seed(config.seed))
        z = model.encoder(world.render(states).to(config.device) * 2 - 1)
    model.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    if processes()[0] == 0:
        model.save_pretrained(folder)
    return model


# --------------------------------------------------------------------------------------------------------------- clips

WINDOW = Window()
BLOCK, SINK, PAST = WINDOW.block, WINDOW.sink, WINDOW.past
SHORT, LONG = world.SWITCHES[0], 147  # frames of stories of one and of four segments
BEFORE = 21  # frames before a later chunk that a clip shows: as far back as its routes reach


@dataclass(frozen=True)
class Stories:
    """Training stories: latents of every clean frame there is, and for each story its frames and words."""

    latents: Tensor  # [18432, 8, 8, 8] fp16, one row a state of the world
    short: Tensor  # [N, 39] int32, row of each frame
    short_text: Tensor  # [N, 1, words, text dim]
    short_settles: Tensor  # [N, 1] bool
    motion: Tensor  # [N] motion that the words of a short story name, or OPEN
    long: Tensor  # [M, 147]
    long_text: Tensor  # [M, 4, words, text dim]
    long_settles: Tensor  # [M, 4] bool: does the segment settle?


def state_row(states: Tensor) -> Tensor:
    """states [..., 6] -> row of the table of all clean frames [...]"""
    shape, size, colour, scene, y, x = states.unbind(-1)
    places, grid = world.PLACES, world.GRID
    look = ((shape * len(world.RADII) + size) * len(world.COLOURS) + colour) * len(world.SCENES) + scene
    return (look * places + y // grid) * places + x // grid


def scene_of(rows: Tensor) -> Tensor:
    """The scene that rows of that table show."""
    return rows // world.PLACES**2 % len(world.SCENES)


def in_scene(rows: Tensor, scene: Tensor) -> Tensor:
    """Rows of the same heroes at the same places, in another scene."""
    return rows + (scene - scene_of(rows)) * world.PLACES**2


def encode_world(autoencoder, path: Path) -> Tensor:
    """Latents of all 18432 clean frames, kept in `path` under the digest of the autoencoder that made them.
    -> [18432, 8, 8, 8] fp16, unit scale"""
    from safetensors import safe_open
    from safetensors.torch import save_file

    digest = hashlib.sha256()
    for name, weight in autoencoder.state_dict().items():
        digest.update(name.encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
    made_by = {"autoencoder": digest.hexdigest()}
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata() == made_by:
                return file.get_tensor("latents")
    sizes = [len(world.SHAPES), len(world.RADII), len(world.COLOURS), len(world.SCENES), world.PLACES, world.PLACES]
    states = torch.cartesian_prod(*map(torch.arange, sizes))  # in the order of `state_row`
    states[:, 4:] *= world.GRID
    out = []
    for part in tqdm(states.split(256), desc="every clean frame", mininterval=5):
        out.append(to_latent(autoencoder, world.render(part).to(autoencoder.device)).half().cpu())
    save_file({"latents": torch.cat(out)}, path.with_suffix(".aside"), made_by)
    os.replace(path.with_suffix(".aside"), path)
    return torch.cat(out)


@torch.no_grad()
def to_latent(autoencoder, pixels: Tensor) -> Tensor:
    """pixels [N, 3, 64, 64] in [0, 1] -> latents [N, 8, 8, 8] of mean 0 and unit scale"""
    z = autoencoder.encoder((pixels * 2 - 1).to(memory_format=torch.channels_last))
    return ((z - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor).contiguous()


def tell_stories(n: int, latents: Tensor, seed: int) -> Stories:
    """Simulates `n` stories of one segment and n // 3 of four."""
    generator = torch.Generator().manual_seed(seed)
    told = {}
    for name, count, n_segments, n_frames in (("short", n, 1, SHORT), ("long", -(-n // 3), 4, LONG)):
        scripts = [world.sample_script(generator, n_segments) for _ in range(count)]
        bar = tqdm(scripts, desc=f"{name} stories", mininterval=5)
        told[name] = torch.stack([state_row(world.simulate(script, n_frames, generator)) for script in bar]).int()
        told[f"{name}_text"] = torch.stack([world.embed(world.segments_of(script)) for script in scripts])
        settles = [[segment.settles for segment in world.parse(script)] for script in scripts]
        told[f"{name}_settles"] = torch.tensor(settles)
        if name == "short":
            told["motion"] = torch.stack([world.expected(script, 1)["motion"][0] for script in scripts])
    return Stories(latents, **told)


@dataclass(frozen=True)
class Query:
    """One block of every clip of a batch, to be predicted."""

    block: int  # which of the clip's blocks
    reads: Tensor  # [B, L] what it reads, as places in the clip
    x0: Tensor  # [B, 3, C, H, W] latents that are right
    weight: Tensor  # [B] 0 where no block would be right


@dataclass(frozen=True)
class Clip:
    """A batch of clips: blocks of stories in order, each with what it reads. A clip begins with the sink."""

    starts: list[int]  # absolute first frames of the blocks
    x0: Tensor  # [B, n, 3, C, H, W] latents
    text: Tensor  # [B, n, words, text dim] of each block
    reads: list[Tensor]  # [B, L] for each block, as places in the clip: 3 * block + frame of the block
    queries: list[Query]  # blocks to predict: the clip's own, and more of those that decide something


def sample_clip(stories: Stories, n: int, generator: torch.Generator, more: int = 4, chunk: int | None = None) -> Clip:
    """Draws a batch of `n` clips of one form: a whole short story, or the sink, the frames before a later chunk and
    the chunk (`chunk`: its first frame; 0: short). Half of the clips are routed as CHR does it, and a hero that settles
    does so where it remembers from what its route shows. `more` further queries ask for the event's block under routes
    of their own, one for every block at which a traveller moves on, and one for the second, at which it does not."""

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    def chance(p: float, *size: int) -> Tensor:
        return torch.rand(size, generator=generator) < p

    if chunk is None:
        later = [*world.SWITCHES, *chunk_starts(LONG)[2:]]  # those at a switch of words twice
        chunk = 0 if chance(0.65) else later[int(draw(len(later)))]
    if chunk:
        story, segment = draw(len(stories.long), n), world.segment_at(chunk, 4)
        before = world.segment_at(chunk - 1, 4)
        starts = [0, *range(chunk - BEFORE, chunk + 18, BLOCK)]
        old = [start for start in starts if 0 < start < chunk - (SINK + PAST + BLOCK)]  # not encoded again at a switch
        which = [0, *[before] * len(old), *[segment] * (len(starts) - 1 - len(old))]
        rows, text = stories.long[story].long(), stories.long_text[story][:, which]  # [B, 147], [B, n, words, dim]
        event, settles = chunk + world.EVENT_AFTER, stories.long_settles[story, segment] & (chunk in world.SWITCHES)
        last, begins = chunk + 18, chunk
    else:
        story = draw(len(stories.short), n)
        starts = list(range(0, SHORT, BLOCK))
        rows = stories.short[story].long()
        text = stories.short_text[story].expand(-1, len(starts), -1, -1)
        event, settles = world.EVENT, stories.short_settles[story, 0]
        last, begins = SHORT, world.EVENT - world.EVENT_AFTER
    nearest = (1, 2, 2, 2, 3)[int(draw(5))]
    forks = [begins, begins + BLOCK]

    def routes(fork: int) -> Tensor:  # [B, past - nearest]
        return uniform_routes(pool(fork, WINDOW, nearest, 5), PAST - nearest, n, generator)

    def settled(reads: Tensor, rows: Tensor) -> Tensor:  # [B, T]: where the story goes from the event on
        scene = world.remembered(scene_of(rows[:, :event]), reads)
        moves = settles[:, None] & (torch.arange(rows.shape[1]) >= event)
        return torch.where(moves, in_scene(rows, scene[:, None].expand(rows.shape)), rows)

    # what every block reads: absolute frames, of which a clip lacks some behind the sink at its beginning
    fork = forks[int(draw(2))]
    route, routed = routes(fork), chance(0.5, n)
    absolute = []
    for i, start in enumerate(starts):
        ordinary = [*range(SINK if i else 0), *range(starts[1] if i else 0, start)]
        ordinary = torch.tensor([*ordinary[:SINK], *ordinary[SINK:][-PAST:]]).long().expand(n, -1)
        if fork <= start < fork + 5 * BLOCK:
            ordinary = torch.where(routed[:, None], branch_frames(route, start, WINDOW, nearest), ordinary)
        absolute.append(ordinary)
    rows = settled(absolute[starts.index(event)], rows)
    weight = torch.ones(n, len(starts))
    if not chunk:  # the past went another way than the words say, as a model's own video does at times: the words win
        rows, wrong = turned(rows, stories.motion[story], chance(0.3, n), BLOCK * (1 + draw(3, n)), draw(5, n))
        weight = (~wrong[:, ::BLOCK]).float()

    def place(frames: Tensor) -> Tensor:  # absolute frames -> places in the clip
        return torch.where(frames < SINK, frames, frames - starts[1] + SINK)

    def latents(rows: Tensor) -> Tensor:
        return stories.latents[rows].float()

    def block(rows: Tensor, start: int) -> Tensor:
        return latents(rows[:, start : start + BLOCK])

    x0 = torch.stack([block(rows, start) for start in starts], 1)
    reads = [place(frames) for frames in absolute]
    own = range(starts.index(chunk) if chunk else 1, len(starts))  # of a later chunk only its own blocks
    queries = [Query(i, reads[i], x0[:, i], weight[:, i]) for i in own]
    i = starts.index(event)
    for k in range(more):
        shown = branch_frames(routes(forks[k % 2]), event, WINDOW, nearest) if k or more == 1 else ordinary_frames(
            event, WINDOW).expand(n, -1)  # fmt: skip
        queries.append(Query(i, place(shown), block(settled(shown, rows), event), weight[:, i]))
    for i in own:
        if more and (starts[i] % world.BEAT == 0 or starts[i] == BLOCK):
            queries.append(Query(i, reads[i], x0[:, i], weight[:, i]))
    assert last == starts[-1] + BLOCK
    return Clip(starts, x0, text, reads, queries)


def turned(rows: Tensor, motion: Tensor, chosen: Tensor, until: Tensor, heading: Tensor) -> tuple[Tensor, Tensor]:
    """Stories whose hero first goes another way than its words say: up to frame `until` [B] the `chosen` ones [B] move
    by `heading` [B], if their words name a `motion` [B]. rows [B, T] -> the changed rows, and which frames [B, T] are
    not as the words say"""
    steps = torch.tensor([*world.DIRECTIONS.values(), (0, 0)])[heading]  # [B, 2]
    ahead = (until[:, None] - 1 - torch.arange(rows.shape[1])).clamp(min=0)  # [B, T]
    wrong = (ahead > 0) & (chosen & (motion != world.OPEN) & (motion != heading))[:, None]
    meets = rows.gather(1, until[:, None] - 1)  # [B, 1] where it is when it turns
    y = (meets // world.PLACES - ahead * steps[:, :1]) % world.PLACES
    x = (meets - ahead * steps[:, 1:]) % world.PLACES
    moved = rows // world.PLACES**2 * world.PLACES**2 + y * world.PLACES + x
    wrong_block = wrong | (torch.arange(rows.shape[1]) < until[:, None]) & wrong.any(1, keepdim=True)
    return torch.where(wrong, moved, rows), wrong_block


# -------------------------------------------------------------------------------------------------- clips and the model


def gather(frames: Tensor, places: Tensor) -> Tensor | None:
    """frames [B, n, layers, 2, tokens, heads, D], places [B, L] -> [layers, 2, B, L * tokens, heads, D]"""
    b, n = frames.shape[:2]
    if not places.shape[1]:
        return None
    flat = (torch.arange(b)[:, None] * n + places).flatten().to(frames.device)
    read = frames.flatten(0, 1).index_select(0, flat).unflatten(0, places.shape)
    return read.permute(2, 3, 0, 1, 4, 5, 6).flatten(3, 4)


def encode(model: WanBackbone, x0: Tensor, start: int, text: Tensor, kv: Tensor | None) -> Tensor:
    """`WanBackbone.encode`, with gradient. -> [B, 3, layers, 2, tokens, heads, D]"""
    written: list[Tensor] = []
    model(x0, x0.new_zeros(len(x0)), torch.arange(start, start + BLOCK), text, kv, written=written)
    return torch.stack(written).unflatten(3, (BLOCK, -1)).permute(2, 3, 0, 1, 4, 5, 6)


def encode_clip(model: WanBackbone, clip: Clip, x0: Tensor) -> Tensor:
    """Keys and values of all frames of a clip, block by block as a rollout makes them. -> [B, frames, layers, ...]"""
    frames = None
    for i, start in enumerate(clip.starts):
        kv = gather(frames, clip.reads[i]) if i else None
        own = encode(model, x0[:, i], start, clip.text[:, i], kv)
        frames = torch.cat([frames, own], 1) if i else own
    return frames


def velocities(model: WanBackbone, clip: Clip, frames: Tensor, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Velocities of the clip's queries, all that read as many frames in one batch.
    x [Q, B, 3, C, H, W], sigma [Q, B], text [B, n, words, dim] -> like x"""
    out: list[Tensor] = [None] * len(clip.queries)
    b = x.shape[1]
    for length in sorted({q.reads.shape[1] for q in clip.queries}):
        chosen = [k for k, q in enumerate(clip.queries) if q.reads.shape[1] == length]
        kv = None
        if length:
            kv = torch.cat([gather(frames, clip.queries[k].reads) for k in chosen], 2)
        start = torch.tensor([clip.starts[clip.queries[k].block] for k in chosen]).repeat_interleave(b)
        words = torch.cat([text[:, clip.queries[k].block] for k in chosen])
        v = model.velocity(x[chosen].flatten(0, 1), sigma[chosen].flatten(), start, words, kv)
        for k, part in zip(chosen, v.split(b), strict=True):
            out[k] = part
    return torch.stack(out)


def shifted(u: Tensor) -> Tensor:
    """Uniform numbers to noise levels, as the sampler's schedule is shifted."""
    return world.SHIFT * u / (1 + (world.SHIFT - 1) * u)


def noise_levels(*size: int, generator: torch.Generator) -> Tensor:
    """Noise levels to train at: five in six between the sampler's last and first, the rest below. Nearly noise-free
    frames have the largest velocity errors and the least to teach: which hero, where, is decided above."""
    u = torch.rand(*size, generator=generator)
    low = torch.rand(*size, generator=generator) < 1 / 6
    return shifted(torch.where(low, 0.25 * u, 0.25 + 0.75 * u))


def deciding_levels(*size: int, generator: torch.Generator) -> Tensor:
    """Noise levels for blocks at which something is decided: three in five at .9 to 1."""
    high = torch.rand(*size, generator=generator) < 0.6
    u = 0.9 + 0.1 * torch.rand(*size, generator=generator)
    return torch.where(high, u, noise_levels(*size, generator=generator))


def flow_matching_loss(model, clip: Clip, frames: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity noise - x0 of a clip's queries, one noise level each."""
    x0 = torch.stack([q.x0 for q in clip.queries])  # [Q, B, 3, C, H, W]
    weight = torch.stack([q.weight for q in clip.queries])  # [Q, B]
    seen, levels = set(), []
    for q in clip.queries:  # the second query of a block is one that decides
        draw = deciding_levels if q.block in seen else noise_levels
        levels.append(draw(x0.shape[1], generator=generator))
        seen.add(q.block)
    sigma = torch.stack(levels).to(x0)
    noise = torch.randn(x0.shape, generator=generator).to(x0)  # drawn on the CPU: the same on every device
    s = sigma[..., None, None, None, None]
    v = velocities(model, clip, frames, (1 - s) * x0 + s * noise, sigma, clip.text)
    error = (v - (noise - x0)).square().mean((2, 3, 4, 5))
    return (error * weight).sum() / weight.sum()


def without_words(text: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Empties a random `share` of the texts [B, ...]."""
    keep = torch.rand(len(text), generator=generator) >= share
    return text * keep.view(-1, *[1] * (text.ndim - 1))


def first_blocks(stories: Stories, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """First blocks alone: the hardest thing to learn (no past to go by) and the cheapest to show.
    -> latents [n, 3, C, H, W] and words [n, words, text dim] of `n` stories"""
    story = torch.randint(len(stories.short), (n,), generator=generator)
    return stories.latents[stories.short[story, :BLOCK].long()].float(), stories.short_text[story, 0]


def block_loss(backbone, x0: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
    """Flow matching of first blocks x0 [B, 3, C, H, W]."""
    sigma = noise_levels(len(x0), generator=generator).to(x0)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    s = sigma[:, None, None, None, None]
    v = backbone.velocity((1 - s) * x0 + s * noise, sigma, 0, text, None)
    return (v - (noise - x0)).square().mean()


def new_transformer():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=48, in_channels=LATENT[0],
        out_channels=LATENT[0], text_dim=world.TEXT_DIM, freq_dim=128, ffn_dim=432, num_layers=6, rope_max_seq_len=2048,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- teacher


@torch.no_grad()
def ema_update(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, weight by weight."""
    for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def form_of(i: int) -> int:
    """First frame of the chunk that step i shows, the same on all processes: two steps in three a short story, else a
    later chunk, those at a switch of words more often."""
    later = [*world.SWITCHES, *world.SWITCHES, *chunk_starts(LONG)[2:]]
    return 0 if i % 3 else later[i // 3 * 5 % len(later)]


def train_teacher(config: DistillConfig, stories: Stories) -> WanBackbone:
    """Trains the many-step causal teacher by flow matching and saves its moving average under `output_dir/teacher`."""
    torch.manual_seed(config.seed + 1)
    generator = torch.Generator().manual_seed(config.seed + 1 + 1000 * processes()[0])
    model = WanBackbone(new_transformer()).to(config.device)
    ema = copy.deepcopy(model)
    matrices = [p for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon, adamw = Muon(matrices, config.teacher_learning_rate), torch.optim.AdamW(others, betas=(0.9, 0.95))

    def step(i: int) -> float:
        rate = config.teacher_learning_rate * warm_cosine(i, config.teacher_steps, 30)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = rate, rate / 5
        clip = sample_clip(stories, config.teacher_batch, generator, chunk=form_of(i))
        clip = to(replace(clip, text=without_words(clip.text, config.text_dropout, generator)), config.device)
        x0, text = first_blocks(stories, config.first_blocks, generator)
        text = without_words(text, config.text_dropout, generator)
        first = block_loss(model, x0.to(config.device), text.to(config.device), generator)
        (config.first_weight * first).backward()
        loss = flow_matching_loss(model, clip, encode_clip(model, clip, clip.x0), generator)
        descend(model, loss, muon, adamw)
        ema_update(ema, model, min(0.99, (1 + i) / (10 + i)))
        return loss.item()

    folder = Path(config.output_dir) / "teacher"
    loop(folder, config.teacher_steps, {"model": model, "ema": ema}, {"muon": muon, "adamw": adamw}, generator, step,
         config.checkpointing_steps)  # fmt: skip
    if processes()[0] == 0:
        ema.transformer.save_pretrained(folder)
    return ema


def to(clip: Clip, device: str) -> Clip:
    """The clip's tensors on a device; what it reads stays on the CPU."""
    queries = [replace(q, x0=q.x0.to(device), weight=q.weight.to(device)) for q in clip.queries]
    return replace(clip, x0=clip.x0.to(device), text=clip.text.to(device), queries=queries)


# ------------------------------------------------------------------------------------------------------------- student


def student_rollout(student: WanBackbone, clip: Clip, given: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The student's own blocks of a clip from block `given` on, 4 steps each, reading what the clip says.

    One random step a block carries gradient (Self-Forcing's exit step); the context is what the last step gave,
    detached. -> x0 at that step, with gradient, [B, n - given, 3, C, H, W], and all blocks as they came out
    [B, n, 3, C, H, W]"""
    sigmas = schedule(shift=world.SHIFT).to(clip.x0)
    frames = None
    live = []
    final = []
    for i, start in enumerate(clip.starts):
        text, kv = clip.text[:, i], gather(frames, clip.reads[i]) if i else None
        x0 = clip.x0[:, i]
        if i >= given:
            exit_step = int(torch.randint(len(sigmas), (), generator=generator))
            x = torch.randn(x0.shape, generator=generator).to(x0)
            for s, sigma in enumerate(sigmas):
                with torch.set_grad_enabled(s == exit_step):
                    x0 = x - sigma * student.velocity(x, sigma.expand(len(x)), start, text, kv)
                if s == exit_step:
                    live.append(x0)
                    x0 = x0.detach()
                if s + 1 < len(sigmas):
                    renoise = torch.randn(x.shape, generator=generator).to(x)
                    x = (1 - sigmas[s + 1]) * x0 + sigmas[s + 1] * renoise
        final.append(x0)
        with torch.no_grad():
            own = encode(student, x0, start, text, kv)
        frames = torch.cat([frames, own], 1) if i else own
    return torch.stack(live, 1), torch.stack(final, 1)


def guided(velocity: Callable[[Tensor], Tensor], text: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): velocity(no words) + guidance * (velocity(text) - velocity(no
    words)). 1 is no guidance."""
    if guidance == 1:
        return velocity(text)
    mute = velocity(torch.zeros_like(text))
    return mute + guidance * (velocity(text) - mute)


def dmd_loss(x0: Tensor, real: Callable, fake: Callable, generator: torch.Generator) -> Tensor:
    """Distribution matching (arXiv 2311.18828, eq. 7): the gradient with respect to x0 is fake - real, both denoised
    estimates at a random noise level, divided by the mean distance to the real one.
    x0 [..., F, C, H, W]; `real`, `fake`: (noisy like x0, sigma [...]) -> velocity -> ()"""
    levels = shifted(0.02 + 0.96 * torch.rand(x0.shape[:-4], generator=generator)).to(x0)
    s = levels[..., None, None, None, None]
    with torch.no_grad():
        x = (1 - s) * x0 + s * torch.randn(x0.shape, generator=generator).to(x0)
        towards = x - s * real(x, levels)
        gradient = (x - s * fake(x, levels)) - towards
        gradient = gradient / (x0 - towards).abs().mean((-4, -3, -2, -1), keepdim=True)
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def train_student(config: DistillConfig, stories: Stories, teacher: WanBackbone) -> WanBackbone:
    """Distils the 4-step student from the teacher, as which it begins, and the fake score too. Saves its moving average
    under `output_dir/student`."""
    torch.manual_seed(config.seed + 2)
    generator = torch.Generator().manual_seed(config.seed + 2 + 1000 * processes()[0])
    student, fake, ema = (copy.deepcopy(teacher).to(config.device).requires_grad_(True) for _ in range(3))
    teacher.requires_grad_(False)
    ema.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), config.student_learning_rate, betas=(0.0, 0.99))
    fake_optimizer = torch.optim.AdamW(fake.parameters(), config.fake_learning_rate, betas=(0.0, 0.99))

    def match(live: Tensor, real: Callable, faked: Callable, relearn: Callable[[], Tensor], learn: bool) -> Tensor:
        """The student towards the teacher, then the fake score towards what the student makes now. -> its loss"""
        if learn:
            descend(student, dmd_loss(live, real, faked, generator), optimizer)
            ema_update(ema, student, config.ema_decay)
        for _ in range(config.fake_updates):
            loss = relearn()
            descend(fake, loss, fake_optimizer)
        return loss

    def one_clip(i: int, learn: bool) -> Tensor:
        """Rollouts of the student over stories, routed ones among them."""
        clip = to(sample_clip(stories, config.student_batch, generator, more=0, chunk=form_of(i)), config.device)
        given = 0 if clip.starts[1] == BLOCK else BEFORE // BLOCK + 1
        live, final = student_rollout(student, clip, given, generator)
        queries = [Query(given + k, clip.reads[given + k], live[:, k].detach(), clip.x0.new_ones(len(final)))
                   for k in range(live.shape[1])]  # fmt: skip
        clip = replace(clip, queries=queries)
        with torch.no_grad():
            read = {model: encode_clip(model, clip, final) for model in (teacher, fake)}

        def real(x: Tensor, sigma: Tensor) -> Tensor:
            return guided(lambda text: velocities(teacher, clip, read[teacher], x, sigma, text), clip.text,
                          config.guidance)  # fmt: skip

        def faked(x: Tensor, sigma: Tensor) -> Tensor:
            return velocities(fake, clip, read[fake], x, sigma, clip.text)

        def relearn() -> Tensor:
            return flow_matching_loss(fake, clip, encode_clip(fake, clip, final), generator)

        return match(live.transpose(0, 1), real, faked, relearn, learn)

    def one_start(learn: bool) -> Tensor:
        """The same for many first blocks at once, which are the hardest for the student."""
        x0, text = (part.to(config.device) for part in first_blocks(stories, config.student_first_blocks, generator))
        sigmas = schedule(shift=world.SHIFT).to(x0)
        noise = torch.randn(len(x0), len(sigmas), *x0.shape[1:], generator=generator).to(x0)
        exit_step = int(torch.randint(len(sigmas), (), generator=generator))
        sigma = sigmas[exit_step].expand(len(x0))
        with torch.no_grad():
            _, z, _ = denoise(student, noise, sigmas, 0, text, None)
        live = z[:, exit_step] - sigmas[exit_step] * student.velocity(z[:, exit_step], sigma, 0, text, None)

        def real(x: Tensor, sigma: Tensor) -> Tensor:
            return guided(lambda text: teacher.velocity(x, sigma, 0, text, None), text, config.guidance)

        return match(live, real, lambda x, s: fake.velocity(x, s, 0, text, None),
                     lambda: block_loss(fake, live.detach(), text, generator), learn)  # fmt: skip

    def step(i: int) -> float:
        learn = i >= 4  # first the fake score learns what the student makes
        one_start(learn)
        return one_clip(i, learn).item()

    folder = Path(config.output_dir) / "student"
    loop(folder, config.student_steps, {"student": student, "fake": fake, "ema": ema},
         {"optimizer": optimizer, "fake_optimizer": fake_optimizer}, generator, step,
         min(10, config.checkpointing_steps))  # fmt: skip
    if processes()[0] == 0:
        ema.transformer.save_pretrained(folder)
    return ema


# ----------------------------------------------------------------------------------------------------------------- all


def check_settings(config: DistillConfig, path: Path) -> None:
    """A folder's stages are all made with one configuration, which lies beside them. Raises ValueError where it is
    another one now; how long a stage is, and where it runs, may change."""
    free = ("output_dir", "device", "checkpointing_steps")
    now = {k: v for k, v in asdict(config).items() if k not in free and not k.endswith("_steps")}
    if path.exists():
        try:
            was = json.loads(read_text(path))
            other = [name for name, value in was.items() if now.get(name) != value]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, or name another --output_dir") from None
        if other:
            raise ValueError(
                f"{path.parent} was begun with {other[0]} {was[other[0]]!r}, not {now.get(other[0])!r}: give the same, "
                f"or name another --output_dir"
            )
    write_json(path, now)


def distill(config: DistillConfig) -> Path:
    """Runs the three stages, each from its last checkpoint, and writes the weights in fp16 to `output_dir/weights`, the
    folder that `load_pocket(folder=...)` reads. Under torchrun the stages run on all processes, one thread each."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if processes()[0] == 0:
        check_settings(config, folder / "config.json")
    train_autoencoder(config)
    if dist.is_initialized():
        dist.barrier()
    from diffusers import AutoencoderTiny, WanTransformer3DModel

    autoencoder = AutoencoderTiny.from_pretrained(folder / "autoencoder").to(memory_format=torch.channels_last).eval()
    if processes()[0] == 0:
        encode_world(autoencoder, folder / "latents.safetensors")
    if dist.is_initialized():
        dist.barrier()
    stories = tell_stories(config.stories, encode_world(autoencoder, folder / "latents.safetensors"), config.seed + 1)
    train_student(config, stories, train_teacher(config, stories))
    if processes()[0] == 0:
        transformers = {name: WanTransformer3DModel.from_pretrained(folder / name) for name in ("teacher", "student")}
        for name, part in ({"autoencoder": autoencoder} | transformers).items():
            part.register_to_config(_name_or_path=name)  # not the path of the machine that made it
            part.half().save_pretrained(folder / "weights" / name)
    return folder / "weights"
