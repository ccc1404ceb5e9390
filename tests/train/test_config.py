"""The configuration of a run: the paper's defaults, and one-sentence errors for invalid values."""

from pathlib import Path

import pytest

from fastmimi import InputError, train
from fastmimi.train.config import AUDIO_LOSSES, LIMITS, DiscriminatorConfig, TrainConfig
from fastmimi.train.step import Generator


def test_defaults_are_those_of_the_paper():
    config = TrainConfig.of({"data": {"folder": "x"}})
    optimizer, data, losses, quantizer = config.optimizer, config.data, config.losses, config.quantizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.ema) == (8e-4, [0.5, 0.9], 0.05, 0.99)
    assert (config.steps, data.seconds, data.batch_size) == (4_000_000, 12.0, 128)
    assert (losses.l1, losses.mel, losses.spectrum) == (0, 0, 0) and losses.adversarial and losses.features
    assert config.discriminator == DiscriminatorConfig([2048, 1024, 512, 256, 128], 32, lr=None, gain=1, head_start=0)
    assert (quantizer.decay, quantizer.raw, quantizer.dropout) == (0.99, 0.5, True)
    assert config.distillation.teacher == "microsoft/wavlm-large"


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("optimizer.rl=1", "Key 'rl' not in 'OptimizerConfig'"),
        ("steps=many", "'many' of type 'str' could not be converted to Integer"),
        ("losses.mel=-1", r"losses must lie in \[0, 1e\+09\] and not all be 0"),
        ("losses.mel=nan", r"losses must lie in \[0, 1e\+09\] and not all be 0"),
        ("data.dataset=x", "data needs either a folder or a dataset"),
        ("model.architecture=moshi", "model.architecture must be one of mimi, jodio, got 'moshi'"),
        ("mixed_precision=fp17", "mixed_precision must be one of None, no, bf16, fp16, got 'fp17'"),
        ("optimizer.schedule=steep", "optimizer.schedule must be one of constant_with_warmup, .*, got 'steep'"),
        ("optimizer.betas=[0.5]", r"optimizer.betas must be two numbers in \[0, 1\), got \[0.5\]"),
        ("discriminator.n_ffts=[]", r"discriminator.n_ffts must be 1 to 16 numbers from 16 to 65536, got \[\]"),
        ("discriminator.n_ffts=[8]", r"discriminator.n_ffts must be 1 to 16 numbers from 16 to 65536, got \[8\]"),
        ("discriminator.lr=0", r"discriminator.lr must lie in \[1e-12, 1e\+09\], got 0.0"),
        ("discriminator.gain=0", r"discriminator.gain must lie in \[0.001, 1000\], got 0.0"),
        ("discriminator.head_start=-1", r"discriminator.head_start must lie in \[0, 1e\+09\], got -1"),
        (
            "discriminator.head_start=4000000",
            r"discriminator.head_start must be less than steps \(4000000\), got 4000000",
        ),
        ("optimizer.lr=-1", r"optimizer.lr must lie in \[1e-12, 1e\+09\], got -1.0"),
        ("optimizer.lr=inf", r"optimizer.lr must lie in \[1e-12, 1e\+09\], got inf"),
        ("optimizer.clip=0", r"optimizer.clip must lie in \[1e-12, inf\], got 0.0"),
        ("quantizer.raw=2", r"quantizer.raw must lie in \[0, 1\], got 2"),
        ("quantizer.commitment=nan", r"quantizer.commitment must lie in \[0, 1e\+09\], got nan"),
        ("seed=-1", r"seed must lie in \[0, 1e\+09\], got -1"),
        ("save_every=0", r"save_every must lie in \[1, 1e\+09\], got 0"),
        ("data.seconds=0.001", r"data.seconds must lie in \[0.1, 3600\], got 0.001"),
    ],
)
def test_bad_configurations(tmp_path, change, sentence):
    path = tmp_path / "config.yaml"
    path.write_text("data: {folder: x}")
    with pytest.raises(ValueError, match=sentence):
        TrainConfig.read(path, [change])


def test_a_head_start_needs_discriminators():
    values = {"data": {"folder": "x"}, "discriminator": {"head_start": 5}}
    TrainConfig.of(values | {"losses": {"adversarial": 0}})
    with pytest.raises(InputError, match=r"head_start is 5, but there are no discriminators: losses.adversarial"):
        TrainConfig.of(values | {"losses": {"adversarial": 0, "features": 0, "mel": 1}})


HOSTILE = {
    "a list": (b"- data", "a configuration must be fields and their values, got"),
    "a number": (b"3", "Invalid loaded object type: int"),
    "nothing": (b"", "empty"),
    "not UTF-8": (b"\xff\xfe", "codec can't decode byte 0xff"),
    "control characters": (b"out: \x00", "unacceptable character #x0000"),
    "an alias": (
        b"data: &a {folder: x}\nmodel: {changes: *a}",
        r"must not contain YAML aliases, got \*a",
    ),
    "recursion": (b"data: &a {folder: x, name: *a}", r"must not contain YAML aliases, got \*a"),
    "deep nesting": (b"out: " + b"[" * 5000, "out|recursion|found|expected|parsing"),
    "deep values": (b"data: {folder: x}\nmodel: {changes: {a: " + b"[" * 400 + b"]" * 400 + b"}}", "recursion"),
    "a large file": (b"# " * 40_000, "a configuration must have at most 65536 bytes, got 80000"),
    "a tag of Python": (b"!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "an integer with too many digits": (b"steps: " + b"9" * 5000, "Exceeds the limit"),
    "a float too large": (b"optimizer: {lr: " + b"9" * 500 + b"}", "too large to convert to float"),
    "a bool": (b"data: {folder: x}\nsteps: true", "steps: Value 'True' of type 'bool' could not be converted"),
    "a section that is a number": (b"data: 3", "DataConfig. value: 3"),
    "null": (b"data: {folder: x}\nseed: null", "seed: Incompatible value 'None'"),
    "an invalid list item": (
        b"data: {folder: x}\noptimizer: {betas: [a, b]}",
        r"optimizer.betas\[0\]: Value 'a' of type 'str'",
    ),
    "an interpolation": (b"data: {folder: x}\nout: ${out}", "out: .*interpolation"),
    "a name of two lines": (b'data: {folder: x}\n"a\\nb": 3', r"'a\\nb': Key 'a b' not in 'TrainConfig'"),
    "many processes": (b"data: {folder: x, workers: 1000000}", r"data.workers must lie in \[0, 1024\], got 1000000"),
    "a large transform": (
        b"data: {folder: x}\ndiscriminator: {n_ffts: [99999999]}",
        r"from 16 to 65536, got \[99999999\]",
    ),
}


@pytest.mark.parametrize(
    "content, sentence",
    [
        pytest.param(*HOSTILE[name], marks=pytest.mark.slow if name == "deep nesting" else (), id=name)
        for name in HOSTILE
    ],
)
def test_hostile_files_raise_an_input_error_of_one_line(tmp_path, content, sentence):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"(?i)config\.yaml(:| is).*({sentence})") as error:
        TrainConfig.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(Path(train.__file__).parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_of_the_package_are_valid(path):
    config = TrainConfig.read(path)
    assert Path(config.out).name == path.stem and config.model.impl == "reference"


@pytest.mark.parametrize("values", [None, 3, "x", [], {"data": 3}, {3: 4}, {"steps": object()}])
def test_invalid_values_are_refused(values):
    with pytest.raises(InputError):
        TrainConfig.of(values)


@pytest.mark.parametrize(
    "changes", [[None], [3], ["a.b=3"], ["=3"], ["["], ["[0"], ["[]=3"], ["a[=3"], ["steps=["], ["data=3"]]
)
def test_invalid_changes_are_refused(tmp_path, changes):
    path = tmp_path / "config.yaml"
    path.write_text("data: {folder: x}")
    with pytest.raises(InputError, match=r"config\.yaml: "):
        TrainConfig.read(path, changes)


def test_every_number_has_limits():
    """Except betas and n_ffts, which are lists, and the losses, which are checked together. One may be None."""
    config = TrainConfig.of({"data": {"folder": "x"}})
    numbers = {name for name, value in config._flat().items() if type(value) in (int, float)}
    assert LIMITS.keys() - {"discriminator.lr"} == numbers - {f"losses.{name}" for name in AUDIO_LOSSES}


@pytest.mark.parametrize(
    "architecture, changes, kind, name",
    [
        ("mimi", {"filters": 3}, "MimiCodecConfig", "filters"),
        ("jodio", {"hidden_size": 3}, "JodioConfig", "hidden_size"),
        ("jodio", {"encoder_transformer": {"heads": 3}}, "JodioTransformerConfig", "heads"),
    ],
)
def test_model_changes_must_name_fields_of_the_codec(tiny_training, architecture, changes, kind, name):
    config = tiny_training(architecture=architecture)
    config.model.changes = changes
    with pytest.raises(ValueError, match=rf"model\.changes must name fields of {kind} \(.*\), got '{name}'"):
        Generator(config)


def test_a_written_configuration_reads_back_equal(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {folder: x}\nlosses: {mel: 2}")
    config = TrainConfig.read(tmp_path / "a.yaml", ["optimizer.lr=0.5"])
    config.write(tmp_path / "b.yaml")
    assert TrainConfig.read(tmp_path / "b.yaml") == config and (config.optimizer.lr, config.losses.mel) == (0.5, 2)
