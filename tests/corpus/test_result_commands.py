"""The commands `detokenize`, `corpus stats` and `corpus export`: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
from typer.testing import CliRunner, Result

import fastmimi
from fastmimi.cli import app


@pytest.fixture
def model(codec, tmp_path: Path) -> Path:
    fastmimi.save_pretrained(codec, tmp_path / "model")
    return tmp_path / "model"


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: Any) -> str:
    """Run a command that must fail with exit code 2 and print nothing but its error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 2 and result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("error: ")
    return sentence


def test_detokenize(make_corpus, model: Path, tmp_path: Path) -> None:
    folder, out = make_corpus(), tmp_path / "audio"
    printed = run("detokenize", folder, out, "--model", model, "--format", "wav", "--codebooks", 3).stdout
    assert printed == f"output   {out}: 8 files, 1.8 s of audio\n"
    for record in fastmimi.read_codes(folder):
        if record["id"] == "reader/b.wav":
            assert soundfile.info(out / "reader" / "b%2Ewav.wav").frames == 1920
    (out / "reader" / "a.wav").unlink()
    again = run("detokenize", folder, out, "--model", model, "--format", "wav", "--codebooks", 3).stdout
    assert again == f"output   {out}: 1 files, 0.0 s of audio; 7 were there\n"


def test_detokenize_single_shards_to_a_webdataset(make_corpus, model: Path, tmp_path: Path) -> None:
    shards = sorted(make_corpus().glob("shard-*.parquet"))
    run("detokenize", *shards[:2], tmp_path / "tars", "--model", model, "--webdataset")
    assert sorted(path.name for path in (tmp_path / "tars").glob("*.tar")) == ["shard-00000.tar", "shard-00001.tar"]


def test_stats(make_corpus, tmp_path: Path) -> None:
    folder = make_corpus()
    printed = run("corpus", "stats", folder, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png").stdout
    found = json.loads((tmp_path / "a.json").read_text())
    for part in (
        "8 utterances in 3 shards; 1 could not be read",
        "1.8 s",
        f"{found['frames']} frames",
        "small, finger",
    ):
        assert part in printed
    for level in found["usage"]:
        assert f"{level['used']:.1%} │ {level['perplexity']:>10,.1f}" in printed
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_export(make_corpus, tmp_path: Path) -> None:
    folder, out = make_corpus(), tmp_path / "train.jsonl"
    printed = run("corpus", "export", folder, out, "--format", "jsonl", "--codebooks", 2).stdout
    assert printed == f"output   {out}: 8 utterances, 1.8 s of audio, as jsonl\n"
    assert len(out.read_text().splitlines()) == 8


def test_errors_are_one_sentence(make_corpus, model: Path, tmp_path: Path) -> None:
    folder, out = make_corpus(), tmp_path / "out"
    other = make_corpus("other", fingerprint="0123456789abcdef")
    for arguments, part in (
        (("detokenize", tmp_path / "none", out, "--model", model), "none does not exist"),
        (("detokenize", folder, out, "--model", model, "--format", "doc"), "its suffix must be one of"),
        (("detokenize", folder, out, "--model", model, "--codebooks", 7), "must be from 1 to 6, got 7"),
        (("detokenize", other, out, "--model", model), "made with small (fingerprint 0123456789abcdef)"),
        (("corpus", "stats", tmp_path), "holds no finished shard"),
        (("corpus", "stats", folder, "--plot", out), "its suffix must be one of"),
        (("corpus", "export", folder, out, "--format", "npz"), "the format must be one of"),
        (("corpus", "export", folder, folder, "--format", "tokens"), "is not an empty folder"),
    ):
        assert part in refused(*arguments)
    assert not out.exists()


def test_a_missing_pyarrow_is_one_sentence(make_corpus, tmp_path: Path, monkeypatch) -> None:
    folder = make_corpus()
    monkeypatch.setattr("fastmimi.cli.corpus.find_spec", lambda name: None if name == "pyarrow" else name)
    for arguments in (("detokenize", folder, tmp_path / "out"), ("corpus", "stats", folder)):
        assert "need pyarrow: pip install 'fastmimi[corpus]'" in refused(*arguments)
