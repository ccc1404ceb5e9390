"""The README's Python runs, top to bottom, as one program; only the hub is replaced by files."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import fastmimi
from fastmimi.checkpoints.weights import random
from fastmimi.devtools.testing import noise
from fastmimi.models.config import CodecConfig

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


def test_the_training_example(tmp_path, monkeypatch, tiny_training):
    """Its configuration and its commands, on a tiny model and a folder of one file."""
    from typer.testing import CliRunner

    from fastmimi.cli import app

    monkeypatch.chdir(tmp_path)
    tiny = tiny_training()
    for name in ("speech", "held-out"):
        (tmp_path / name).mkdir()
        shutil.copy(Path(__file__).parent / "data" / "synthetic.ogg", tmp_path / name)
    fastmimi.save_pretrained(random(CodecConfig(**tiny.model.changes)), tmp_path / "tiny")
    configs = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    for name, config in zip(("speech.yaml", "decoder.yaml"), configs, strict=True):
        config = config.replace("kyutai/mimi", "tiny").replace("microsoft/wavlm-large", "wavlm.json")
        (tmp_path / name).write_text(config)
    commands = re.findall(r"^fastmimi ((?:train|evaluate).*?) *(?:#.*)?$", README.read_text(), re.MULTILINE)
    small = ["steps=2", "data.seconds=0.5", "data.batch_size=2", "data.workers=0", "discriminator.filters=2",
             "model.load=tiny"]  # fmt: skip
    assert len(commands) == 3
    for command in commands:
        arguments = command.split() + (small if command.startswith("train") else [])
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "pictures" / "synthetic.ogg.png").exists()
    audio = noise(1, 1, 24_000)
    before, after = (fastmimi.load(name).encode(audio) for name in ("tiny", "runs/decoder/model"))
    assert torch.equal(before, after), "a better decoder for the same codes"


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) > 5
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert not missing
