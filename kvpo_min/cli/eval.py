"""`kvpo-min eval`: rewards, standard errors and judge of a model or an adapter on a prompts file."""

from collections.abc import Sequence
from pathlib import Path

from kvpo_min import pocket
from kvpo_min import policies as adapters
from kvpo_min.cli.folders import check_file
from kvpo_min.cli.models import load_real, real_options, run_rewards
from kvpo_min.cli.options import EvalOptions, all_options, parse_options
from kvpo_min.pipeline import check_positions, evaluate, table
from kvpo_min.pocket.prompts import count_segments, video_length
from kvpo_min.pocket.world import read_prompts as read_scripts
from kvpo_min.system import write_json
from kvpo_min.wan.real import WanOptions, read_prompts

OPTIONS = (EvalOptions, WanOptions)


def main(argv: Sequence[str]) -> int:
    options, wan = parse_options("eval", OPTIONS, argv)
    wan, out = real_options(argv, options.model, wan), Path(options.json)
    scripts = read_prompts(options.prompts) if wan else read_scripts(options.prompts)
    num_frames = video_length(options.num_frames, count_segments(scripts, bool(wan)))
    check_file(out)
    if out.exists() and out.samefile(options.prompts):
        raise ValueError(f"--json would replace the prompts, {options.prompts}: name another file")
    rewards = run_rewards(options, wan)
    pipeline = (
        load_real(options.model, scripts, options.prompts, wan)
        if wan
        else pocket.load_model(options.model, options.like)
    )
    check_positions(pipeline, num_frames)
    if options.adapter:
        adapters.load_adapter(pipeline, options.adapter)
    result = evaluate(pipeline, scripts, rewards, num_frames, options.seed, 1 if wan else 32, bar=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"n": len(scripts), "num_frames": num_frames, "seed": options.seed, "prompts": options.prompts}
    about |= {} if wan else {"like": options.like}
    about |= {"model": options.model or pipeline.name, "adapter": options.adapter or None} | all_options(wan)
    write_json(out, result | about | {"weights": dict(rewards.weights)})
    print(table({options.adapter or pipeline.name: result}))
    print(f"\nwritten to {out}")
    return 0
