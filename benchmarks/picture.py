"""Makes the picture of the product from a finished run: figures/kvpo.webp, which moves, and the still figures/kvpo.png.

    kvpo-min demo && python benchmarks/picture.py

It shows one fork of a held-out prompt with "settles", by the model before training, and the same prompt after it. The
judge chooses. Every video shown is valid in all frames and has its journey in order, and
- before training (which is the fork's anchor) the hero settles where it should, in a scene that is not liked;
- after training, from the same noise, it settles in a scene that it visited and that is liked;
- four branches settle in four scenes, each in the one that its readable frames demand, at least one of them liked.
Of the first few such forks the cleanest is drawn. So this is a picture of what happens, not of how often: that is in
docs/results.md.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import movie
import torch
import yaml
from torch import Tensor

from kvpo_min import chr as routing
from kvpo_min.pipeline import sample, score
from kvpo_min.pocket import load_model, pocket_rewards, world
from kvpo_min.pocket.prompts import EVAL_SEED
from kvpo_min.policies import acting, load_adapter
from kvpo_min.rollout import draw_noise, fork

LENGTH, FORK, NEAREST, BLOCKS = 39, 27, 2, 4  # frames; the event; its routes last to the end
FIRST_SEED = 99999  # of the noise: what `kvpo-min eval` draws
WINDOW = routing.Window()


@dataclass(frozen=True)
class Endings:
    """How videos of heroes that settle end, as the judge sees it; each field [N]."""

    clean: Tensor  # bool: all frames valid, the journey in order, from the event on in one scene that was visited
    remembers: Tensor  # bool: in the scene that the readable frames demand
    scene: Tensor
    distance: Tensor  # from clean frames


def endings(videos: Tensor, scripts: list[str], reads=None) -> Endings:
    """videos [N, T, 3, H, W]; `reads(video, start)`: what a block could read, where it was routed."""
    seen = world.judge(videos)
    ends = world.settled(seen, scripts, reads)  # one a video, since every script settles once
    stays = (seen.scene[:, world.EVENT :] == ends.end[:, None]).all(1)
    clean = seen.valid.all(1) & world.journeys(seen, scripts) & stays & ends.coherent
    return Endings(clean, ends.after == ends.should, ends.end, seen.distance.mean(1))


def unrouted(pipeline, scripts: list[str], seed: int) -> Tensor:
    """Videos [N, T, 3, H, W] that the active policy makes under the ordinary context."""
    return torch.cat([pipeline.decode(latents) for latents in sample(pipeline, scripts, LENGTH, seed)])


@torch.no_grad()
def try_fork(pipeline, script: str, seed: int, num_generations: int) -> tuple[Tensor, Tensor, Endings]:
    """The active policy makes a prefix, routed branches and the anchor, from the noise of `seed`.
    -> videos [G + 1, T, 3, H, W], the frames that branches read at the fork [G, L], and how they end"""
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise(LENGTH // WINDOW.block, len(pipeline.sigmas), (WINDOW.block, *pipeline.latent_shape), generator)
    pool = routing.pool(FORK, WINDOW, NEAREST, BLOCKS)
    routes = routing.uniform_routes(pool, WINDOW.past - NEAREST, num_generations, generator)
    plan = routing.Plan(FORK, pool, routes, BLOCKS)
    texts = [pipeline.embed([script])]
    made = fork(pipeline.backbone, texts, noise, plan, LENGTH, LENGTH, pipeline.sampler(), NEAREST)
    videos = pipeline.decode(made.videos)

    def reads(video: int, start: int) -> Tensor:
        if video == num_generations:
            return routing.ordinary_frames(start, WINDOW)
        return routing.branch_frames(routes, start, WINDOW, NEAREST)[video]

    return videos, routing.branch_frames(routes, FORK, WINDOW, NEAREST), endings(videos, [script] * len(videos), reads)


def four_of(ends: Endings, like: Tensor) -> list[int] | None:
    """Four branches that end in four scenes, the cleanest of each, at least one of them liked; or None."""
    right, best = ends.clean & ends.remembers, {}
    for branch in ends.distance[:-1].argsort().tolist():
        if right[branch]:
            best.setdefault(int(ends.scene[branch]), branch)
    chosen = sorted(list(best.values())[:4])
    return chosen if len(chosen) == 4 and torch.isin(ends.scene[chosen], like).any() else None


@dataclass(frozen=True)
class Found:
    """All that is drawn."""

    script: str
    videos: Tensor  # [5, T, 3, H, W]: four branches and the anchor
    scenes: list[str]  # where they end
    reads: Tensor  # [4, L] at the fork
    after: Tensor  # [T, 3, H, W]
    end: str  # scene where that ends
    distance: float  # of the five from clean frames


def forks_that_show_it(
    pipeline, policies, scripts: list[str], like: Tensor, seeds: int, num_generations: int
) -> Iterator[Found]:
    """Tries every script with noise from every seed: first unrouted, all at once, then forks of those that changed."""
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        with acting(policies, "initial"):
            before = endings(unrouted(pipeline, scripts, seed), scripts)
        films = unrouted(pipeline, scripts, seed)
        after = endings(films, scripts)
        changed = before.clean & before.remembers & ~torch.isin(before.scene, like)
        changed &= after.clean & torch.isin(after.scene, like)
        print(f"seed {seed}: {int(changed.sum())} of {len(scripts)} prompts end as is liked only after training")
        for k in changed.nonzero()[:, 0].tolist():
            with acting(policies, "initial"):
                videos, reads, ends = try_fork(pipeline, scripts[k], seed + 10000 * k, num_generations)
            if chosen := four_of(ends, like):
                shown = [*chosen, -1]
                scenes, end = [world.SCENES[s] for s in ends.scene[shown].tolist()], world.SCENES[int(after.scene[k])]
                print(f"  '{scripts[k]}': {', '.join(scenes)}, after training {end}", flush=True)
                distance = ends.distance[shown].mean().item()
                yield Found(scripts[k], videos[shown], scenes, reads[chosen], films[k], end, distance)


def draw(pipeline, found: Found, like: tuple[str, ...]) -> list:
    """-> the pages of the moving picture; rewards are those of the fork's chunk, as in training."""
    rewards, first = pocket_rewards(like=like), routing.chunk_of(FORK, LENGTH).start
    *branches, anchor = found.videos
    branches = torch.stack(branches)
    totals = rewards.total(score(pipeline, rewards, branches[:, first:], [found.script] * len(branches), first))
    *scenes, at_first = found.scenes
    most = sum(rewards.weights.values())  # each part is at most 1
    labels = [f"{scene}\nreward {total:.2f} of {most:g}" for scene, total in zip(scenes, totals.tolist(), strict=True)]
    liked, ends = [scene in like for scene in scenes], (at_first, f"{found.end} \u2665")
    films = anchor[:FORK], found.reads, branches[:, FORK:]
    return movie.fork_movie(*films, labels, liked, anchor, found.after, found.script, ends, like)


def names_all(script: str) -> bool:
    """Whether the words name the hero's colour and where its journey begins, which tells a reader most."""
    segment = world.parse(script)[0]
    return bool(segment.colour and segment.place and not segment.turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", default="kvpo_demo", help="output_dir of a finished run")
    parser.add_argument("--model", default="", help="folder with autoencoder/ and student/; default: embedded")
    parser.add_argument("--seeds", type=int, default=20, help="noises tried for each prompt, at most")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts, of which half name all")
    parser.add_argument("--branches", type=int, default=16, help="branches of a fork, of which four are shown")
    parser.add_argument("--enough", type=int, default=2, help="forks found, of which the cleanest is drawn")
    parser.add_argument("--output", default="figures/kvpo", help="the pictures, without .webp and .png")
    args = parser.parse_args()
    taste = yaml.safe_load((Path(args.adapter) / "config.yaml").read_text())["like"]
    like = world.liked_scenes(taste)
    pipeline = load_model(args.model, taste)
    policies = load_adapter(pipeline, args.adapter)
    scripts = [script for script in world.prompt_set(args.prompts, 1, EVAL_SEED, "settles") if names_all(script)]
    indices = torch.tensor([world.SCENES.index(name) for name in like])
    forks = forks_that_show_it(pipeline, policies, scripts, indices, args.seeds, args.branches)
    found = list(islice(forks, args.enough))
    if not found:
        raise SystemExit("no fork shows all of it: give more --seeds, or train longer")
    found = min(found, key=lambda one: one.distance)
    pages = draw(pipeline, found, like)
    movie.save_webp(f"{args.output}.webp", pages, movie.FPS)
    pages[-1].save(f"{args.output}.png", optimize=True)
    size = Path(f"{args.output}.webp").stat().st_size
    print(f"'{found.script}': wrote {args.output}.webp ({size / 1e6:.2f} MB) and {args.output}.png")


if __name__ == "__main__":
    main()
