"""What stands at the front door agrees with itself: versions, changelog, links, continuous integration, issue form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

METADATA: dict[str, Any] = json.loads(Path("configs/metadata.json").read_text())
CHANGELOG = Path("CHANGELOG.md").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md")


def parsed(path: str) -> dict[str, Any]:
    content = yaml.safe_load(Path(path).read_text())
    assert isinstance(content, dict)
    return content


def entries(changelog: str) -> dict[str, str]:
    """The first line under the heading of each version, in the order of the file."""
    return dict(re.findall(r"^## \[(\d+\.\d+\.\d+)\].*\n\n(.+)$", changelog, re.MULTILINE))


def prose(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_a_door() -> None:
    assert len(Path("README.md").read_text().split()) <= 700


def test_changelog_is_the_metadatas() -> None:
    assert entries(CHANGELOG) == METADATA["changelog"]
    assert list(entries(CHANGELOG)) == sorted(METADATA["changelog"], key=lambda v: [*map(int, v.split("."))])[::-1]


def test_one_version() -> None:
    project = re.search(r'^version = "(.+)"$', Path("pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    newest = next(iter(entries(CHANGELOG)))
    assert [METADATA["version"], project[1], parsed("CITATION.cff")["version"]] == [newest] * 3


def test_citation() -> None:
    citation = parsed("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert [r["url"] for r in citation["references"]] == [r.rsplit(" ", 1)[1] for r in METADATA["references"]]


def test_continuous_integration_runs_tests_and_lint_on_both_pythons() -> None:
    workflow = parsed(".github/workflows/ci.yml")
    assert workflow["concurrency"]["group"]
    job = workflow["jobs"]["test"]
    assert job["timeout-minutes"] <= 60
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.12"]
    assert {"make test", "make lint"} <= {step.get("run") for step in job["steps"]}
    assert job["env"]["PIP_EXTRA_INDEX_URL"].endswith("/cpu")
    cache = next(step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/cache@"))
    assert cache["path"] == ".venv"
    assert all(f"'{name}'" in cache["key"] for name in ("requirements.txt", "requirements-dev.txt"))


def test_hooks_are_pinned_and_ruff_is_that_of_the_requirements() -> None:
    repositories = parsed(".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: repository["rev"] for repository in repositories for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "check-json", "end-of-file-fixer", "trailing-whitespace"} <= set(hooks)
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", rev) for rev in hooks.values())
    pin = re.search(r"^ruff==(.+)$", Path("requirements-dev.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert hooks["ruff-check"] == hooks["ruff-format"] == f"v{pin[1]}"


def test_issue_form_asks_for_what_is_needed() -> None:
    form = parsed(".github/ISSUE_TEMPLATE/problem.yml")
    assert {"name", "description"} <= set(form)
    required = {field.get("id") for field in form["body"] if field.get("validations", {}).get("required")}
    assert {"last_line", "table", "command", "versions"} <= required
    assert "no patient data" in Path(".github/ISSUE_TEMPLATE/problem.yml").read_text().lower()
    assert isinstance(parsed(".github/ISSUE_TEMPLATE/config.yml")["blank_issues_enabled"], bool)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_resolve(document: str) -> None:
    path = Path(document)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = path.parent / name if name else path
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken
