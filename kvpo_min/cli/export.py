"""`kvpo-min export`: an adapter in the layout of diffusers, peft or the authors."""

from collections.abc import Sequence
from pathlib import Path

from kvpo_min.cli.folders import check_folder
from kvpo_min.cli.options import ExportOptions, parse_options
from kvpo_min.system import claimed, read_yaml, say
from kvpo_min.wan.checkpoints import export_lora, read_lora, stack_loras

OPTIONS = (ExportOptions,)


def main(argv: Sequence[str]) -> int:
    (options,) = parse_options("export", OPTIONS, argv)
    if not Path(options.adapter).exists():
        raise FileNotFoundError(f"there is no adapter {options.adapter}")
    folder, config = Path(options.output_dir), Path(options.adapter) / "config.yaml"
    ran = read_yaml(config) if config.is_file() else {}
    with claimed(folder):
        check_folder(folder, overwrite=False, how="")
        lora = read_lora(options.adapter, options.lora_alpha)
        if options.lora:
            lora = stack_loras(read_lora(options.lora, options.merged_alpha), lora)
        path = export_lora(lora, folder, options.layout)
    print(f"{path}: rank {lora.rank}, alpha {lora.alpha:g}, {len(lora.modules)} layers")
    if ran.get("model"):
        print(f"to be loaded on {ran['model']}")
    if ran.get("lora") and not options.lora:
        say(f"with {ran['lora']} merged into it; --lora {ran['lora']} would put both into one LoRA")
    return 0
