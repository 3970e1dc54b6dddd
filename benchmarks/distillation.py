"""Teacher against student: what the judge sees in held-out videos.

    python benchmarks/distillation.py --json benchmarks/data/distillation.json

Teacher (50 steps, ODE), student (4 steps) and the undistilled teacher at 4 steps (the student's sampler), on 256
held-out prompts: short (one prompt, 39 latent frames) and long (four segments, 147 latent frames). Each row is
written as soon as it is there, and rows that are in the file already are not computed again.
"""

import argparse
import json
import time
from pathlib import Path

from kvpo_min.pipeline import evaluate
from kvpo_min.pocket import load_pocket, pocket_rewards, world
from kvpo_min.tve import schedule

MODELS = {
    "student, 4 steps": dict(name="student"),
    "undistilled teacher, 4 steps": dict(name="teacher"),
    "teacher, 50 steps": dict(name="teacher", sigmas=schedule(50, world.SHIFT), eta=0.0),
}
MODES = {"short": dict(num_frames=39, n_segments=1, seed=11), "long": dict(num_frames=147, n_segments=4, seed=12)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="folder with autoencoder/, teacher/, student/; default: embedded")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--modes", default="short,long")
    parser.add_argument("--models", default="student,undistilled,teacher", help="which rows, by their first word")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.exists() else {}
    for mode in args.modes.split(","):
        how = MODES[mode]
        scripts = world.prompt_set(args.prompts, how["n_segments"], how["seed"])
        for label, model in MODELS.items():
            key = f"{mode}: {label}"
            if label.split(",")[0].split()[0] not in args.models.split(","):
                continue
            if key not in rows:
                begun, model = time.time(), dict(model)
                pipeline = load_pocket(model.pop("name"), args.model)
                result = evaluate(pipeline, scripts, pocket_rewards(), how["num_frames"], bar=True, **model)
                rows[key] = result | {"seconds": round(time.time() - begun), "prompts": args.prompts}
                path.write_text(json.dumps(rows, indent=1))
            judge = rows[key]["judge"]
            numbers = [*judge.values(), rows[key]["reward"]]
            print(f"| {key} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
