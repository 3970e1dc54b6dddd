"""The pipeline of a real Wan model: what `pocket.load_pocket` is to the pocket model.

1. Text: every prompt goes through umT5 once; the result is kept as safetensors beside the prompts file, and the encoder
   (10.6 GiB) is freed before the transformer is loaded.
2. Transformer: `checkpoints.load_transformer`, frozen in bfloat16; latents, noise levels, LoRA and optimizer stay in
   float32, and matrix products run in bfloat16 (autocast). The authors hold LoRA and optimizer in bfloat16 too
   (trainer/kvpo.py:342-346), where small steps vanish.
3. Video: `AutoencoderKLWan`, frame by frame with its causal cache, one video at a time, outside any graph.

A script is its prompts joined by " | ", as in the pocket world.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvpo_min import prompts
from kvpo_min.bank import Bank
from kvpo_min.config import knob, settle
from kvpo_min.pipeline import Pipeline
from kvpo_min.prompts import BETWEEN
from kvpo_min.reward_models import mixture_from
from kvpo_min.rewards import Mixture
from kvpo_min.rollout import segment_at
from kvpo_min.system import not_finite, say
from kvpo_min.tve import schedule
from kvpo_min.wan import WanBackbone
from kvpo_min.wan.checkpoints import fetch, first_line, from_folder, load_transformer, some

SWITCHES = (39, 75, 111)  # configs/train_kvpo_longlive.yaml:42
FPS = 4  # frames a second that `decode` gives
TEXT_LEN = 512  # tokens; what is missing is zero, and is read like any other (authors: wan_wrapper.py:102-116)


@dataclass
class WanOptions:
    """The real model, which `model` names: a diffusers folder, a checkpoint, or either on the Hub"""

    weights_name: str = knob("", "which weights of a file with several; empty: generator_ema, generator or model")
    lora: str = knob("", "released LoRA that is merged into the model before training: file, folder, or on the Hub")
    merged_alpha: float = knob(0.0, "that LoRA's alpha; 0: the one that is written with it, else its rank", least=0)
    components: str = knob("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "diffusers folder with vae/, text_encoder/, tokenizer/")
    height: int = knob(480, "of the videos, in pixels; a token has 16", least=16, multiple=16)
    width: int = knob(832, "of the videos, in pixels", least=16, multiple=16)
    device: str = "cuda"
    dtype: str = knob("bfloat16", "of the frozen weights and the matrix products", of=("bfloat16", "float32"))
    gradient_checkpointing: bool = knob(False, "keep only each layer's inputs for the backward pass: saves memory")
    bank_size: int = knob(0, "frames of MemFlow's memory bank: 3 for its checkpoints, 0 for all others", least=0)
    bank_interval: int = knob(3, "blocks from one frame that the bank records to the next")
    bank_compat: str = knob("", "official: the bank with the authors' faults; training with compat official sets it")
    vq_model: str = knob("", "what scores VQ: hpsv3, videoalign, worker, clip or pickscore ... (docs/single_gpu.md)")
    mq_model: str = knob("", "what scores MQ, likewise; the same words share one process")
    ta_model: str = knob("", "what scores TA, likewise")

    def __post_init__(self):
        settle(self)
        try:
            torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device must be one of torch's, such as cuda or cpu, got {self.device!r}") from None
        if self.merged_alpha and not self.lora:
            raise ValueError("merged_alpha is that of --lora: give both, or leave it out")
        if not self.bank_size and (self.bank_interval != 3 or self.bank_compat):
            raise ValueError("bank_interval and bank_compat are of a memory bank: give bank_size too (MemFlow's is 3)")
        Bank(self.bank_size or 1, self.bank_interval, self.bank_compat)  # refuses what cannot work


def load_rewards(options: WanOptions, **weights: float) -> Mixture:
    """The rewards that the options name, mixed with the weights vq, mq and ta. Raises ValueError."""
    return mixture_from({name: getattr(options, f"{name}_model") for name in weights}, weights, FPS)


class MixedBackbone(WanBackbone):
    """Frozen weights and matrix products in `dtype`; latents, noise levels and velocities in float32."""

    def __init__(self, transformer, dtype: torch.dtype):
        super().__init__(transformer)
        self.dtype = dtype

    def forward(self, x, sigma, frames, text, kv=None, mask=None, written=None) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return super().forward(x.float(), sigma, frames, text, kv, mask, written).float()

    def encode(
        self, x0: Tensor, start: int, text: Tensor, kv: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        return super().encode(x0, start, text, kv, mask).to(self.dtype)  # autocast leaves normalised keys in float32

    def text_keys(self, text: Tensor) -> Tensor:
        with torch.autocast(text.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return super().text_keys(text.float())


def load_wan(model: str, texts: Sequence[str], cache: str | Path, options: WanOptions | None = None) -> Pipeline:
    """The pipeline of a real model. `texts`: every prompt that will be asked for; `cache`: the folder that holds their
    encodings (`text_cache`), extended where it lacks some. Raises ValueError naming what cannot be loaded."""
    from diffusers import AutoencoderKLWan

    options = options or WanOptions()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if not texts:
        raise ValueError("name the texts that will be asked for: the text encoder does not stay loaded")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU here; give --device cpu, or another machine")
    embed = encode_texts(texts, cache, options.components, device, dtype)
    told = {"memflow": bool(options.bank_size), "which": options.weights_name, "alpha": options.merged_alpha}
    transformer = load_transformer(model, options.lora or None, dtype, **{k: v for k, v in told.items() if v})
    transformer = transformer.to(device)
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    vae = from_folder(AutoencoderKLWan, component(options.components, "vae"), dtype=dtype).to(device)
    check_parts(transformer.config, vae.config, embed(list(texts[:1])).shape[-1])
    scale = vae.config.scale_factor_spatial

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        """[N, T, C, H, W] -> [N, T, 3, H', W'] in [0, 1] on the CPU: of the four pixel frames of a latent frame the
        last, so 4 frames a second at equal distances, one a latent frame. Rewards are means over frames (HPSv3) or
        read 2 a second (VideoAlign)."""
        n, t, _, h, w = latents.shape
        pixels = torch.empty(n, t, 3, h * scale, w * scale)  # filled in place: a second copy would be gigabytes
        for video, out in zip(latents.split(1), pixels, strict=True):
            for frame, shown in zip(decode_stream(vae, video.split(1, 1)), out, strict=True):
                shown.copy_(frame[0, -1])
        return pixels

    def segments(script: str) -> list[str]:
        return script.split(BETWEEN)

    def reward_prompts(script: str, frames: range) -> str:
        words = segments(script)
        return words[segment_at(frames.start, SWITCHES[: len(words) - 1])]

    return Pipeline(
        backbone=MixedBackbone(transformer, dtype),
        decode=decode,
        embed=embed,
        sigmas=schedule(4, 5.0).to(device),
        latent_shape=(vae.config.z_dim, options.height // scale, options.width // scale),
        switches=SWITCHES,
        segments=segments,
        reward_prompts=reward_prompts,
        bank=Bank(options.bank_size, options.bank_interval, options.bank_compat) if options.bank_size else None,
        name=Path(model).name,
    )


def component(components: str, name: str) -> Path:
    """The folder of one component, local or from the Hub."""
    return fetch(components, [f"{name}/*"]) / name


def check_parts(transformer, vae, text_dim: int) -> None:
    """Raises ValueError when transformer, autoencoder and text encoder (their configs) are of different models."""
    if vae.is_residual or vae.patch_size:
        raise ValueError("the autoencoder is Wan2.2's; expected that of Wan2.1")
    if transformer.in_channels != vae.z_dim or transformer.out_channels != vae.z_dim:
        raise ValueError(
            f"the transformer turns {transformer.in_channels} channels into {transformer.out_channels}, the "
            f"autoencoder has {vae.z_dim}: `model` must be a text-to-video model and `components` must belong to it"
        )
    if transformer.text_dim != text_dim:
        raise ValueError(f"the transformer reads text of {transformer.text_dim} numbers, the encoder gives {text_dim}")


# ---------------------------------------------------------------------------------------------------------------- video


@torch.no_grad()
def decode_stream(vae, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Decodes a video block by block, as `vae.decode` would at once. blocks [N, F, C, H, W] of normalised latents
    (the transformer's) -> [N, 4 F, 3, 8 H, 8 W] in [0, 1], the first block 4 F - 3 frames. Between blocks only the
    causal convolutions' last inputs are kept."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    mean, std = (torch.tensor(v, device=vae.device)[:, None, None] for v in (vae.config.latents_mean,
                                                                            vae.config.latents_std))  # fmt: skip
    cache = [None] * sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
    for block in blocks:
        z = (block.to(mean) * std + mean).to(vae.dtype)
        z = vae.post_quant_conv(z.transpose(1, 2))
        frames = [vae.decoder(frame, feat_cache=cache, feat_idx=[0]) for frame in z.split(1, 2)]  # [N, 3, 1 or 4, ...]
        yield (torch.cat(frames, 2).transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------------- text


def text_cache(prompts: str | Path) -> Path:
    """The folder of the encodings of a prompts file, about a megabyte a prompt."""
    return Path(f"{prompts}.umt5").expanduser()


def writable(*folders: Path) -> Path:
    """The first of these folders in which a file can be made. Raises OSError."""
    for folder in folders:
        try:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"kvpo")
                probe.flush()
            if made:  # it is made again when there is something to keep
                folder.rmdir()
            return folder
        except OSError as error:
            reason = error.strerror
    raise OSError(f"encoded prompts can be kept neither in {' nor in '.join(map(str, folders))} ({reason}): free space "
                  f"there, or copy the prompts file to a folder that can be written to")  # fmt: skip


def fingerprint(components: str) -> str:
    """What encodings depend on beside the text: the files of encoder and tokenizer. Of large ones (gigabytes) the size,
    the date and parts everywhere are looked at, of all others everything."""
    digest = hashlib.sha256()
    for name in ("tokenizer", "text_encoder"):
        for path in sorted(p for p in component(components, name).rglob("*") if p.is_file()):
            size, date = path.stat().st_size, path.stat().st_mtime_ns
            step = max(4096, size // 4096) if size > 2**26 else 2**20
            digest.update(f"\n{name}/{path.name} {size} {date if size > 2**26 else ''}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, step):
                    file.seek(start)
                    digest.update(file.read(min(step, 2**20 if size <= 2**26 else 4096)))
    return digest.hexdigest()


def encode_texts(
    texts: Sequence[str], cache: str | Path, components: str, device="cpu", dtype=torch.bfloat16, batch: int = 8,
    part: int = 512,
) -> Callable[[list[str]], Tensor]:  # fmt: skip
    """Encodes the texts that the folder `cache` lacks (cut at 512 tokens), adds them to it, `part` texts a file (an
    interruption loses at most one), and frees the encoder. -> embed: texts -> [B, 512, D] float32 on `device`.
    Where `cache` cannot be written to, they are kept in the user's cache folder. Raises ValueError for a damaged file
    or encoder, and OSError."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tqdm import tqdm

    cache, encoder = Path(cache), fingerprint(components)
    elsewhere = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvpo_min"

    def key(text: str) -> str:
        return hashlib.sha256(f"{encoder}\n{dtype}\n{text}".encode()).hexdigest()

    def read(path: Path, keys: Iterable[str] = ()) -> tuple[list[str], list[Tensor]]:
        """The names in a file, and what is asked for: it stays on the disk until then."""
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys()), [file.get_tensor(k) for k in keys]
        except Exception as error:  # a damaged header raises its own kinds
            raise ValueError(
                f"{path} holds no encoded prompts ({first_line(error)}); delete it, and it will be made again"
            ) from None

    files = [*sorted(elsewhere.glob("*.safetensors")), *sorted(cache.glob("*.safetensors"))]
    where = {k: path for path in files for k in read(path)[0]}
    missing = [text for text in dict.fromkeys(texts) if key(text) not in where]
    if missing:
        place = writable(cache, elsewhere)  # before gigabytes are loaded
        encode = text_encoder(components, device, dtype)
        with tqdm(total=len(missing), desc="encode prompts", unit="prompt", mininterval=5) as bar:
            for begin in range(0, len(missing), part):
                now, rows = missing[begin : begin + part], []
                for i in range(0, len(now), batch):
                    rows += encode(now[i : i + batch])
                    bar.update(len(now[i : i + batch]))
                found = {key(text): row for text, row in zip(now, rows, strict=True)}
                if broken := not_finite(dict(zip(now, rows, strict=True))):
                    raise FloatingPointError(f"the encodings of these prompts are not finite: {some(broken)}")
                path = place / f"{hashlib.sha256(''.join(found).encode()).hexdigest()[:16]}.safetensors"
                place.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=place) as aside:  # another process may write the same
                    save_file(found, Path(aside) / path.name)
                    os.replace(Path(aside) / path.name, path)
                where |= dict.fromkeys(map(key, now), path)
        del encode  # the only reference to the encoder
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()

    def embed(texts: list[str]) -> Tensor:
        if unknown := [text for text in texts if key(text) not in where]:
            raise ValueError(f"{cache} lacks {unknown[0][:60]!r}: the encoder is freed, so name every text beforehand")
        rows = [read(where[key(text)], [key(text)])[1][0].float() for text in texts]  # [tokens, D]
        return torch.stack([torch.nn.functional.pad(r, (0, 0, 0, TEXT_LEN - len(r))) for r in rows]).to(device)

    return embed


def text_encoder(components: str, device, dtype) -> Callable[[list[str]], list[Tensor]]:
    """umT5 as Wan uses it: texts -> one [tokens, D] each, on the CPU, without padding."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    folder = component(components, "tokenizer")
    try:  # as tokenizer.json says: AutoTokenizer of transformers 5 makes T5's of it, without bytes for rare letters
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # missing, damaged, or of a kind that transformers does not know
        raise ValueError(f"{folder} cannot be loaded as a tokenizer: {first_line(error)}") from None
    model = from_folder(UMT5EncoderModel, component(components, "text_encoder"), dtype=dtype).to(device)

    @torch.no_grad()
    def encode(texts: list[str]) -> list[Tensor]:
        tokens = tokenizer(
            [prompt_clean(text) for text in texts], padding="max_length", max_length=TEXT_LEN, truncation=True,
            return_attention_mask=True, return_tensors="pt",
        ).to(device)  # fmt: skip
        hidden = model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return [rows[:n].cpu().clone() for rows, n in zip(hidden, tokens.attention_mask.sum(1), strict=True)]

    return encode


# -------------------------------------------------------------------------------------------------------------- prompts


def read_prompts(path: str | Path, num_segments: int = 0) -> list[str]:
    """Scripts of a prompts file. As the authors do (utils/prompt_sequences.py), they are cut to `num_segments` prompts
    and shorter ones left out, here with a warning. 0: all prompts that can be shown, 1 to 4. Raises as the reader
    does (kvpo_min/prompts.py)."""
    least, most = max(1, num_segments), num_segments or len(SWITCHES) + 1
    read = [[part for part in script.split(BETWEEN) if part] for script in prompts.read_prompts(path)]
    scripts = [BETWEEN.join(parts[:most]) for parts in read if len(parts) >= least]
    if not scripts:
        raise ValueError(f"{path} has no script of {least} prompts")
    if short := len(read) - len(scripts):
        warnings.warn(f"{path}: {short} of {len(read)} scripts have fewer than {least} prompts and are left out",
                      stacklevel=2)  # fmt: skip
    return scripts


# --------------------------------------------------------------------------------------------------------------- memory

GIB = 2**30
WAN_1_3B = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)  # of WanTransformer3DModel
BASE, VAE = 2.65, 0.24  # GiB of frozen weights, bfloat16
FORWARD, GRADIENT = 88e3, 461e3  # bytes a token of one forward; of a forward and backward with gradient checkpointing


def memory_plan(
    num_generations: int = 8, past: int = 6, height: int = 480, width: int = 832, rank: int = 256,
    branch_batch: int = 1, bank_size: int = 0,
) -> dict[str, float]:  # fmt: skip
    """GiB of the largest moment of one update of Wan2.1-1.3B, by part; the sum is what a GPU needs, without the CUDA
    context (0.5 to 1 GiB).

    num_generations: G; past: frames of the window between sink and block; height, width in pixels; `branch_batch`
    branches are made at once; bank_size: frames of MemFlow's memory bank. Fork at frame 57 of 147, 5 routed blocks, one
    replayed step with gradient per forward pair (replay_batch 2), everything else as in
    `configs/longlive_single_gpu.yaml`. The parts are formulas; FORWARD and GRADIENT were counted by
    `benchmarks/wan_update.py --plan`, which runs the whole update on the meta device, and the sums
    lie within 1% of its tables (docs/single_gpu.md). Raises ValueError for sizes that Wan does not take."""
    WanOptions(height=height, width=width)  # refuses what is no multiple of a token
    if min(num_generations, past, rank, branch_batch) < 1 or branch_batch > num_generations + 1 or bank_size < 0:
        raise ValueError(
            "num_generations, past and rank must be at least 1, branch_batch 1 to num_generations + 1 and bank_size 0 "
            f"or more, got {num_generations}, {past}, {rank}, {branch_batch} and {bank_size}"
        )
    sink, block, history, fork, total, routed = 3, 3, 33, 57, 147, 5
    layers, dim = WAN_1_3B["num_layers"], WAN_1_3B["num_attention_heads"] * WAN_1_3B["attention_head_dim"]
    tokens = (height // 16) * (width // 16)  # a latent frame
    frame = layers * 2 * tokens * dim * 2 / GIB  # keys and values of a latent frame, bfloat16
    latent = 16 * (height // 8) * (width // 8) * 4 / GIB  # a latent frame, float32
    adapter = layers * rank * (12 * dim + 2 * (dim + WAN_1_3B["ffn_dim"])) * 4 / GIB  # one, of `LORA_TARGETS`, float32
    cast = adapter / 2  # the active adapter in bfloat16, which autocast keeps during a forward
    read = sink + past + bank_size
    # a bank is replaced, not changed, so there are several, each with the frame that waits to be merged: the prefix's,
    # which every replay starts from, the one in use, and in replays the one that the next block will start from
    kept = [bank_size + 1 + branch_batch * (bank_size + 1), 2 * (bank_size + 1) + bank_size]
    bank = [{"bank": n * frame} if bank_size else {} for n in kept]
    pool = history - sink - block * (routed - 1)  # frames that could be routed, and the nearest one
    own = max(block * (routed - 1), min(history, 2 * (sink + past) + block) - sink)  # what rollout.generate keeps
    blocks = (75 - fork) // block  # that are replayed
    fixed = {"transformer": BASE, "VAE": VAE, "adapters": 2 * adapter, "optimizer": 2 * adapter}
    videos = latent * (total * 4 + num_generations * (total + 2 * blocks * 4 * block))  # noise; videos; z and x0
    branches = {
        "shared past": (sink + pool) * frame,
        "branches' own frames": branch_batch * own * frame,
        "what blocks read": branch_batch * read * frame,
        "videos": videos,
        "activations": cast + branch_batch * block * tokens * FORWARD / GIB,
    }
    replay = {
        "gradients": adapter,
        "shared past": (sink + past) * frame,
        "branches' own frames": past * frame,
        "what blocks read": read * frame,
        "videos": videos,
        "activations": 2 * (block * tokens * GRADIENT + read * tokens * 4 * dim) / GIB,
    }
    phases = fixed | bank[0] | branches, fixed | bank[1] | replay
    return max(phases, key=lambda parts: sum(parts.values()))


def real_prompts(config, options) -> tuple[list[str], list[str]]:
    """Training scripts of a real model, and the last of its prompts file, which are held out. Raises ValueError."""
    if not 1 <= config.num_segments <= len(SWITCHES) + 1:
        raise ValueError(f"num_segments must be 1 to {len(SWITCHES) + 1}, got {config.num_segments}")
    if not options.prompts:
        raise ValueError(
            f"{options.model} is no pocket model (it has no student/), so it is taken for a real one, and that needs "
            f"--prompts FILE"
        )
    if options.event:
        raise ValueError("event chooses among scripts that the pocket world draws; a real model's come from --prompts")
    scripts = read_prompts(options.prompts, config.num_segments)
    held_out = scripts[-options.eval_prompts :]
    last = {" ".join(script.split()).casefold() for script in held_out}
    before, n = scripts[: -options.eval_prompts], len(scripts)
    scripts = [script for script in before if " ".join(script.split()).casefold() not in last]
    if not scripts:
        raise ValueError(
            f"{options.prompts} has {n} scripts, of which the last {options.eval_prompts} would be held "
            f"out, and no other one: give more, or a smaller --eval_prompts"
        )
    if len(scripts) < len(before):
        say(f"{options.prompts}: {len(before) - len(scripts)} scripts are left out of training: their words are those "
            f"of held-out ones")  # fmt: skip
    most = config.max_train_steps * config.groups_per_update + (0 if config.tau else config.tau_groups)
    return scripts[:most], held_out  # the run meets no more, so no more are encoded


def try_rewards(rewards, wan) -> None:
    """Scores one clip of noise: what is missing in a reward model's environment shows now, not after an hour."""
    say("rewards: one clip of noise, to see that they answer")
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(1, 9, 3, wan.height, wan.width, generator=generator, dtype=torch.float32)
    rewards(clip, ["a red disc moves left"])
