"""Makes the page to play with: computes its records where they are missing, and from them docs/page/.

    python benchmarks/page.py                           # the demo's recipe, three tastes
    python benchmarks/page.py --only_page               # the page alone, from records that are there
    python benchmarks/page.py --only_lines              # after code moved: the lines that the page links to
    python benchmarks/page.py --record try --max_train_steps 2 --groups_per_update 2   # options of `kvpo-min demo`

`--record DIR` (page_records) keeps each stage in a file of its own: lattice.npz, then run_TASTE.npz for each taste. A
stage that is there is not computed again unless its recipe has changed, so the command can be stopped between stages.

- lattice: one fork before any training, and a branch for every choice of four of nine frames of its past, all from one
  noise; then the same fork with the ordinary past and fresh noise from the fork on.
- run: `kvpo-min demo --like TASTE`, the same numbers, and between its updates films of held-out prompts.
"""

import argparse
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvpo_min import chr as routing
from kvpo_min import kvpo
from kvpo_min.cli.demo import DEFAULTS, OPTIONS
from kvpo_min.cli.models import run_rewards
from kvpo_min.cli.options import all_options, parse_options
from kvpo_min.compare.baselines import explore
from kvpo_min.pipeline import sample, score
from kvpo_min.pocket import load_model, world
from kvpo_min.pocket.prompts import run_prompts
from kvpo_min.policies import add_policies
from kvpo_min.rollout import draw_noise, fork
from kvpo_min.train import train
from kvpo_min.tve import gibbs_log_prob

ROOT = Path(__file__).parent.parent
TASTES = ("beach,meadow,forest", "night,snow", "dusk,forest")
SCRIPT = "a red disc travels from the forest and settles"
SEED = 0  # of the lattice's noise: chosen because many of its branches settle where their frames say
CARDS = (7, 9, 11, 13, 15, 17, 19, 21, 23)  # frames that the reader may choose from, three of each of three scenes
CHOSEN, NEAREST, FORK, LENGTH, BLOCKS = 4, 2, 27, 33, 2  # frames, frames, the fork, frames, routed blocks
FRESH = 8  # draws of fresh noise
PROMPTS, NOISES = 3, 5  # held-out prompts that are filmed after every update, and films of each
PAIRS = 3  # films of a taste that are shown before and after
QUALITY = 80  # of the pictures (WebP)
WINDOW = routing.Window()


def to_bytes(pixels: Tensor) -> np.ndarray:
    """[..., 3, H, W] in [0, 1] -> uint8 [..., H, W, 3]"""
    return (pixels.clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def ends_of(pixels: Tensor) -> list[int]:
    """The scene that most of the last three frames show, a number a film. pixels [N, T, 3, H, W]"""
    return world.most(world.judge(pixels[:, -3:]).scene).tolist()


def numbers(values, digits: int = 3) -> list:
    return np.round(np.asarray(values, dtype=float), digits).tolist()


# ------------------------------------------------------------------------------------------------------------- records


@torch.no_grad()
def record_lattice(config, options) -> tuple[dict, dict]:
    """One fork, all its routes and a few fresh noises. -> what is said of it, and its films"""
    pipeline, rewards, like = load_model("", options.like), run_rewards(options), world.liked_scenes(options.like)
    routes = torch.tensor(list(itertools.combinations(CARDS, CHOSEN)))
    plan = routing.Plan(FORK, range(WINDOW.sink, FORK - NEAREST), routes, BLOCKS)
    generator = torch.Generator().manual_seed(SEED)
    noise = draw_noise(LENGTH // WINDOW.block, len(pipeline.sigmas), (WINDOW.block, *pipeline.latent_shape), generator)
    few = routing.Plan(FORK, plan.pool, routes[:FRESH], BLOCKS)
    films, ends, totals = {}, {}, {}
    for name, (z, its_plan) in {
        "routes": (noise, plan), "fresh": explore("fresh", few, noise, generator, WINDOW.block),
    }.items():  # fmt: skip
        made = fork(pipeline.backbone, [pipeline.embed([SCRIPT])], z, its_plan, LENGTH, LENGTH, pipeline.sampler(),
                    NEAREST, branch_batch=16)  # fmt: skip
        past, pixels = pipeline.decode(made.videos[-1:, :FORK]), pipeline.decode(made.videos[:, FORK:])
        chunk = routing.chunk_of(FORK, LENGTH)
        whole = torch.cat([past[:, chunk.start :].expand(len(pixels), -1, -1, -1, -1), pixels], 1)
        totals[name] = rewards.total(score(pipeline, rewards, whole, [SCRIPT] * len(whole), chunk.start)).tolist()
        films[name], ends[name] = to_bytes(pixels), ends_of(pixels)  # the anchor, the same in both, is last
    scene = world.judge(past).scene[0]
    reads = routing.branch_frames(routes, FORK, WINDOW, NEAREST)
    votes = torch.nn.functional.one_hot(scene[reads[:, WINDOW.sink :]], len(world.SCENES)).sum(1)  # [routes, scenes]
    most = votes.gather(1, torch.tensor(ends["routes"][:-1])[:, None])[:, 0] == votes.amax(1)
    print(f"lattice: {most.float().mean():.0%} of {len(routes)} branches settle where most of their frames are")
    said = {
        "script": SCRIPT, "cards": CARDS, "chosen": CHOSEN, "fork": FORK, "like": list(like),
        "scenes": [world.SCENES[s] for s in scene.tolist()],
        "ordinary": routing.ordinary_frames(FORK, WINDOW).tolist(),
        "routes": ["-".join(map(str, route)) for route in routes.tolist()],
        "ends": [world.SCENES[s] for s in ends["routes"]], "rewards": numbers(totals["routes"], 2),
        "freshEnds": [world.SCENES[s] for s in ends["fresh"]], "freshRewards": numbers(totals["fresh"], 2),
        "follow": int(most.sum()),
    }  # fmt: skip
    return said, films | {"past": to_bytes(past)}


@torch.no_grad()
def look(pipeline, rewards, scripts: list[str], n_frames: int, seed: int = 99999) -> tuple[dict, Tensor]:
    """-> what the judge and the reward see in unrouted films of these prompts, and their pixels"""
    pixels = torch.cat([pipeline.decode(z) for z in sample(pipeline, scripts, n_frames, seed)])
    totals = rewards.total(score(pipeline, rewards, pixels, scripts, 0))
    reading = world.judge(pixels)
    judged = pipeline.judge(reading, scripts)
    seen = {name: judged[name] for name in ("liked", "coherent", "journey")} | {"reward": totals.mean().item()}
    return seen | {"ends": world.settled(reading, scripts).end.tolist()}, pixels


def record_run(config, options) -> tuple[dict, dict]:
    """The demo's training, looked at after every update. -> what is said of it, and its films"""
    pipeline, rewards = load_model(options.model, options.like), run_rewards(options)
    scripts, held_out = run_prompts(config, options.prompts, options.event, options.eval_prompts)
    like = world.liked_scenes(options.like)
    policies = add_policies(pipeline, config)
    states, groups, films, prompts = [], [], [], []

    def show(done: int) -> Tensor:
        seen, pixels = look(pipeline, rewards, held_out, config.num_frames)
        if not prompts:  # those that leave something to learn
            open_ = [s for s, end in zip(held_out, seen["ends"], strict=True) if world.SCENES[end] not in like]
            prompts.extend((open_ or held_out)[:PROMPTS])
        each = [s for s in prompts for _ in range(NOISES)]
        some, moving = look(pipeline, rewards, each, config.num_frames, seed=7)
        films.append(to_bytes(moving).reshape(len(prompts), NOISES, *to_bytes(moving).shape[1:]))
        states.append(seen | {"films": np.reshape(some["ends"], (len(prompts), NOISES)).tolist()})
        print(f"{options.like}: {done} updates, liked {seen['liked']:.2f}, journey {seen['journey']:.2f}", flush=True)
        return pixels

    before = show(0)
    for step in train(pipeline, scripts, rewards, config, policies):
        groups.append(branches(pipeline, policies, config, step))
        after = show(step.step + 1)
        del step
    said = {
        "like": list(like), "prompts": prompts, "heldOut": held_out, "states": states,
        "groups": [{key: value for key, value in group.items() if key != "pixels"} for group in groups],
    }  # fmt: skip
    moving = {"films": np.stack(films), "before": to_bytes(before), "after": to_bytes(after)}
    return said, moving | {"groups": np.stack([group["pixels"] for group in groups])}


@torch.no_grad()
def branches(pipeline, policies, config, step) -> dict:
    """The first group of an update: how its branches ended, what they were worth, and what was done to them."""
    group = step.groups[0]
    A, p = group.advantages, group.log_p.exp()
    later = kvpo.energies_of(pipeline, policies, config, group.rollout).sum((1, 2))  # after the update
    total = {
        name: sum(step.weights[key] * value for key, value in part.items())
        for name, part in (("reward", group.rewards), ("anchor", group.anchor))
    }
    return {
        "script": group.script,
        "over": float(np.mean([_over(each, step.weights) for each in step.groups])),
        "ends": ends_of(group.videos),
        "reward": numbers(total["reward"]), "anchor": round(float(total["anchor"]), 3),
        "A": numbers(A), "force": numbers(A - p * A.sum()),  # -dL/dE but for a factor, where the ratio is 1
        "energy": numbers(group.energies.sum((1, 2))), "p": numbers(p, 4),
        "later": numbers(gibbs_log_prob(later, step.tau).exp()[: len(p)], 4),
        "pixels": to_bytes(group.videos[:, -1]),
    }  # fmt: skip


def _over(group, weights) -> float:
    """Mean reward of a group's branches minus the anchor's."""
    return sum(w * float(group.rewards[name].mean() - group.anchor[name]) for name, w in weights.items())


def keep(path: Path, recipe: dict, make) -> None:
    """One stage: what it made is stored with its recipe, and made again only when the recipe is another."""
    if path.exists() and read(path)[0]["recipe"] == recipe:
        print(f"{path} is there")
        return
    begun = time.perf_counter()
    said, films = make()
    said |= {"recipe": recipe, "seconds": round(time.perf_counter() - begun)}
    aside = path.with_suffix(".aside.npz")  # so that a stage that is stopped leaves no half of a file
    np.savez_compressed(aside, said=np.array(json.dumps(said)), **films)
    aside.replace(path)
    print(f"{path}: {said['seconds']} s", flush=True)


def read(path: Path) -> tuple[dict, dict]:
    with np.load(path) as stored:
        return json.loads(str(stored["said"])), {name: stored[name] for name in stored.files if name != "said"}


# ---------------------------------------------------------------------------------------------------------------- page


def sheet(path: Path, rows: np.ndarray) -> list[int]:
    """Films as the rows of one picture: [films, frames, H, W, 3]. -> how many rows and columns"""
    n, t, h, w, _ = rows.shape
    picture = rows.transpose(0, 2, 1, 3, 4).reshape(n * h, t * w, 3)
    Image.fromarray(picture).save(path, quality=QUALITY, method=6)
    return [n, t]


def named(scenes) -> list:
    """Numbers of scenes, nested as they may be -> their names"""
    return [named(s) if isinstance(s, list) else world.SCENES[s] for s in scenes]


def build(folder: Path, record: Path, tastes) -> None:
    """docs/page/ from the records, and the numbers of lines in docs/index.html."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.webp"):
        old.unlink()
    said, films = read(record / "lattice.npz")
    data = {"lattice": {k: v for k, v in said.items() if k not in ("recipe", "seconds")}, "runs": []}
    for name in ("past", "routes", "fresh"):
        sheet(folder / f"{name}.webp", films[name])
    sheet(folder / "scenes.webp", to_bytes(world.scenes())[None])
    data["scenes"] = list(world.SCENES)
    for k, like in enumerate(tastes):
        data["runs"].append(run_page(folder, *read(record / f"run_{slug(like)}.npz"), k))
    text = json.dumps(data, separators=(",", ":")).replace("],", "],\n")
    (folder / "data.js").write_text(f"// Made by benchmarks/page.py from recorded runs.\nconst DATA = {text};\n")
    index = write_lines(folder)
    size = sum(path.stat().st_size for path in [index, *folder.iterdir()])
    print(f"{index} and {folder}/: {size / 1e6:.2f} MB")


def run_page(folder: Path, said: dict, films: dict, number: int) -> dict:
    """Pictures of one run; the first one's updates are shown in full."""
    like, states = said["like"], said["states"]
    before, after = named(states[0]["ends"]), named(states[-1]["ends"])
    last = np.concatenate([films["before"][:, -1:], films["after"][:, -1:]], 1)  # [prompts, 2, H, W, 3]
    sheet(folder / f"ends{number}.webp", last.transpose(1, 0, 2, 3, 4))
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a not in like and b in like]
    pairs = [*changed, *(i for i in range(len(before)) if i not in changed)][:PAIRS]
    sheet(folder / f"pairs{number}.webp", np.concatenate([films["before"][pairs], films["after"][pairs]]))
    out = {
        "like": like, "frames": films["films"].shape[3], "prompts": len(before), "before": before, "after": after,
        "pairs": [{"film": i, "script": said["heldOut"][i]} for i in pairs],
        **{key: numbers([s[key] for s in states]) for key in ("liked", "coherent", "journey", "reward")},
    }  # fmt: skip
    if number:
        return out
    liked = np.array([[[end in like for end in row] for row in named(s["films"])] for s in states]).sum(2)
    best = int((liked[-1] - liked[0]).argmax())  # of the filmed prompts, the one that changed most
    moving = films["films"][:, best]  # [updates + 1, films, T, H, W, 3]
    sheet(folder / "updates.webp", moving.reshape(-1, *moving.shape[2:]))
    sheet(folder / "groups.webp", films["groups"])
    groups = [group | {"ends": named(group["ends"]), "over": round(group["over"], 3)} for group in said["groups"]]
    ends = [named(s["films"][best]) for s in states]
    return out | {"script": said["prompts"][best], "films": ends, "groups": groups}


def write_lines(folder: Path) -> Path:
    """Links of index.html to code lead to the line where what they name is defined:
    <a href="../kvpo_min/tve.py#L1" data-def="def gibbs_log_prob">"""

    def line(match: re.Match) -> str:
        path, start = match["path"], match["start"]
        lines = (ROOT / "docs" / path).read_text(encoding="utf-8").splitlines()
        found = [n for n, text in enumerate(lines, 1) if text.lstrip().startswith(start)]
        if len(found) != 1:
            raise SystemExit(f"{path} must have one line that begins with '{start}', found {len(found)}")
        return f'href="{path}#L{found[0]}" data-def="{start}"'

    index = folder.parent / "index.html"
    html = index.read_text(encoding="utf-8")
    index.write_text(re.sub(r'href="(?P<path>[^"#]+)#L\d+" data-def="(?P<start>[^"]+)"', line, html), encoding="utf-8")
    return index


def slug(like: str) -> str:
    return like.replace(",", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", default="page_records", help="folder of the recorded stages")
    parser.add_argument("--page", default=str(ROOT / "docs" / "page"), help="folder of the page's data")
    parser.add_argument("--only_page", action="store_true", help="compute nothing")
    parser.add_argument("--only_lines", action="store_true", help="mend the page's links to lines of code, and stop")
    args, rest = parser.parse_known_args()
    record = Path(args.record)
    if args.only_lines:
        write_lines(Path(args.page))
        return
    if not args.only_page:
        record.mkdir(parents=True, exist_ok=True)
        for like in (None, *TASTES):
            config, options = parse_options("demo", OPTIONS, [*rest, "--like", like or TASTES[0]], DEFAULTS)
            if like is None:
                recipe = {"cards": list(CARDS), "script": SCRIPT, "seed": SEED, "weights": [options.vq, options.mq,
                          options.ta], "sizes": [CHOSEN, NEAREST, FORK, LENGTH, BLOCKS, FRESH]}  # fmt: skip
                keep(record / "lattice.npz", recipe, lambda c=config, o=options: record_lattice(c, o))
            else:
                path = record / f"run_{slug(like)}.npz"
                keep(path, all_options(config, options), lambda c=config, o=options: record_run(c, o))
    build(Path(args.page), record, TASTES)


if __name__ == "__main__":
    main()
