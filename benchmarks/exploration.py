"""Who decides what happens next? Measured before any training, on three kinds of event.

    python benchmarks/exploration.py --event settles --json benchmarks/data/exploration_settles.json
    python benchmarks/exploration.py --event wanders --json benchmarks/data/exploration_wanders.json
    python benchmarks/exploration.py --event turns --json benchmarks/data/exploration_turns.json
    python benchmarks/exploration.py --event settles --bank 3 --ways 1 --json benchmarks/data/exploration_bank.json
    python benchmarks/exploration.py --figure figures/who_decides.png
    python benchmarks/exploration.py --bank_figure figures/bank.png

Rows that are in the file already are not computed again. For each way to explore: forks on held-out prompts, in the
model's own rollouts, G branches against the unrouted anchor, from the fork to the end of its chunk.
- different: share of branches in which the judge reads another order of events (runs of 3 frames and more) than in
  the anchor; different scene, colour, shape, motion, place: share in which that alone differs in a quarter of the
  frames
- remembered: share of the branches that settle where the frames that they could read demand; anchor remembered: of
  the anchors
- spread: standard deviation of the weighted reward inside a group
- distance: mean distance of the branches' frames from the nearest clean rendering, over the anchors'
Noise of strength s, sqrt(1 - s^2) shared + s fresh, is mixed into the initial noise ("at the fork") or the re-noising
steps ("consistency noise") of the same five blocks that routing would touch; "fresh noise" is all noise from the fork
on. With `--bank` every video has a memory bank of so many frames (bank.py), of which "demand" knows nothing. The four
are those of the comparison of methods (`kvpo_min.compare.baselines.explore`).
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from kvpo_min import chr as routing
from kvpo_min.bank import Bank
from kvpo_min.compare.baselines import explore
from kvpo_min.pipeline import score
from kvpo_min.pocket import load_pocket, pocket_rewards, world
from kvpo_min.rollout import Sampler, Stream, draw_noise, fork

WAYS = {
    "routing, nearest 2, 4 routed": dict(nearest=2),
    "routing, nearest 1, 5 routed": dict(nearest=1),
    "noise at the fork, strength 1.0": dict(kind="initial", strength=1.0),
    "consistency noise, strength 0.6": dict(kind="consistency", strength=0.6),
    "consistency noise, strength 1.0": dict(kind="consistency", strength=1.0),
    "fresh noise": dict(kind="fresh"),
}


@torch.no_grad()
def measure(
    pipeline,
    scripts,
    n_frames: int,
    num_generations: int,
    kind="routing",
    nearest=1,
    past=6,
    strength=0.5,
    seed=0,
    bank=0,
) -> dict:
    """One way to explore, over one fork a script."""
    rewards, window, sigmas = pocket_rewards(), routing.Window(past=past), pipeline.sigmas
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for script in tqdm(scripts, leave=False):
        texts = [pipeline.embed([text]) for text in pipeline.segments(script)]
        sampler = Sampler(sigmas, window, switches=pipeline.switches[: len(texts) - 1])
        plan = routing.plan(n_frames, window, nearest, 5, num_generations, generator)
        end = routing.chunk_of(plan.fork, n_frames).stop
        shape = (window.block, *pipeline.latent_shape)
        z = draw_noise(end // window.block, len(sigmas), shape, generator)
        z, plan = explore(kind, plan, z, generator, window.block, strength)
        begin = Stream(bank=Bank(bank)) if bank else Stream()
        made = fork(pipeline.backbone, texts, z, plan, end, end, sampler, nearest, prefix=begin)
        pixels = pipeline.decode(made.videos[:, plan.fork :])
        prefix = pipeline.decode(made.videos[:1, : plan.fork]).expand(num_generations + 1, -1, -1, -1, -1)
        whole = world.judge(torch.cat([prefix, pixels], 1))

        def reads(branch: int, start: int, plan=plan, window=window) -> torch.Tensor:
            if kind != "routing" or branch == num_generations:
                return routing.ordinary_frames(start, window)
            return routing.branch_frames(plan.routes, start, window, nearest)[branch]

        ends = world.settled(whole, [script] * (num_generations + 1), reads)
        right, routed = (ends.after == ends.should).float(), ends.video < num_generations
        reading = world.judge(pixels)
        told = [world.story(reading, g) for g in range(num_generations + 1)]
        parts = {}
        for name in ("scene", "colour", "shape", "motion"):
            each = getattr(reading, name)
            parts[name] = (each[:-1] != each[-1:]).float().mean(1).gt(0.25).float().mean().item()
        away = (reading.place[:-1] != reading.place[-1:]).any(2)
        parts["place"] = away.float().mean(1).gt(0.25).float().mean().item()
        scores = score(pipeline, rewards, pixels, [script] * len(pixels), plan.fork)
        total = rewards.total(scores)
        rows.append({
            "different": sum(t != told[-1] for t in told[:-1]) / num_generations,
            **{f"different {name}": share for name, share in parts.items()},
            "remembered": right[routed].mean().item() if len(right) else float("nan"),
            "anchor remembered": right[~routed].mean().item() if len(right) else float("nan"),
            "spread": total[:-1].std().item(),
            **{f"spread {name}": s[:-1].std().item() for name, s in scores.items()},
            "over anchor": (total[:-1].mean() - total[-1]).item(),
            "best over anchor": (total[:-1].max() - total[-1]).item(),
            "pixels": (pixels[:-1] - pixels[-1:]).square().mean().item(),
            "distance": reading.distance[:-1].mean().item(),
            "anchor distance": reading.distance[-1].mean().item(),
        })  # fmt: skip
    out = {key: sum(r[key] for r in rows) / len(rows) for key in rows[0]}
    out["distance ratio"] = out["distance"] / out["anchor distance"]
    return out


SHOWN = {  # of the figure: six sources, and what each event changes
    "routing, nearest 2, 4 routed": "routing",
    "routing, nearest 1, 5 routed": "routing, nearest 1",
    "noise at the fork, strength 1.0": "noise at the fork",
    "consistency noise, strength 0.6": "some noise in the steps",
    "consistency noise, strength 1.0": "all noise in the steps",
    "fresh noise": "all noise fresh",
}
EVENTS = {"settles": "scene", "wanders": "place", "turns": "colour"}


def draw(path: Path, folder: Path) -> None:
    """One bar chart of the three recorded files."""
    from kvpo_min import viz

    bars = {}
    for event, part in EVENTS.items():
        table = json.loads((folder / f"exploration_{event}.json").read_text())["ways"]
        bars[event] = {label: table[way][f"different {part}"] for way, label in SHOWN.items()}
    viz.who_decides(bars).savefig(path, dpi=150)


def draw_bank(path: Path, folder: Path) -> None:
    """What a memory bank changes, from the files of "settles" and of the same with a bank."""
    from matplotlib.figure import Figure

    way = next(iter(WAYS))
    files = {"no bank": "exploration_settles.json", "a bank of three frames": "exploration_bank.json"}
    table = {name: json.loads((folder / file).read_text())["ways"][way] for name, file in files.items()}
    shown = {
        "unrouted:\nsettles where its\nwindow says": "anchor remembered",
        "routed:\nsettles where its\nroute says": "remembered",
        "routed:\nanother scene\nthan the anchor": "different scene",
    }
    figure = Figure((7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for k, (name, row) in enumerate(table.items()):
        at = [x + (k - 0.5) * 0.38 for x in range(len(shown))]
        bars = axes.bar(at, [row[key] for key in shown.values()], 0.36, color=("#cfcfcf", "#0072b2")[k], label=name)
        axes.bar_label(bars, fmt=lambda x: f"{x:.0%}", fontsize=11, padding=2)
    axes.set_xticks(range(len(shown)), list(shown), fontsize=11)
    axes.set(ylim=(0, 1.25), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("A bank weakens the route", fontsize=12, loc="left")
    axes.legend(frameon=False, fontsize=11, ncols=2, loc="upper right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="folder with autoencoder/ and student/; default: embedded")
    parser.add_argument("--forks", type=int, default=64)
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--num_frames", type=int, default=39)
    parser.add_argument("--num_segments", type=int, default=1)
    parser.add_argument("--event", default="settles", help="only scripts that hold these words")
    parser.add_argument("--bank", type=int, default=0, help="frames of a memory bank; 0: none")
    parser.add_argument("--ways", type=int, default=len(WAYS), help="only the first so many")
    parser.add_argument("--json", help="file that the rows are kept in")
    parser.add_argument("--figure", help="draw the three recorded files as this picture, and stop")
    parser.add_argument("--bank_figure", help="draw what a memory bank changes as this picture, and stop")
    args = parser.parse_args()
    if args.figure:
        draw(Path(args.figure), Path(__file__).parent / "data")
        return
    if args.bank_figure:
        draw_bank(Path(args.bank_figure), Path(__file__).parent / "data")
        return
    if not args.json:
        parser.error("--json FILE is required")
    rest = ("json", "figure", "bank_figure", "ways")
    path, asked = Path(args.json), {key: value for key, value in vars(args).items() if key not in rest}
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {"args": asked, "ways": {}}
    if found["args"] != asked:
        parser.error(f"{path} holds rows of {found['args']}, asked for {asked}: name another file")
    pipeline = load_pocket(folder=args.model)
    scripts = world.prompt_set(args.forks, args.num_segments, seed=7, event=args.event)
    table = found["ways"]
    keys = ["different", "different scene", "different colour", "different place", "remembered", "anchor remembered",
            "spread", "over anchor", "best over anchor", "distance ratio"]  # fmt: skip
    print("| way | " + " | ".join(keys) + " |\n|" + "---|" * (len(keys) + 1))
    for way, how in list(WAYS.items())[: args.ways]:
        if way not in table:
            table[way] = measure(pipeline, scripts, args.num_frames, args.branches, **how, bank=args.bank)
            path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"| {way} | " + " | ".join(f"{table[way][key]:.3f}" for key in keys) + " |", flush=True)


if __name__ == "__main__":
    main()
