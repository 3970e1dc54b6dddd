"""Runs notebooks in full and stores what they show: `python notebooks/execute.py [03 solutions/03 ...]`, default all.

Stored are outputs, pictures in 256 colours, and execution counts; left out are timestamps, the state of widgets,
standard error (warnings name paths of the machine; they are printed here) and the bytes of video players, which a code
host does not show anyway.
Each notebook is marked with the hash of its code, so `pytest` sees when it was changed and not run again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import sys
import time
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
PLAYER = "(video players: run this cell to see them)"


def code_hash(notebook) -> str:
    """sha256 of the code cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\x00".join(sources).encode()).hexdigest()


def find(names: list[str]) -> list[Path]:
    """Notebooks whose path in this folder begins with one of `names`; no names: all. Raises FileNotFoundError."""
    every = sorted(HERE.glob("[0-9][0-9]_*.ipynb")) + sorted((HERE / "solutions").glob("[0-9][0-9]_*.ipynb"))
    if not names:
        return every
    relative = {path: str(path.relative_to(HERE)) for path in every}
    for name in names:
        if not any(there.startswith(name) for there in relative.values()):
            raise FileNotFoundError(f"no notebook begins with {name!r}; there are {sorted(relative.values())}")
    return [path for path, there in relative.items() if there.startswith(tuple(names))]


def smaller(png: str) -> str:
    """A picture (base64) in 256 colours, if that takes fewer bytes: a notebook may have 500 KB."""
    from PIL import Image

    out = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return min(base64.b64encode(out.getvalue()).decode(), png, key=len)


def tidy(outputs: list) -> tuple[list, str]:
    """What to store of a cell's outputs, and its standard error."""
    kept, errors = [], ""
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            errors += output.text
        elif WIDGET not in output.get("data", {}):
            if "<video" in output.get("data", {}).get("text/html", ""):
                output.data = nbformat.from_dict({"text/plain": PLAYER})
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # Pillow shows itself as both
                output.data["image/png"] = smaller(output.data["image/png"])
            kept.append(output)
    return kept, errors


def execute(path: Path) -> float:
    """Runs one notebook in its folder and writes it back. -> seconds.

    Nothing is written when a cell raises, or when a cell that nbval compares writes standard error (ValueError)."""
    from nbclient import NotebookClient
    from nbclient.output_widget import OutputWidget

    # Else it answers the kernel on the channel that it waits on, and may then wait for ever (nbclient #312)
    OutputWidget.send = lambda *_, **__: None
    notebook = nbformat.read(path, as_version=4)
    begun = time.perf_counter()
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1200, kernel_name="python3", record_timing=False, resources=resources).execute()
    seconds = time.perf_counter() - begun
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, errors = tidy(cell.outputs)
            if errors:
                print(f"\n{path.name}, cell {cell.id}, standard error:\n{errors}", file=sys.stderr)
            if errors and "NBVAL_CHECK_OUTPUT" in cell.source:
                raise ValueError(f"{path.name}, cell {cell.id} is compared by nbval: it must not write standard error")
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kvpo"] = {"full": True, "sources": code_hash(notebook)}
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return seconds


def main(names: list[str]) -> None:
    if os.environ.get("KVPO_FAST") == "1":
        raise SystemExit("KVPO_FAST is 1: stored outputs must come from full runs. Unset it and run this again")
    print(f"{'notebook':<44}{'seconds':>8}{'KB':>6}")
    total = 0.0
    for path in find(names):
        print(f"{path.relative_to(HERE)!s:<44}", end="", flush=True)  # first the name: it may hang or fail
        seconds = execute(path)
        total += seconds
        print(f"{seconds:8.0f}{path.stat().st_size / 1000:6.0f}", flush=True)
    print(f"{'all':<44}{total:8.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
