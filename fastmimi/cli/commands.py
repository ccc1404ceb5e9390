"""What the commands are called and take.

Torch, transformers and matplotlib are imported inside commands, so that `--help` is quick.
"""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..io.files import check_input, replacing
from .errors import Sentences

HUB = "kyutai/mimi"

AudioIn = Annotated[Path, typer.Argument(metavar="IN", help="Audio, in any format that libsndfile reads.")]
TokensIn = Annotated[Path, typer.Argument(metavar="IN", help="A token file.")]
AnyIn = Annotated[
    Path,
    typer.Argument(metavar="WHAT", help="A token file, an audio file, a model as for --model, or `mimi` or `jodio`."),
]
AudioOut = Annotated[Path, typer.Argument(metavar="OUT", help="Audio; its suffix (wav, flac, ogg) is the format.")]
TokensOut = Annotated[Path, typer.Argument(metavar="OUT", help="The token file (safetensors).")]
Model = Annotated[str, typer.Option(help="A directory, a .safetensors file, a hub id, demo, or [jodio-]random[:seed].")]
OneModel = Annotated[str | None, typer.Option("--model", help="Load this model and ask it, instead of for any model.")]
Codebooks = Annotated[int | None, typer.Option(help="How many codebooks; by default all there are.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; codebooks are searched in float32.")]
Impl = Annotated[str, typer.Option(help="auto, reference, triton, cpu or onednn; see `fastmimi explain`.")]
Stream = Annotated[bool, typer.Option("--stream", help="One frame (80 ms) at a time, as a live stream; same result.")]
Packed = Annotated[bool, typer.Option("--packed", help="Store 2048 entries in 11 bits a code instead of 16.")]
Force = Annotated[bool, typer.Option("--force", help="Decode with other weights than those that made the codes.")]
TokensBeside = Annotated[Path | None, typer.Option(help="Also write the token file, here.")]
Plot = Annotated[Path | None, typer.Option(help="Draw waveforms, spectrograms and codes (png, pdf, svg).")]
ConfigIn = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML: the fields of fastmimi.train.TrainConfig.")]
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Of the configuration: optimizer.lr=1e-4")
]
Speech = Annotated[Path, typer.Argument(metavar="DIR", help="A folder of audio files, or one file.")]
Counts = Annotated[list[int] | None, typer.Option(help="How many codebooks, repeatedly; by default 8, and all.")]
Json = Annotated[Path | None, typer.Option(help="Also write all numbers, here.")]
Pictures = Annotated[Path | None, typer.Option(help="A folder for pictures: spectrograms, and how codebooks are used.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version and exit.")]

app = typer.Typer(
    cls=Sentences,
    help="Mimi, the neural audio codec: speech to codes at 12.5 frames a second, and back.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # as "rich", it would take [train] and [jodio-] for markup, and leave them out
)


def main() -> None:
    """The console entry."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as for Ctrl-C: temporary files are removed
    app(prog_name="fastmimi")


@app.callback(invoke_without_command=True)
def _without_command(context: typer.Context, version: Version = False) -> None:
    if version:
        import fastmimi

        typer.echo(f"fastmimi {fastmimi.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def encode(
    source: AudioIn,
    target: TokensOut,
    model: Model = HUB,
    codebooks: Codebooks = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    impl: Impl = "auto",
    stream: Stream = False,
    packed: Packed = False,
    plot: Plot = None,
) -> None:
    """Audio to a token file."""
    from ..io.audio import probe
    from . import report, work

    work.check_paths([source, Path(model)], [target, plot])
    file, picture = probe(source), work.picture(plot)
    codec = work.load(model, device, dtype, impl, codebooks)
    with ExitStack() as outputs:
        part = outputs.enter_context(replacing(target))
        coded = work.encode(codec, file, model, packed=packed, stream=stream)
        part.write_bytes(coded.tokens.to_bytes())
        if plot is not None:
            tracks = {"original": coded.track}
            work.draw(outputs.enter_context(replacing(plot)), picture, coded.tokens, tracks, source)
    report.show(
        report.of_input(file),
        report.of_codes(coded.tokens),
        report.of_tokens(coded.tokens, target),
        report.of_speed("encode", coded.clock, coded.tokens, stream),
        report.of_picture(plot),
    )


@app.command()
def decode(
    source: TokensIn,
    target: AudioOut,
    model: Model = HUB,
    codebooks: Codebooks = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    impl: Impl = "auto",
    stream: Stream = False,
    force: Force = False,
    plot: Plot = None,
) -> None:
    """A token file to audio, at the codec's rate and of the original length."""
    from ..io.audio import output_format
    from ..io.tokens import Tokens
    from . import report, work

    work.check_paths([source, Path(model)], [target, plot])
    kind, picture = output_format(target), work.picture(plot)
    tokens = Tokens.load(source).first(codebooks)
    codec = work.load(model, device, dtype, impl)
    work.check_fit(tokens, codec, source, model, force=force)
    with ExitStack() as outputs:
        part = outputs.enter_context(replacing(target))
        decoded = work.decode(codec, tokens, part, kind, stream=stream)
        if plot is not None:
            tracks = {"decoded": decoded.track}
            work.draw(outputs.enter_context(replacing(plot)), picture, tokens, tracks, source)
    report.show(
        report.of_codes(tokens),
        report.of_tokens(tokens, source),
        report.of_speed("decode", decoded.clock, tokens, stream),
        report.of_output(target, tokens),
        report.of_picture(plot),
    )
    report.note_model(model)


@app.command()
def roundtrip(
    source: AudioIn,
    target: AudioOut,
    model: Model = HUB,
    codebooks: Codebooks = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    impl: Impl = "auto",
    stream: Stream = False,
    tokens: TokensBeside = None,
    packed: Packed = False,
    plot: Plot = None,
) -> None:
    """Audio to codes and back, to hear what the codes keep."""
    from ..io.audio import output_format, probe
    from . import report, work

    work.check_paths([source, Path(model)], [target, tokens, plot])
    file, kind, picture = probe(source), output_format(target), work.picture(plot)
    codec = work.load(model, device, dtype, impl, codebooks)
    with ExitStack() as outputs:
        part = outputs.enter_context(replacing(target))
        coded = work.encode(codec, file, model, packed=packed, stream=stream)
        if tokens is not None:
            outputs.enter_context(replacing(tokens)).write_bytes(coded.tokens.to_bytes())
        decoded = work.decode(codec, coded.tokens, part, kind, stream=stream)
        if plot is not None:
            tracks = {"original": coded.track, "decoded": decoded.track}
            work.draw(outputs.enter_context(replacing(plot)), picture, coded.tokens, tracks, source)
    report.show(
        report.of_input(file),
        report.of_codes(coded.tokens),
        report.of_tokens(coded.tokens, tokens),
        report.of_speed("encode", coded.clock, coded.tokens, stream),
        report.of_speed("decode", decoded.clock, coded.tokens, stream),
        report.of_output(target, coded.tokens),
        report.of_picture(plot),
    )
    report.note_model(model)


@app.command()
def info(source: AnyIn, device: Device = "cpu") -> None:
    """What a token file, an audio file, or a model holds; of `mimi` and `jodio`, what each part costs."""
    from ..io.audio import probe
    from ..io.tokens import Tokens, is_tokens
    from ..models.registry import ARCHITECTURES
    from . import report, work

    if str(source) in ARCHITECTURES and not source.exists():
        report.costs(*work.costs(device))
    elif source.is_dir() or work.is_model_name(source):
        report.checkpoint(str(source))
    elif is_tokens(check_input(source)):
        report.tokens(Tokens.load(source), source)
    elif source.suffix == ".safetensors":
        report.checkpoint(str(source))
    else:
        report.audio(probe(source))


@app.command()
def explain(model: OneModel = None, device: Device = "cpu", dtype: Dtype = "float32", impl: Impl = "auto") -> None:
    """Which implementation runs each op, why, and why faster ones do not."""
    from ..runtime.dispatch import explain
    from . import report, work

    kind, title = work.device_type(device), f"{device}, {dtype}, impl={impl}"
    if model is None:  # the device need not be there
        report.dispatch(explain(kind, work.dtype_of(dtype), impl), title)
    else:
        report.dispatch(work.load(model, device, dtype, impl).explain(), f"{model}, {title}")


@app.command()
def train(config: ConfigIn, changes: Changes = None) -> None:
    """Train a codec (pip install 'fastmimi[train]'); a run that was stopped goes on. See fastmimi/train/config.py."""
    from .learning import train

    train(config, changes or [])


@app.command()
def evaluate(
    folder: Speech,
    model: Model = HUB,
    codebooks: Counts = None,
    device: Device = "cpu",
    json: Json = None,
    plot: Pictures = None,
) -> None:
    """How a codec sounds, in numbers: encode and decode each file, and compare."""
    from .learning import evaluate

    evaluate(folder, model, codebooks, device, json, plot)
