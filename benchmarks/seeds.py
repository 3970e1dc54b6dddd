"""Does `kvpo-min demo` hold with other seeds, processors and thread counts?

    python benchmarks/seeds.py --json benchmarks/data/seeds.json
    python benchmarks/seeds.py --options "--prefix_coef 0" --json benchmarks/data/seeds_no_prefix.json
    python benchmarks/seeds.py --command "train --config configs/long.yaml" --seeds 0,1,2 --capabilities native \
        --json benchmarks/data/seeds_long.json

Runs the demo as a user would, once for each seed, instruction set (what ATEN_CPU_CAPABILITY says; "native": unset) and
number of threads. Kept are its summary, how long it took, start to end, and how long until `liked` of the curve had
risen by .2. A run that is in the file is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KEPT = ("liked", "liked anew", "coherent", "journey", "valid", "remembered")
RISE = 0.2  # of `liked`, on the films of the curve: the seconds until then are kept


def run(command: list[str], seed: int, capability: str, threads: int, options: list[str]) -> dict:
    """One run in a process of its own. -> {"before": {...}, "after": {...}, "seconds": ...}"""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if capability != "native":
        environment["ATEN_CPU_CAPABILITY"] = capability
    with tempfile.TemporaryDirectory() as folder:
        more = ["--seed", str(seed), "--output_dir", f"{folder}/run", *options]
        begun, seconds_to_rise = time.perf_counter(), None
        program = [sys.executable, "-m", "kvpo_min.cli", *command, *more]
        with subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                time.sleep(0.2)
                if not seconds_to_rise and rise(Path(folder, "run", "metrics.jsonl")) >= RISE:
                    seconds_to_rise = round(time.perf_counter() - begun, 1)
        seconds = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(f"{' '.join(program)} ended with exit code {process.returncode}")
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    return kept(summary, seconds) | {"seconds to rise": seconds_to_rise}


def rise(metrics: Path) -> float:
    """By how much the latest `liked` of the curve of held-out films is above its first."""
    whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""  # the last line may be half written
    lines = [json.loads(line) for line in whole.splitlines()]
    shares = [line["eval/liked"] for line in lines if "eval/liked" in line]
    return shares[-1] - lines[0]["eval0/liked"] if shares else 0.0


def kept(summary: dict, seconds: float | None) -> dict:
    found = {when: summary[when] | summary[when]["judge"] for when in ("before", "after")}
    for when, numbers in found.items():  # a share of no films is null
        found[when] = {name: numbers[name] and round(numbers[name], 4) for name in (*KEPT, "reward", "ta", "ta_sem")}
    return found | {"seconds": seconds and round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--command", default="demo", help="of kvpo-min, without seed and output folder")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--capabilities", default="native,avx2,default")
    parser.add_argument("--threads", default="2", help="numbers of threads, commas between")
    parser.add_argument("--options", default="", help="further options, in one string")
    parser.add_argument("--json", required=True, help="file that the runs are kept in")
    args = parser.parse_args()
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    for capability in args.capabilities.split(","):
        for threads in args.threads.split(","):
            for seed in args.seeds.split(","):
                key = f"{capability}, {threads} threads, seed {seed}"
                if key not in found:
                    found[key] = run(args.command.split(), int(seed), capability, int(threads), args.options.split())
                    path.write_text(json.dumps(found, indent=1) + "\n")
                was, now = found[key]["before"], found[key]["after"]
                shown = [f"{name} {was[name]} -> {now[name]}" for name in KEPT]
                print(f"{key}: {', '.join(shown)}; {found[key]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
