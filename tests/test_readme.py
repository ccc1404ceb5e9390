"""The README's Python runs, top to bottom, as one program; only the hub is replaced by files."""

import re
from pathlib import Path

import pytest

import fastmimi

README = Path(__file__).parent.parent / "README.md"
KYUTAI = "tokenizer-e351c8d8-checkpoint125.safetensors"


def test_examples(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    model = fastmimi.load("random:0")
    fastmimi.save_pretrained(model, tmp_path / "mimi")
    fastmimi.save_kyutai(model, tmp_path / KYUTAI)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    code = "\n".join(blocks).replace('"kyutai/mimi"', repr(str(tmp_path / "mimi")))
    names: dict = {}
    exec(compile(code.replace(f'"{KYUTAI}"', repr(str(tmp_path / KYUTAI))), str(README), "exec"), names)
    assert names["last"].shape == (1, 8, 1)
    assert names["sound"].shape == (1, 1, 13 * 1920)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) > 5
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert not missing
