"""dvc.yaml: what changes re-runs what depends on it, nothing else; every stage declares the code it runs."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo
from imported_code import imported_modules, module_file

from sparsity_forcing import places
from sparsity_forcing.params import Params
from sparsity_forcing.stages import STAGES

ROOT = Path(__file__).parents[2]
DECLARED = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# How outputs are written, recorded and shown, and which stage comes when; not what is in the outputs.
AROUND = {"files", "lineage", "tracking", "progress", "checkpoints", "stages", "inputs", "torchvision_ops"}
USERS_OWN = {"user_data": ["prepare"], "user_models": ["base"], "user_code": ["profile", "train", "evaluate", "report"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A workspace in which DVC holds every stage for done; the outputs are stand-ins, the graph is the real one."""
    from flows.scratch import copy_workspace

    root = tmp_path_factory.mktemp("finished") / "workspace"
    copy_workspace(ROOT, root, "smoke")
    for stage in DECLARED.values():
        for out in (*stage["outs"], *stage.get("metrics", []), *stage.get("plots", [])):
            path = root / (out if isinstance(out, str) else next(iter(out)))
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.write_text(f"stand-in of {path.name}\n")
            else:
                path.mkdir()
                (path / "file").write_text(f"stand-in of {path.name}\n")
    with contextlib.chdir(root), Repo() as repo:
        repo.commit(force=True)
    return root


def stale(root: Path) -> set[str]:
    with contextlib.chdir(root), Repo() as repo:
        return set(repo.status())


@pytest.fixture
def restored(finished):
    """The finished workspace; what a test edits in it is put back."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and ".git" not in path.parts}
    yield finished
    for path, content in before.items():
        if path.exists() and ".dvc" not in path.parts and path.read_bytes() != content:
            path.write_bytes(content)


def test_nothing_is_stale_after_a_run(finished):
    assert stale(finished) == set()


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("data.digits.test_rows", 30, {"prepare", "profile", "report"}),
        ("model.curriculum", [{"steps": 9}], {"base", "report"}),
        ("sparsity.p", 0.94, {"profile", "train", "evaluate", "report"}),
        ("profile.rows", 13, {"profile", "report"}),
        ("train.beta", 0.1, {"train", "report"}),
        ("train.reward.correct", "numeric", {"profile", "train", "evaluate", "report"}),
        ("evaluate.limit", 5, {"evaluate", "report"}),
        ("report.examples", 2, {"report"}),
        ("tracking.experiment", "another", set()),
        ("seed", 1, {"prepare", "base", "profile", "train", "report"}),  # evaluate: greedy, no draw in it
    ],
)
def test_a_parameter_makes_stale_what_depends_on_it(restored, key, value, expected):
    path = restored / "params.yaml"
    values = yaml.safe_load(path.read_text())
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    path.write_text(yaml.safe_dump(values))
    assert stale(restored) == expected


@pytest.mark.parametrize(
    "path, expected",
    [
        ("user_data/train.jsonl", {"prepare"}),
        ("user_models/mine.safetensors", {"base"}),
        ("user_code/scores.py", {"profile", "train", "evaluate", "report"}),
        ("sparsity_forcing/rl/loss.py", {"train", "report"}),  # the report says what is current of the evidence
        ("metrics/evidence/default.json", {"report"}),
        ("sparsity_forcing/reporting/plots.py", {"report"}),
        ("sparsity_forcing/selection/rules.py", {"profile", "train", "evaluate", "report"}),
        ("data/prepared/file", {"prepare", "profile", "train", "evaluate", "report"}),  # prepare: its output changed
        ("models/policy/file", {"train", "evaluate", "report"}),
        ("README.md", set()),
        ("sparsity_forcing/tracking.py", set()),
    ],
)
def test_a_file_makes_stale_what_depends_on_it(restored, path, expected):
    file = restored / path
    existed = file.exists()
    with file.open("a") as handle:
        handle.write("# changed\n")
    try:
        assert stale(restored) == expected
    finally:
        if not existed:
            file.unlink()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_all_the_code_it_runs(stage):
    """Follows every import, also those inside functions, from the stage's module."""
    deps = DECLARED[stage]["deps"]
    missing = [
        module
        for module in imported_modules(f"stages.{stage}")
        if module not in AROUND and not any(covers(dep, module) for dep in deps)
    ]
    assert missing == []


def test_the_folders_that_params_may_name_are_dependencies():
    named = {folder: [stage for stage in STAGES if folder in DECLARED[stage]["deps"]] for folder in USERS_OWN}
    assert named == USERS_OWN
    assert set(USERS_OWN) == {places.DATA, places.MODELS, places.CODE}
    assert {Path(out).parts[0] for stage in STAGES for out in outputs(stage)} <= set(places.OUTPUTS)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_all_the_parameters_it_reads(stage):
    read = set(re.findall(r"\bparams\.([a-z_]+)\b", module_file(f"stages.{stage}").read_text(encoding="utf-8")))
    declared = {name.partition(".")[0] for name in DECLARED[stage]["params"]}
    assert read & set(Params.model_fields) - {"tracking"} <= declared


def test_graph_is_in_the_order_of_the_stages():
    assert tuple(DECLARED) == STAGES
    for order, stage in enumerate(STAGES):
        later = {out for name in STAGES[order:] for out in outputs(name)}
        assert not later & set(DECLARED[stage]["deps"])


def outputs(stage: str) -> set[str]:
    listed = [*DECLARED[stage]["outs"], *DECLARED[stage].get("metrics", []), *DECLARED[stage].get("plots", [])]
    return {out if isinstance(out, str) else next(iter(out)) for out in listed}


def covers(dep: str, module: str) -> bool:
    path = module_file(module).relative_to(ROOT)
    return path == Path(dep) or Path(dep) in path.parents
