"""`kvpo-min sample`: an mp4 and a contact sheet a script."""

from collections.abc import Sequence
from pathlib import Path

from kvpo_min import pocket, viz
from kvpo_min import policies as adapters
from kvpo_min.cli.folders import check_folder
from kvpo_min.cli.models import load_real, real_options
from kvpo_min.cli.options import SampleOptions, parse_options
from kvpo_min.cli.run import REAL_FPS
from kvpo_min.pipeline import check_positions, sample
from kvpo_min.pocket.prompts import count_segments, video_length
from kvpo_min.pocket.world import read_prompts as read_scripts
from kvpo_min.prompts import read_script
from kvpo_min.rewards import check_finite
from kvpo_min.system import claimed
from kvpo_min.viz.report import slug, smaller, try_video
from kvpo_min.wan.real import WanOptions, read_prompts

OPTIONS = (SampleOptions, WanOptions)


def main(argv: Sequence[str]) -> int:
    options, wan = parse_options("sample", OPTIONS, argv)
    wan = real_options(argv, options.model, wan)
    read = read_prompts if wan else read_scripts
    scripts = read(options.prompts) if options.prompts else [read_script(options.script) if wan else options.script]
    counts = [count_segments([script], bool(wan)) for script in scripts]
    lengths = {n: video_length(options.num_frames, n) for n in sorted(set(counts))}
    folder = Path(options.output_dir)
    with claimed(folder):
        check_folder(folder, options.overwrite_output_dir)
        try_video()
        return make(options, wan, scripts, counts, lengths, folder)


def make(options, wan, scripts: list[str], counts: list[int], lengths: dict[int, int], folder: Path) -> int:
    """counts: segments of the scripts; lengths: frames of the videos of so many segments"""
    if wan:
        pipeline = load_real(options.model, scripts, options.prompts or folder / "script", wan)
    else:
        pipeline = pocket.load_model(options.model)
    check_positions(pipeline, max(lengths.values()))
    if options.adapter:
        adapters.load_adapter(pipeline, options.adapter)
    for earlier in (*folder.glob("[0-9][0-9][0-9]_*.mp4"), *folder.glob("[0-9][0-9][0-9]_*.png")):
        earlier.unlink()  # there are some with --overwrite_output_dir alone
    batch, fps = (1, REAL_FPS) if wan else (32, 8)
    for n, length in lengths.items():  # one batch holds scripts of the same number of segments
        index = iter([k for k, count in enumerate(counts) if count == n])
        part = [script for script, count in zip(scripts, counts, strict=True) if count == n]
        for latents in sample(pipeline, part, length, options.seed, batch, bar=True):
            for pixels in pipeline.decode(latents):
                check_finite("the pixels of the video are", pixels)
                k = next(index)
                path = folder / f"{k:03d}_{slug(scripts[k])}.mp4"
                viz.save_video(path, pixels, fps)
                viz.contact_sheet(smaller(pixels[None]), [scripts[k]]).save(path.with_suffix(".png"))
                print(path)
    return 0
