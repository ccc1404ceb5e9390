"""Workflows, issue forms, pre-commit hooks, citation and changelog are valid and agree with the code.

They are used elsewhere (on GitHub, in pre-commit); these tests only parse and compare them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_pins_actions_and_runs_existing_targets(path: Path) -> None:
    workflow = read(path)
    assert workflow.keys() >= {"name", True, "permissions", "jobs"}  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    assert steps(path)[0]["uses"].startswith("actions/checkout@")
    for step in steps(path):
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/x@v1")), "pinned by major version"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    made = {target for step in steps(path) for target in re.findall(r"^make ([a-z-]+)", step.get("run", ""))}
    assert made <= targets


def test_every_supported_python_is_tested() -> None:
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert len(supported) == 4
    assert read(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == supported
    (built,) = [step["env"]["CIBW_BUILD"] for step in steps(GITHUB / "workflows" / "wheels.yml") if "env" in step]
    assert built.split() == [f"cp{version.replace('.', '')}-manylinux_x86_64" for version in supported]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_is_complete(name: str) -> None:
    form = read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields)
    assert all(part["attributes"]["label"] for part in fields)


def test_pre_commit_has_the_versions_and_files_of_make_lint() -> None:
    repos = {repo["repo"].rpartition("/")[2]: repo for repo in read(ROOT / ".pre-commit-config.yaml")["repos"]}
    assert repos["ruff-pre-commit"]["rev"] == f"v{CONSTRAINTS['ruff']}"
    (clang_format,) = repos["mirrors-clang-format"]["hooks"]
    native = [path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "cpu" / "native").glob("*.[hc]*")]
    assert native and all(re.search(clang_format["files"], path) for path in native)
    hooks = {hook["id"] for repo in repos.values() for hook in repo["hooks"]}
    assert hooks >= {"ruff-check", "ruff-format", "clang-format", "end-of-file-fixer", "check-yaml"}


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert f'version = "{citation["version"]}"' in PROJECT
    assert citation["authors"] == [{"name": "fastmimi authors"}]
    (paper,) = citation["references"]
    assert paper["doi"].endswith("2410.00037") and len(paper["authors"]) == 8


def test_the_changelog_follows_keep_a_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    assert all(re.fullmatch(r"## \[(Unreleased|\d+\.\d+\.\d+)\]( - \d{4}-\d\d-\d\d)?", line) for line in versions)
    kinds = {line[4:] for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
