"""What README.md and docs/ promise is there: the commands, the program, the files, functions and tests they name."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvpo_min.pocket import world
from kvpo_min.train import Step

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def marked(name):
    """The code block after the marker <!-- name -->."""
    found = re.findall(rf"^<!-- {name} -->\n```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"README.md must have one code block after <!-- {name} -->"
    return found[0].rstrip("\n")


# ---------------------------------------------------------------- commands and installation


def test_the_two_commands():
    assert marked("demo") == "pip install -e . -c constraints.txt && kvpo-min demo"
    assert marked("test") == 'pip install -e ".[dev]" -c constraints.txt && pytest'


def test_ci_runs_the_command_of_the_readme():
    done = subprocess.run([ROOT / ".ci" / "run", "--print"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == marked("test")


def requirements():
    """Every requirement of the package and of its extras."""
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    every = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    return [r for r in every if canonicalize_name(r.name) != canonicalize_name(PROJECT["name"])]


def test_the_snapshot_pins_every_requirement_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"  # no local version: that would admit one build only
    for requirement in requirements():
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"constraints.txt has {pin}, pyproject.toml wants {requirement}"


def test_bounds_are_lower_ones():
    for requirement in requirements():
        operators = {s.operator for s in requirement.specifier}
        allowed = {">=", "<"} if requirement.name == "imageio-ffmpeg" else {">="}
        assert operators == allowed, f"{requirement}"


def test_everything_that_is_imported_is_required():
    needed = {canonicalize_name(r.name) for r in map(Requirement, PROJECT["dependencies"])}
    known_as = {"yaml": "pyyaml", "PIL": "pillow"}
    imported = set()
    elsewhere = ROOT / "kvpo_min" / "reward_models" / "workers"  # run in environments of their own (envs/*.txt)
    for path in set((ROOT / "kvpo_min").rglob("*.py")) - set(elsewhere.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    # Loggers are chosen with --report_to and installed by whoever chooses them.
    optional = {"tensorboard", "trackio", "wandb"}
    for name in imported - set(sys.stdlib_module_names) - {"kvpo_min"} - optional:
        assert canonicalize_name(known_as.get(name, name)) in needed, f"{name} is imported, but not in pyproject.toml"


# ---------------------------------------------------------------- the program


def test_the_program_runs_as_printed(tmp_path):
    program = marked("program")
    assert len(program.splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [int(step) for step, _, _ in lines] == [0, 1]
    assert all(0 < float(reward) < 3 for _, reward, _ in lines)  # a sum of three scores between 0 and 1
    assert all(script.startswith("a ") for _, _, script in lines)
    assert not list(tmp_path.iterdir())  # it promises no files, and leaves none


# ---------------------------------------------------------------- links and names


def links(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    return text, [*inline, *defined.values()], defined


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page):
    for target in links(page)[1]:
        if not re.match(r"[a-z]+:", target):
            path = ((ROOT / page).parent / target.split("#")[0]).resolve()
            assert path.is_relative_to(ROOT) and path.exists(), f"{page} links to {target}, which does not exist"


@pytest.mark.parametrize("page", ["docs/paper_map.md", "docs/authors_code.md"])
def test_every_line_of_the_authors_code_is_linked(page):
    text, _, defined = links(page)
    used = set(re.findall(r"\[((?:KV|DS|ST|CM|WM|WW|SC|LU|PS|TR|YL|RW):[\d-]+)\](?!:)", text))
    assert len(used) > 30 and used == set(defined)
    for name, target in defined.items():
        first, _, last = name.split(":")[1].partition("-")
        assert target.endswith(f"#L{first}" + (f"-L{last}" if last else "")), name
        assert target.startswith("https://github.com/Richard-Zhang-AI/KVPO/blob/7703196"), name


@pytest.mark.parametrize("page", PAGES)
def test_functions_and_tests_that_are_named_exist(page):
    """`chr.py::pool` is a function or class of that file; `test_core.py::test_safety` is a test."""
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / page).read_text(encoding="utf-8")):
        folder = "tests" if file.startswith("test_") else "kvpo_min"
        path = ROOT / folder / file
        assert path.exists(), f"{page} names {file}, which does not exist"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert name in names, f"{page} names {file}::{name}, which does not exist"


@pytest.mark.parametrize("page", ["docs/paper_map.md", "docs/authors_code.md"])
def test_every_row_is_there_and_names_a_test(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "docs/authors_code.md":
        assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == [str(n) for n in range(1, 15)]
        parts = {"Dead or misleading": 17, "Cost of an update": 17}
    else:
        parts = {"Paper, authors' code and our default": 9}
    for part, n_rows in parts.items():
        table = text.split(f"\n## {part}")[1].split("\n## ")[0].split("\n[")[0]
        assert len(re.findall(r"^\| (?!what|topic|-)", table, re.MULTILINE)) == n_rows, part
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| what", "| #", "| topic")):
            assert "`test_" in line.rstrip(" |").split("|")[-1], f"no test is named in: {line[:60]}"
            # A bar inside a cell would shift the columns of GitHub's table.
            assert line.count("|") == (5 if re.match(r"\| \d+ \|", line) else 6), line[:60]


def tree_of(page):
    """The files that a page lists: indented names under the folder that stands before them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    block = re.search(r"^#+ (?:Files|The files)\n\n```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE).group(1)
    folder, listed = "", {}
    for line in block.splitlines():
        name, _, comment = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name
        listed[name if name == folder else folder + name] = comment.strip()
    return listed


@pytest.mark.parametrize("page", ["README.md", "docs/files.md"])
def test_the_file_tree(page):
    for name, comment in tree_of(page).items():
        assert (ROOT / name).exists(), f"{page} lists {name}, which does not exist"
        assert comment or name.count("/") == 1, f"{page} says nothing about {name}"


def test_every_file_and_page_is_listed():
    listed = set(tree_of("docs/files.md"))
    package = (str(p.relative_to(ROOT)) for folder in ("kvpo_min", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
    assert {name for name in package if not name.endswith("__init__.py")} <= listed
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")} <= listed


def test_every_logged_number_is_explained():
    group = SimpleNamespace(
        rewards={"vq": torch.tensor([0.1, 0.2])}, anchor={"vq": torch.tensor(0.1)}, energies=torch.rand(2, 3, 4),
        ratio=torch.ones(2), advantages=torch.ones(2), safe=True, loss=0.0, kl=0.0, entropy=0.6, clip_fraction=0.0,
        prefix_drift=0.0,
    )  # fmt: skip
    keys = Step(0, [group], 0.01, 1.0, 1e-4, 1.0, {"vq": 1.0}).log()
    keys |= world.correctness(world.judge(torch.zeros(1, 3, 3, 64, 64)), ["a disc"])
    explained = re.findall(r"`([^`]+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"))
    for key in keys:
        assert key.replace("/vq/", "/{name}/") in explained, f"docs/metrics.md does not explain {key}"
