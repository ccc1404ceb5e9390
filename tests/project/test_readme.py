"""The examples of README.md and of docs/ run: the Python of a page from top to bottom as one program, and its commands.

The hub is not used: kyutai/mimi is replaced by the model `demo`, and Pocket TTS has random weights.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pocket
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import fastmimi
from fastmimi.checkpoints.weights import DEMO, random
from fastmimi.cli import app
from fastmimi.corpus import shards
from fastmimi.devtools.testing import noise
from fastmimi.models.config import MimiCodecConfig
from fastmimi.train.config import TrainConfig
from fastmimi.train.step import build_codec

ROOT = Path(__file__).resolve().parents[2]
README, TRAINING = ROOT / "README.md", ROOT / "docs" / "training.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# by test_commands: the first two by test_the_training_example, exports by tests/export, a server never
NOT_RUN = ("train", "evaluate", "export", "serve")
KYUTAI = "tokenizer-e351c8d8-checkpoint125.safetensors"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of each line of the page's shell examples, without comments."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [words for line in lines if (words := line.partition(" #")[0].split())]


def pages_with(language: str) -> Any:
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def codes(folder):
    """A corpus in `codes/`: 20 frames of two utterances, with codes of the model `demo`; and audio in `audio/`."""
    (folder / "audio").mkdir()
    soundfile.write("audio/speech.flac", noise(8_000).numpy(), 16_000)
    demo = fastmimi.load("demo")
    rows = [{"id": id, "duration": 1.6, "sample_rate": 24_000, "source": f"{id}.wav"} for id in ("a", "b")]
    table = shards.table_of(
        [{**dict.fromkeys(("start", "end", "channel")), **row} for row in rows],
        [demo.encode(noise(1, 1, 38_400, seed=seed))[0].numpy() for seed in range(2)],
        shards.schema(shards.Settings.of(demo, "demo")),
    )
    (folder / "codes").mkdir()
    shards.write_shard(folder / "codes", 0, table, [])


@pages_with("python")
def test_examples(page, folder, codes, monkeypatch):
    pytest.importorskip("transformers")
    if f'"{KYUTAI}"' in page.read_text():
        fastmimi.save_kyutai(fastmimi.load("random:0"), folder / KYUTAI)
    examples = blocks(page, "python")
    if importlib.util.find_spec("pocket_tts") is None:  # these alone are left out
        examples = [block for block in examples if "pocket_tts" not in block]
    elif "pocket_tts" in page.read_text():
        import pocket_tts

        monkeypatch.setattr(pocket_tts.TTSModel, "load_model", lambda: pocket.random_tts("english_2m_2026-10", folder))
    code = "\n".join(examples).replace('"kyutai/mimi"', repr(str(DEMO)))
    names: dict = {}
    exec(compile(code, str(page), "exec"), names)
    if page == README:
        assert names["last"].shape == (1, 8, 1)
        assert names["sound"].shape == (1, 1, 1920)


@pages_with("bash")
def test_commands(page, folder, codes):
    """Commands of fastmimi are run on a short clip; for others, the names in them are checked."""
    soundfile.write("speech.flac", noise(8_000).numpy(), 16_000)
    for program, *arguments in commands(page):
        if program == "fastmimi" and arguments[0] not in NOT_RUN:
            run_fastmimi(arguments)
        else:
            check_names(Path(program).name, arguments)


def run_fastmimi(arguments: list[str]) -> None:
    if "ray" in arguments:  # tests/corpus/test_ray.py
        return
    codes = arguments[0] in ("encode", "decode", "roundtrip", "tokenize", "detokenize") and "--model" not in arguments
    result = CliRunner().invoke(app, [*arguments, *(["--model", "demo"] if codes else [])], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def check_names(program: str, arguments: list[str]) -> None:
    """AssertionError where a command names a target, an extra or a file that does not exist."""
    match program, arguments:
        case "make", targets:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            missing = [target for target in targets if target not in known]
        case "pip", ["install", *_]:
            extras = re.findall(r"\[([a-z]+)\]", " ".join(arguments))
            known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            missing = [extra for extra in extras if extra not in known]
        case ("npm", ["install", "onnxruntime-web"]) | ("python", ["-m", "http.server", *_]):
            missing = []
        case (("python" | "pytest" | "bash"), _):
            files = [word for word in arguments if "/" in word]
            missing = [file for file in files if not (ROOT / file).exists()]
        case _:
            missing = [] if program in ("fastmimi", "accelerate", "apt-get", "tensorboard") else [program]
    assert not missing, f"{program} {' '.join(arguments)}"


def test_commands_with_unknown_names_are_found():
    for words in ("make tea", "pip install .[tea]", "python bench/tea.py", "tea"):
        program, *arguments = words.split()
        with pytest.raises(AssertionError, match="tea"):
            check_names(program, arguments)


def test_the_training_example(folder, tiny_training):
    """Its configuration and its commands, on a tiny model and a folder of one file."""
    tiny = tiny_training()
    for name in ("speech", "held-out"):
        (folder / name).mkdir()
        shutil.copy(ROOT / "tests" / "data" / "synthetic.ogg", folder / name)
    fastmimi.save_pretrained(random(MimiCodecConfig(**tiny.model.changes)), folder / "tiny")
    for name, config in zip(("speech.yaml", "decoder.yaml", "wide.yaml"), blocks(TRAINING, "yaml"), strict=True):
        config = config.replace("kyutai/mimi", "tiny").replace("microsoft/wavlm-large", "wavlm.json")
        (folder / name).write_text(config)
    small = ["steps=2", "data.seconds=0.5", "data.batch_size=2", "data.workers=0", "discriminator.filters=2",
             "model.load=tiny"]  # fmt: skip
    commands_of_training = [words[1:] for words in commands(TRAINING) if words[0] == "fastmimi"]
    assert len(commands_of_training) == 3
    for arguments in commands_of_training:
        run_fastmimi(arguments + (small if arguments[0] == "train" else []))
    assert (folder / "pictures" / "synthetic.ogg.png").exists()
    audio = noise(1, 1, 24_000)
    before, after = (fastmimi.load(name).encode(audio) for name in ("tiny", "runs/decoder/model"))
    assert torch.equal(before, after), "a better decoder for the same codes"
    assert build_codec(TrainConfig.read(folder / "wide.yaml").model).config.num_filters == 32


def test_links_of_the_readme_resolve():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) > 5
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert not missing
