"""`kvpo-min distill`: the pocket model from nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpo_min.cli.folders import check_folder
from kvpo_min.cli.options import parse_options
from kvpo_min.pocket import distill
from kvpo_min.system import finite, write_json

OPTIONS = (distill.DistillConfig,)


def main(argv: Sequence[str]) -> int:
    """Stages resume by themselves, so a folder that holds stages is resumed; a folder with anything else is refused."""
    (config,) = parse_options("distill", OPTIONS, argv)
    folder = Path(config.output_dir)
    started = any((folder / stage).is_dir() for stage in ("autoencoder", "teacher", "student"))
    check_folder(folder, overwrite=started, how=", or give the folder of an earlier `kvpo-min distill`")
    made = distill.distill(config)
    if isinstance(made, Mapping):
        write_json(folder / "report.json", made)
        print(json.dumps(finite(made), indent=2))
    weights = folder / "weights"  # fp16, ready to be loaded; the stages' own folders are what a resumed run reads
    print(f"the model is in {weights}: give it to the other commands with --model {weights}")
    return 0
