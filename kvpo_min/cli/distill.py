"""`kvpo-min distill`: the pocket model from nothing."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpo_min.cli.folders import check_folder
from kvpo_min.cli.options import parse_options
from kvpo_min.pocket import distill
from kvpo_min.system import claimed, finite, write_json, writes

OPTIONS = (distill.DistillConfig,)


def main(argv: Sequence[str]) -> int:
    """Stages resume by themselves, so a folder that holds stages is resumed; a folder with anything else is refused."""
    (config,) = parse_options("distill", OPTIONS, argv)
    folder = Path(config.output_dir)
    with claimed(folder) if writes() else contextlib.nullcontext():
        return make(config, folder)


def make(config, folder: Path) -> int:
    started = any((folder / name).exists() for name in ("config.json", "autoencoder", "teacher", "student"))
    check_folder(folder, overwrite=started, how=", or give the folder of an earlier `kvpo-min distill`")
    made = distill.distill(config)
    if isinstance(made, Mapping):
        write_json(folder / "report.json", made)
        print(json.dumps(finite(made), indent=2))
    weights = folder / "weights"  # fp16, ready to be loaded; the stages' own folders are what a resumed run reads
    print(f"the model is in {weights}: give it to the other commands with --model {weights}")
    return 0
