"""docs/ is complete: every page is in the navigation, and links, anchors, names and paths resolve.

The strict build (`make docs`) also checks the navigation and the links, but needs MkDocs.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

import fastmimi

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
# Paths in backticks begin with one of these; `models/codec.py` is short for `fastmimi/models/codec.py`
TOPS = "fastmimi|kernels|reference|tests|bench|docs|runtime|models|checkpoints|compat|devtools|serve|train|cli|native"
SHORT_FOR = {"native": ROOT / "kernels" / "cpu"} | dict.fromkeys(
    ("runtime", "models", "checkpoints", "compat", "devtools", "serve", "train", "cli"), ROOT / "fastmimi"
)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that MkDocs makes from a page's headings: lower case, words joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in words}


def broken_links(pages: dict[str, str]) -> list[str]:
    """A message for each link to a page, an image or an anchor that does not exist."""
    broken = []
    for name, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = _joined(PurePosixPath(name).parent, path) if path else name
            if target not in pages and not (DOCS / target).is_file():
                broken.append(f"{name} links to {link}, which does not exist")
            elif anchor and anchor not in anchors(pages[target]):
                broken.append(f"{name} links to {link}, a page without that heading")
    return broken


def _joined(folder: PurePosixPath, path: str) -> str:
    parts: list[str] = []
    for part in (folder / path).parts:
        parts = parts[:-1] if part == ".." and parts else [*parts, part]
    return "/".join(parts)


def missing_paths(pages: dict[str, str]) -> list[str]:
    """A message for each path in backticks that does not exist; a placeholder, `<op>`, matches any name."""
    missing = []
    for name, text in pages.items():
        for path in re.findall(rf"`((?:{TOPS})/[\w./*<>-]*)`", without_code(text)):
            if "scaled_sum" in path:  # the example of how-to/add-an-op.md
                continue
            root = SHORT_FOR.get(path.partition("/")[0], ROOT)
            whole = re.sub(r"<\w+>", "*", path).rstrip("/")
            if not any(root.glob(whole)):
                missing.append(f"{name} names {path}")
    return missing


def leaves(nav: Any) -> list[str]:
    """The pages of a navigation, recursively."""
    match nav:
        case dict():
            return [leaf for value in nav.values() for leaf in leaves(value)]
        case list():
            return [leaf for value in nav for leaf in leaves(value)]
    return [nav]


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(leaves(yaml.safe_load(CONFIG)["nav"])) == sorted(PAGES)


def test_links_and_anchors_resolve() -> None:
    assert broken_links(PAGES) == []


def test_paths_exist() -> None:
    assert missing_paths(PAGES) == []


@pytest.mark.parametrize("text", ["[a](b.md)", "[a](../a.md)", "[a](#b)", "[a](a.md#b)", "![a](images/a.png)"])
def test_broken_links_are_found(text: str) -> None:
    assert broken_links({"a.md": f"# A\n\n{text}\n"})


def test_valid_links_pass() -> None:
    pages = {
        "a.md": "# A b, `c_d`\n\n[to](how/b.md#on-b-not-here)",
        "how/b.md": "## On B: not here\n[up](../a.md#a-b-c_d)",
    }
    assert broken_links(pages) == []


@pytest.mark.parametrize("path", ["fastmimi/none.py", "models/none.py", "kernels/<backend>/none.py", "bench/none/"])
def test_missing_paths_are_found(path: str) -> None:
    assert missing_paths({"a.md": f"see `{path}`"})


def test_the_reference_has_every_public_name() -> None:
    documented = set(re.findall(r"^(?:::: |### )(?:fastmimi\.)?(\w+)$", PAGES["api.md"], re.MULTILINE))
    assert set(fastmimi.__all__) <= documented
    assert {"fastmimi.compat.moshi", "fastmimi.compat.rustymimi"} <= set(
        re.findall(r"^::: (\S+)$", PAGES["api.md"], re.MULTILINE)
    )


def test_the_site_loads_nothing_from_the_network() -> None:
    """It opens from file:// without a network."""
    config = yaml.safe_load(CONFIG)
    assert config["use_directory_urls"] is False
    assert config["theme"]["font"] is False
    assert "://" not in CONFIG.replace("file://", "")
    assert not [name for name, text in PAGES.items() if re.search(r"```mermaid|<script|!\[[^\]]*\]\(\w+://", text)]
