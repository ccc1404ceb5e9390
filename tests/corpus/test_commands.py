"""The commands `tokenize`, `corpus manifest` and `corpus verify`."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fastmimi.cli import app
from fastmimi.cli import corpus as commands


def run(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_from_a_folder_to_codes_that_are_verified(speech: Path, tmp_path: Path, model: Path) -> None:
    listed, out = tmp_path / "m.csv", tmp_path / "codes"
    made = run("corpus", "manifest", speech, listed)
    assert (made.exit_code, made.stderr) == (0, "")
    assert f"{listed}: 14 rows, " in made.stdout and ", 2 of unknown duration" in made.stdout
    options = ("--model", model, "--codebooks", 4, "--rows-per-shard", 5)
    first = run("tokenize", listed, out, *options, "--shard", "0/2")
    assert first.exit_code == 0, first.output
    assert f"{out}: 2 of 2 shards" in first.stdout
    second = run("tokenize", listed, out, *options)
    assert "3 of 3 shards" in second.stdout and "times real time" in second.stdout
    assert pq.read_table(out / "shard-00000.parquet")["num_codebooks"].to_pylist()[0] == 4
    verified = run("corpus", "verify", out, "--sample", 3)
    assert verified.exit_code == 0, verified.output
    assert "12, and 2 that could not be read" in verified.stdout and "3 rows encoded again" in verified.stdout
    pq.write_table(pq.read_table(out / "shard-00000.parquet").slice(1), out / "shard-00000.parquet")
    verified = run("corpus", "verify", out, "--sample", 0)
    assert verified.exit_code == 1
    assert "wrong    shard-00000.parquet does not have each row of the manifest once" in verified.stdout


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("tokenize", "{}/absent", "{}/codes", "--model", "{}"), "absent does not exist"),
        (("tokenize", "{}", "{}/codes", "--shard", "3/2"), "shard must be i/n"),
        (("tokenize", "{}", "{}/codes", "--threads", "0"), "--threads must be positive, got 0"),
        (("tokenize", "{}", "{}/codes", "--dtype", "int8"), "dtype must be float32, bfloat16 or float16, got 'int8'"),
        (("corpus", "manifest", "{}", "{}/m.txt"), "a manifest must end in .parquet, .jsonl or .csv"),
        (("corpus", "manifest", "{}", "{}/no/m.csv"), "there is no directory"),
        (("corpus", "verify", "{}"), "settings.json does not exist"),
    ],
)
def test_errors_are_one_sentence(arguments: tuple[str, ...], sentence: str, model: Path) -> None:
    done = run(*(argument.format(model) for argument in arguments))
    assert done.exit_code == 2
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "pyarrow" else object())
    done = run("corpus", "manifest", tmp_path, tmp_path / "m.csv")
    assert (done.exit_code, done.stderr) == (2, "error: corpora need pyarrow: pip install 'fastmimi[corpus]'\n")
