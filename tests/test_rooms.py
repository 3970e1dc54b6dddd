"""Who may import whom, and that the steps of an update are the update."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from kvpo_min import kvpo
from kvpo_min.checks import bench
from kvpo_min.policies import adapter_weights
from kvpo_min.rewards import Mixture

ROOT = Path(__file__).parents[1]
LOOP = {
    "bank",
    "chr",
    "tve",
    "step",
    "grpo",
    "rewards",
    "kvpo",
    "rollout",
    "train",
    "config",
    "pipeline",
    "policies",
    "resume",
    "system",
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "kvpo_min").rglob("*.py")
}


def imported(name: str) -> set[str]:
    """Modules of the package that a module imports, anywhere but for type checkers."""
    tree, found = ast.parse(FILES[name].read_text(encoding="utf-8")), set()
    skipped = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If)
               and getattr(node.test, "id", "") == "TYPE_CHECKING" for n in ast.walk(node)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & set(FILES)) or {node.module}
    return found & set(FILES)


GRAPH = {name: imported(name) for name in FILES}


def test_imports_have_no_circle():
    ordinary = {name: others - {"kvpo_min"} for name, others in GRAPH.items()}
    inits = {name for name, path in FILES.items() if path.name == "__init__.py"}
    for name in inits - {"kvpo_min"}:  # a package may be built from its files: they must not need it
        assert not any(name in ordinary[other] for other in ordinary[name] if other.startswith(f"{name}.")), name
    TopologicalSorter(ordinary).prepare()  # raises CycleError with the circle


def test_nobody_imports_the_command_line():
    for name, others in GRAPH.items():
        if not name.startswith("kvpo_min.cli"):
            assert not [other for other in others if other.startswith("kvpo_min.cli")], name


@pytest.mark.parametrize("name", sorted(LOOP))
def test_core_and_loop_import_nothing_of_the_apparatus(name):
    assert {other.removeprefix("kvpo_min.") for other in GRAPH[f"kvpo_min.{name}"]} - {"kvpo_min"} <= LOOP


def test_no_patches_in_the_package():
    for name, path in FILES.items():
        assert "unittest" not in path.read_text(encoding="utf-8"), name


def test_the_update_is_its_steps(make_pipeline):
    """`kvpo.update` leaves the loss and the gradient of the six steps that `bench` calls one by one."""
    rewards = Mixture({"std": lambda videos, prompts: videos.std((1, 2, 3, 4))}, {"std": 1.0})
    config = bench.make_config(bench.BenchOptions(num_generations=3))
    config = bench.replace(config, tau=0.1, rank=2, lora_alpha=2)
    subject = bench.make_subject(make_pipeline(), rewards, config)
    task = bench.make_task(subject.pipeline, config)
    loss, gradient = bench.outcome(subject, bench.ours(subject, config, task, bench.Meter()))
    with torch.no_grad():
        for name, weight in adapter_weights(subject.policies, "default").items():
            weight.copy_(subject.start[name])
            weight.grad = None
    group = kvpo.update(subject.pipeline, subject.policies, rewards, config, task, config.tau)
    assert group.loss == loss
    norm = torch.nn.utils.get_total_norm([w.grad for w in subject.weights.values()])
    clipped = torch.cat([w.grad.flatten() for w in subject.weights.values()]) * min(1.0, 1e9 / norm.item())
    assert_close(clipped, gradient, rtol=1e-6, atol=0)
