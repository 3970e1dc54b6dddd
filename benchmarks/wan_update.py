"""One KVPO update at the size of Wan2.1-1.3B: what it needs, and what it takes. Random weights, nothing to download.

    python benchmarks/wan_update.py --plan              memory, FLOPs and time for several settings; needs no GPU
    python benchmarks/wan_update.py --branch_batch 1    the update itself, measured, next to its plan
    python benchmarks/wan_update.py --naive             the authors' order of work too, on the same machine
    python benchmarks/wan_update.py --small --naive     a small model, for a CPU

The update is `kvpo.update`, whose steps are called and measured one by one. The plan is no formula: it runs these very
steps on the meta device, with a stand-in for the network that allocates what one forward (and backward) of the real one
allocates on fake tensors, and counts every byte that is alive. So it knows what rollout.py keeps, copies and drops.

Not in it: the prompt encoder (run once, freed) and the reward models (processes of their own; here each video has a
random number). The authors' order of work is `checks/naive.py`. Both must give the same loss and gradients before a
time is printed: to 1e-4 in float32 (with bfloat16 the difference is printed).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
from standin import Cost, Live, Meter, Standin, count_flops, fake, peak_bytes
from torch import Tensor

from kvpo_min import chr as routing
from kvpo_min import kvpo
from kvpo_min.bank import Bank
from kvpo_min.checks import naive as plain
from kvpo_min.checks.bench import agree, difference
from kvpo_min.config import TrainConfig
from kvpo_min.pipeline import Pipeline
from kvpo_min.policies import acting, adapter_weights, add_policies, copy_adapter
from kvpo_min.rewards import Mixture
from kvpo_min.tve import schedule
from kvpo_min.wan.real import BETWEEN, SWITCHES, MixedBackbone, decode_stream

GIB = 2**30
WINDOW = routing.Window()
REWARDS = Mixture({"number": lambda pixels, prompts: pixels.mean((1, 2, 3, 4))}, {"number": 1.0})


@dataclass(frozen=True)
class Size:
    """A model and an update."""

    transformer: dict  # of WanTransformer3DModel
    vae: dict  # of AutoencoderKLWan
    latent: tuple[int, int, int]  # C, H, W
    words: tuple[int, int]  # tokens and width of an encoded prompt
    config: TrainConfig
    fork: int = 57
    bank_size: int = 0  # frames of MemFlow's memory bank

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Layers, tokens of a frame, heads, channels of a head."""
        it = self.transformer
        tokens = self.latent[1] // 2 * (self.latent[2] // 2)
        return it["num_layers"], tokens, it["num_attention_heads"], it["attention_head_dim"]


def settings(**given) -> TrainConfig:
    """As configs/longlive_single_gpu.yaml, with scripts of as many segments as the videos show; every update counts."""
    config = TrainConfig(nearest=1, grad_steps=2, tau=0.1, unsafe_scale=1.0, max_grad_norm=1e9, learning_rate=1e-5,
                         ema_decay=0.999, branch_batch=1, replay_batch=1, **given)  # fmt: skip
    return replace(config, num_segments=1 + sum(s < config.num_frames for s in SWITCHES))


FULL = Size(
    dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30), {}, (16, 60, 104), (512, 4096),
    settings(num_frames=147, rank=256, lora_alpha=256, global_frames=126),  # to the end of the video
)  # fmt: skip
SMALL = Size(
    dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=48, num_layers=2, text_dim=32, freq_dim=32),
    dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1), (16, 4, 4), (7, 32),
    settings(num_frames=42, rank=4, lora_alpha=4, num_generations=2, global_frames=3), fork=21,
)  # fmt: skip


@dataclass
class Model:
    pipeline: Pipeline
    policies: object  # from add_policies
    optimizer: torch.optim.Optimizer
    vae: torch.nn.Module
    device: torch.device

    @property
    def weights(self) -> list[Tensor]:
        return list(adapter_weights(self.policies, "default").values())

    @property
    def gradient(self) -> Tensor:
        return torch.cat([weight.grad.flatten().cpu() for weight in self.weights])


def build(size: Size, device: str, dtype: torch.dtype) -> Model:
    """Random weights in `dtype`, except what diffusers keeps in float32, and the adapters; `default` and `old` differ
    from the initial policy."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(**size.transformer).eval().requires_grad_(False)
        vae = AutoencoderKLWan(**size.vae).eval().requires_grad_(False)
        for weight in vae.parameters():
            weight.data = weight.data.to(dtype)
        for name, weight in transformer.named_parameters():
            if not set(name.split(".")) & set(transformer._keep_in_fp32_modules):
                weight.data = weight.data.to(dtype)
        transformer.enable_gradient_checkpointing()
        backbone = MixedBackbone(transformer, dtype)
        policies = add_policies(SimpleNamespace(backbone=backbone), size.config)
        for name, weight in adapter_weights(policies, "default").items():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        copy_adapter(policies, "default", "old")
    optimizer = torch.optim.AdamW(adapter_weights(policies, "default").values(), lr=size.config.learning_rate)
    pipeline = make_pipeline(size, backbone, partial(decode_video, vae), torch.device(device))
    return Model(pipeline, policies, optimizer, vae, torch.device(device))


def make_pipeline(size: Size, backbone, decode: Callable[[Tensor], None], device: torch.device, seed=0) -> Pipeline:
    """`decode` takes the latents [1, T, C, H, W] of one video. Instead of its pixels the rewards see one random number,
    the same for all frames: branches and anchor come together, or one after the other in this order."""
    generator = torch.Generator().manual_seed(seed)
    numbers, turn = torch.randn(size.config.num_generations + 1, generator=generator), itertools.count()
    texts = {f"words {k}": torch.randn(1, *size.words, generator=generator).to(device) for k in range(4)}

    def decode_all(latents: Tensor) -> Tensor:
        for video in latents.split(1):
            decode(video)
        shown = numbers if len(latents) > 1 else numbers[[next(turn) % len(numbers)]]
        return shown[:, None, None, None, None].expand(-1, latents.shape[1], 3, 1, 1)

    return Pipeline(
        backbone=backbone, decode=decode_all, embed=lambda words: torch.cat([texts[text] for text in words]),
        latent_shape=size.latent, switches=SWITCHES, segments=lambda script: script.split(BETWEEN),
        reward_prompts=lambda script, frames: script, sigmas=schedule().to(device),
        bank=Bank(size.bank_size) if size.bank_size else None,
    )  # fmt: skip


@torch.no_grad()
def decode_video(vae, latents: Tensor) -> None:
    """latents [1, T, C, H, W]; the pixels go to the host, latent frame by latent frame."""
    for frames in decode_stream(vae, latents.split(1, 1)):
        frames.cpu()


def fill_moments(model: Model) -> None:
    """The optimizer as it is after a first update: it holds its moments. The weights stay."""
    group = model.optimizer.param_groups[0]
    rate, group["lr"] = group["lr"], 0.0
    for weight in model.weights:
        weight.grad = torch.zeros_like(weight)
    model.optimizer.step()
    model.optimizer.zero_grad()
    group["lr"] = rate


def draw_task(size: Size, model: Model) -> kvpo.Task:
    """One group that forks at `size.fork`; its noise lies on the device already."""
    generator, config = torch.Generator().manual_seed(0), size.config
    pool = routing.pool(size.fork, WINDOW, config.nearest, config.perturb_num_blocks)
    routes = routing.uniform_routes(pool, WINDOW.past - config.nearest, config.num_generations, generator)
    plan = routing.Plan(size.fork, pool, routes, config.perturb_num_blocks)
    script = BETWEEN.join(f"words {k}" for k in range(config.num_segments))
    task = kvpo.draw(model.pipeline, [script], [0], config, 0, generator, plan)
    return replace(task, noise=task.noise.to(model.device))


Outcome = tuple[float, Tensor]  # loss, and the gradient on the host as one vector


def update(model: Model, task: kvpo.Task, config: TrainConfig, meter: Meter) -> Outcome:
    """One update, the steps of `kvpo.update` one by one, then the optimizer's as in `train.train`."""
    pipeline, policies = model.pipeline, model.policies
    with meter("prefix"), acting(policies, "old"):
        prefix = next(kvpo.make_prefixes(pipeline, config, [task]))
    with meter("rollout"):
        rollout = kvpo.roll_out(pipeline, policies, config, task, prefix)
    del prefix
    with meter("decode"):
        _, signals = kvpo.score_group(pipeline, REWARDS, task, rollout)
        advantages, _ = kvpo.compare(signals, REWARDS.weights, config)
    with meter("replay_frozen"):
        energies = {"initial": kvpo.energies_of(pipeline, policies, config, rollout, "initial")}
    with meter("replay"):
        energies["default"] = kvpo.energies_of(pipeline, policies, config, rollout, "default", with_graph=True)
    with meter("backward"):
        _, loss = kvpo.send_back(pipeline, config, rollout, energies, advantages, 1.0, config.tau)
    if model.device.type == "meta":
        return 0.0, loss.total
    found = loss.total.item(), model.gradient
    with meter("optimiser"):
        torch.nn.utils.clip_grad_norm_(model.weights, config.max_grad_norm)
        model.optimizer.step()
        copy_adapter(policies, "default", "ema", 1 - config.ema_decay)
    model.optimizer.zero_grad()
    return found


def naive(model: Model, task: kvpo.Task, config: TrainConfig, meter: Meter) -> Outcome:
    """The same update in the authors' order of work."""
    loss = plain.update(model.pipeline, model.policies, REWARDS, config, task, meter, "stored")
    return loss, model.gradient


# ------------------------------------------------------------------------------------------------------------- the plan


def network_cost(size: Size, dtype: torch.dtype) -> Cost:
    """Seen on fake tensors for 1 and 2 layers; from there all grows linearly."""
    past = WINDOW.sink + WINDOW.past
    depth, tokens, heads, channels = size.dims
    seen = {1: {}, 2: {}}
    for layers, found in seen.items():
        model = build(replace(size, transformer=size.transformer | {"num_layers": layers}), "meta", dtype)
        backbone = model.pipeline.backbone

        def train(*call, backbone=backbone) -> None:
            backbone.velocity(*call).square().mean().backward()

        with fake(backbone):
            for weight in model.weights:
                weight.grad = torch.zeros_like(weight)
            # the positions' table looks at frame numbers, which fake tensors do not have
            backbone.transformer.rope.turn = lambda at, h, w: torch.empty(
                1, at.shape[1] * h * w, 1, channels // 2, dtype=torch.complex64
            )
            for n in (2, 1):
                x, text = torch.empty(n, WINDOW.block, *size.latent), torch.empty(1, *size.words)
                kv = torch.empty(layers, 2, n, past * tokens, heads, channels, dtype=dtype)
                call = (x, torch.ones(n), 0, text)
                with torch.no_grad():
                    found["forward", n] = peak_bytes(backbone.velocity, *call, kv)
                    found["encode", n] = peak_bytes(backbone.encode, x, 0, text, kv)
                found["gradient", n] = peak_bytes(train, *call, kv)
            with torch.no_grad():
                found["forward", 0] = count_flops(backbone.velocity, *call, kv)
                found["alone", 0] = count_flops(backbone.velocity, *call, None)
            found["gradient", 0] = count_flops(train, *call, kv)
    return Cost({key: one + (seen[2][key] - one) * (depth - 1) for key, one in seen[1].items()}, past * tokens)


def decode_cost(size: Size, vae: torch.nn.Module) -> tuple[int, float, float]:
    """-> bytes at the peak while a video is decoded, FLOPs of its first latent frame and of each later one. `vae` is on
    the meta device, and is fake afterwards."""
    with fake(vae):
        two, three = (torch.empty(1, n, *size.latent) for n in (2, 3))
        flops = [count_flops(decode_video, vae, z) for z in (two, three)]
        return peak_bytes(decode_video, vae, three), 2 * flops[0] - flops[1], flops[1] - flops[0]


@dataclass(frozen=True)
class Fixed:
    """Bytes that are there in every phase, or in some."""

    base: int
    vae: int
    adapter: int  # one of the three
    frame: int  # keys and values of one latent frame

    @property
    def always(self) -> int:  # base, VAE, default + old, two moments; ema lies on the CPU
        return self.base + self.vae + 4 * self.adapter


def plan_update(size: Size, dtype: torch.dtype, batches: list[tuple[int, int]]) -> tuple[Fixed, Cost, dict]:
    """-> what is fixed, cost of a call, {(branch_batch, replay_batch): {phase: {peak, forwards, flops}}}"""
    cost, model = network_cost(size, dtype), build(size, "meta", dtype)
    adapter, vae, all_of = (
        sum(w.numel() * w.element_size() for w in weights)
        for weights in (model.weights, model.vae.parameters(), model.pipeline.backbone.transformer.parameters())
    )
    layers, tokens, heads, channels = size.dims
    fixed = Fixed(all_of - 3 * adapter, vae, adapter, layers * 2 * tokens * heads * channels * dtype.itemsize)
    decode_bytes, first_flops, later_flops = decode_cost(size, model.vae)
    table = {}
    for branch_batch, replay_batch in batches:
        network = Standin(size.dims, cost, dtype)

        def decode(latents: Tensor, network=network) -> None:
            torch.empty(decode_bytes, dtype=torch.uint8, device="meta")
            network.flops += first_flops + (latents.shape[1] - 1) * later_flops

        subject = replace(model, pipeline=make_pipeline(size, network, decode, model.device))
        config = replace(size.config, branch_batch=branch_batch, replay_batch=replay_batch)
        task = draw_task(size, subject)  # its noise is counted nowhere
        with Live() as live:
            meter = Meter(model.device, live, network)
            update(subject, task, config, meter)
        for phase, row in meter.rows.items():
            row["peak"] += fixed.always + (adapter if phase == "backward" else 0)
        # gradients, and one temporary of their size in the fused AdamW
        optimiser = {"peak": fixed.always + 2 * adapter, "forwards": 0, "flops": 0.0}
        table[branch_batch, replay_batch] = meter.rows | {"optimiser": optimiser}
    return fixed, cost, table


# ----------------------------------------------------------------------------------------------------------------- main


def print_table(header: str, rows: list[list]) -> None:
    print(f"\n| {header} |\n|" + "---|" * (header.count("|") + 1))
    for cells in rows:
        print(f"| {' | '.join(map(str, cells))} |")


def print_plan(size: Size, dtype: torch.dtype, batches: list[tuple[int, int]], tflops: float) -> None:
    fixed, cost, table = plan_update(size, dtype, batches)
    config, n_read = size.config, WINDOW.sink + WINDOW.past + size.bank_size
    print(f"{size.latent[1] * 8} x {size.latent[2] * 8} pixels, {config.num_frames} latent frames, "
          f"K = {config.num_generations}, P = {config.perturb_num_blocks}, fork at frame {size.fork}, "
          f"LoRA rank {config.rank}, {str(dtype).removeprefix('torch.')}")  # fmt: skip
    parts = {
        "transformer, frozen": fixed.base,
        "VAE, frozen": fixed.vae,
        "LoRA, one adapter in float32": fixed.adapter,
        "two adapters, default and old; ema lies on the CPU": 2 * fixed.adapter,
        "AdamW's moments": 2 * fixed.adapter,
        "there in every phase": fixed.always,
        "gradients": fixed.adapter,
        "keys and values of one latent frame": fixed.frame,
        f"of {WINDOW.history} frames, a whole history": WINDOW.history * fixed.frame,
        f"of {n_read} frames, what a block reads": n_read * fixed.frame,
        "a forward's activations": cost.bytes("forward", 1),
        "a forward's and backward's, gradient checkpointing": cost.bytes("gradient", 1),
    }
    print_table("what | GiB", [[what, f"{size_of / GIB:.2f}"] for what, size_of in parts.items()])
    phases = list(table[batches[0]])
    peaks = {batch: [row["peak"] / GIB for row in rows.values()] for batch, rows in table.items()}
    print("\nPeak of each phase in GiB:")
    lines = [[*batch, *(f"{peak:.1f}" for peak in [*each, max(each)])] for batch, each in peaks.items()]
    print_table(" | ".join(["branch_batch | replay_batch", *phases, "largest"]), lines)
    rows = table[batches[0]]
    work = {phase: (row["forwards"], row["flops"]) for phase, row in rows.items()}
    work["sum"] = tuple(map(sum, zip(*work.values(), strict=True)))
    print(f"\nWork, and time at {tflops:g} TFLOP/s:")
    print_table("phase | forwards | PFLOP | seconds",
                [[p, n, f"{f / 1e15:.2f}", f"{f / tflops / 1e12:.0f}"] for p, (n, f) in work.items()])  # fmt: skip


def measure(size: Size, device: str, dtype: torch.dtype, with_naive: bool) -> dict:
    """-> {"ours": {phase: {seconds, peak}}, "naive": the same or None or "out of memory", "difference"}. Raises
    Disagreement when the two should give the same numbers and do not."""
    model = build(size, device, dtype)
    fill_moments(model)
    task = draw_task(size, model)
    meter, other, apart = Meter(model.device), Meter(model.device), None
    ours = update(model, task, size.config, meter)
    if with_naive:
        copy_adapter(model.policies, "old", "default")
        try:
            theirs = naive(model, task, size.config, other)
        except torch.OutOfMemoryError:
            return {"ours": meter.rows, "naive": "out of memory", "difference": None}
        apart = difference(ours, theirs)
        if dtype == torch.float32:
            agree("the two orders of work", apart)
    return {"ours": meter.rows, "naive": other.rows or None, "difference": apart}


def print_measured(size: Size, device: str, dtype: torch.dtype, with_naive: bool) -> None:
    batches = (size.config.branch_batch, size.config.replay_batch)
    planned = plan_update(size, dtype, [batches])[2][batches]
    out = measure(size, device, dtype, with_naive)
    theirs = out["naive"] if isinstance(out["naive"], dict) else {}
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}, branch_batch {batches[0]}, replay_batch {batches[1]}")

    def show(rows: dict, phase: str, key: str, unit: float = 1.0) -> str:
        return f"{rows[phase][key] / unit:.4g}" if phase in rows else ""

    lines = [
        [phase, show(out["ours"], phase, "seconds"), show(out["ours"], phase, "peak", GIB),
         show(planned, phase, "peak", GIB), show(planned, phase, "flops", 1e15),
         show(theirs, phase, "seconds"), show(theirs, phase, "peak", GIB)]
        for phase in out["ours"] | theirs
    ]  # fmt: skip
    total = [sum(row["seconds"] for row in rows.values()) for rows in (out["ours"], theirs)]
    lines.append(["sum", f"{total[0]:.4g}", "", "", "", f"{total[1]:.4g}" if theirs else "", ""])
    print_table("phase | seconds | peak GiB | planned GiB | PFLOP | naive seconds | naive peak GiB", lines)
    if device == "cpu":
        print("\nOn a CPU the peak is that of the whole process so far.")
    if out["naive"] == "out of memory":
        print("\nThe authors' order of work ran out of memory.")
    if out["difference"]:
        print("\nRelative difference of the two: loss {loss:.1e}, gradient {gradient:.1e}".format(**out["difference"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--small", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--naive", action="store_true", help="the authors' order of work too")
    parser.add_argument("--branch_batch", type=int, default=1, help="branches that are made at once")
    parser.add_argument("--replay_batch", type=int, default=1, help="forwards of a replay that run at once")
    parser.add_argument("--rank", type=int, help="of the LoRA; default 256, or 4 with --small")
    parser.add_argument("--fork", type=int, help="fork at this frame")
    parser.add_argument("--global_frames", type=int, help="frames after the fork's chunk")
    parser.add_argument("--bank_size", type=int, default=0, help="frames of MemFlow's memory bank (3); 0: LongLive")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 with --small")
    throughput = "throughput for the plan's seconds; 66 is 40%% of an RTX 4090's 165 in bfloat16"
    parser.add_argument("--tflops", type=float, default=66.0, help=throughput)
    args = parser.parse_args()
    if args.bank_size and args.naive:
        parser.error("the authors' order of work is written out for LongLive alone: give --bank_size or --naive")
    if min(args.branch_batch, args.replay_batch) < 1:
        parser.error("branch_batch and replay_batch must be 1 or more")
    size = SMALL if args.small else FULL
    given = {name: getattr(args, name) for name in ("branch_batch", "replay_batch", "rank", "global_frames")}
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(size.config, **given, lora_alpha=given.get("rank", size.config.lora_alpha))
    size = replace(size, config=config, fork=size.fork if args.fork is None else args.fork, bank_size=args.bank_size)
    forks = routing.eligible_forks(config.num_frames, WINDOW, config.nearest, config.perturb_num_blocks)
    if size.fork not in forks:
        parser.error(f"a fork at frame {size.fork} is not possible; these are: {forks}")
    dtype = getattr(torch, args.dtype or ("float32" if args.small else "bfloat16"))
    if args.plan:
        g = config.num_generations
        print_plan(size, dtype, [(1, 1), (1, 2), (1, 4), (3, 4), (g + 1, 4 * g)], args.tflops)
    elif args.device == "cpu" and not args.small:
        parser.error("the full size needs a GPU; give --plan for its plan, or --small for a small model")
    else:
        print_measured(size, args.device, dtype, args.naive)


if __name__ == "__main__":
    main()
