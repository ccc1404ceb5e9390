"""The commands and their options.

PyTorch, transformers and matplotlib are imported inside the commands, so that `--help` is fast.
"""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..io.files import check_input, replacing
from . import corpus
from .errors import ErrorHandlingGroup

HUB = "kyutai/mimi"

AudioIn = Annotated[Path, typer.Argument(metavar="IN", help="An audio file, in any format that libsndfile reads.")]
TokensIn = Annotated[Path, typer.Argument(metavar="IN", help="A token file.")]
AnyIn = Annotated[
    Path,
    typer.Argument(metavar="WHAT", help="A token file, an audio file, a model as for --model, or `mimi` or `jodio`."),
]
AudioOut = Annotated[
    Path, typer.Argument(metavar="OUT", help="The audio file to write; the suffix (wav, flac, ogg) sets the format.")
]
TokensOut = Annotated[Path, typer.Argument(metavar="OUT", help="The token file to write (safetensors).")]
Model = Annotated[str, typer.Option(help="A directory, a .safetensors file, a hub id, demo, or [jodio-]random[:seed].")]
OneModel = Annotated[
    str | None,
    typer.Option("--model", help="Load this model and show what it uses; by default, show what any model would use."),
]
Codebooks = Annotated[int | None, typer.Option(help="Number of codebooks; by default all.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; the codebook search is always in float32.")]
Impl = Annotated[str, typer.Option(help="auto, reference, triton, cpu or onednn; see `fastmimi explain`.")]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="Process one frame (80 ms) at a time, as a live stream; the result is the same."),
]
Packed = Annotated[
    bool,
    typer.Option("--packed", help="Store each code in as few bits as possible: 11 instead of 16 for 2048 entries."),
]
Force = Annotated[bool, typer.Option("--force", help="Decode even if the codes were made with other weights.")]
TokensBeside = Annotated[Path | None, typer.Option(help="Also write the tokens to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw waveforms, spectrograms and codes (png, pdf, svg).")]
ConfigIn = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file with fields of fastmimi.train.config.TrainConfig.")
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Override fields of the configuration, such as optimizer.lr=1e-4."),
]
Speech = Annotated[Path, typer.Argument(metavar="DIR", help="A folder of audio files, or one file.")]
Counts = Annotated[list[int] | None, typer.Option(help="Number of codebooks; may be repeated. By default 8, and all.")]
Json = Annotated[Path | None, typer.Option(help="Also write all results to this file.")]
Pictures = Annotated[
    Path | None, typer.Option(help="Draw spectrograms and the usage of the codebooks into this folder.")
]
Host = Annotated[str, typer.Option(help="The address to listen on; other machines can reach any but 127.0.0.1.")]
Port = Annotated[int, typer.Option(help="The port; 0 takes a free one.")]
Streams = Annotated[int, typer.Option(help="Streams that may be open at once.")]
FramesPerTick = Annotated[int, typer.Option(help="Frames that a tick may take of a stream that is alone.")]
WeightsAs = Annotated[str | None, typer.Option(help="int8: large layers on an int8 grid, for faster streams on a CPU.")]
Threads = Annotated[int | None, typer.Option(help="PyTorch's threads; by default as many as there are cores.")]
TokenFile = Annotated[Path | None, typer.Option(help="A file with the token that clients must send; see --host.")]
Origins = Annotated[list[str] | None, typer.Option(help="An origin whose pages may use the server; may be repeated.")]
PerClient = Annotated[int, typer.Option(help="Streams and requests of one address at a time.")]
Upload = Annotated[int, typer.Option(help="MiB that an uploaded file may have.")]
Idle = Annotated[float, typer.Option(help="Seconds without a message after which a stream is closed.")]
Drain = Annotated[float, typer.Option(help="Seconds that running streams get to end after SIGTERM.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no table of streams and times in the terminal.")]
CodesIn = Annotated[
    list[Path], typer.Argument(metavar="CORPUS...", help="The output folder of `fastmimi tokenize`, or its shards.")
]
Corpus = Annotated[Path, typer.Argument(metavar="CORPUS", help="The output folder of `fastmimi tokenize`, or a shard.")]
AudioFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the audio.")]
AudioFormat = Annotated[str, typer.Option("--format", help="flac, wav, ogg...")]
Tars = Annotated[bool, typer.Option("--webdataset", help="Write a tar for each shard instead of single files.")]
ModelIn = Annotated[str, typer.Argument(metavar="MODEL", help="A model, as for --model of the other commands.")]
NewFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the files.")]
FilesFormat = Annotated[str, typer.Option("--format", help="onnx, or pt2: programs of torch.export.")]
StoredAs = Annotated[
    str, typer.Option(help="How weights are stored: float32, float16 or int8; all compute in float32.")
]
PageWith = Annotated[
    Path | None,
    typer.Option("--page", help="Write a page that runs in the browser; a node_modules folder with onnxruntime-web."),
]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not compare the files with the model.")]
ExportTarget = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder; for jsonl, a file.")]
ExportFormat = Annotated[str, typer.Option("--format", help="huggingface, jsonl, lhotse, tokens or webdataset.")]
Usage = Annotated[Path | None, typer.Option("--plot", help="Draw usage and durations (png, pdf, svg).")]
Version = Annotated[bool, typer.Option("--version", help="Print the version and exit.")]

app = typer.Typer(
    cls=ErrorHandlingGroup,
    help="Mimi, the neural audio codec: speech to codes at 12.5 frames a second, and back.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich" would parse [train] and [jodio-] as markup and drop them
)


def main() -> None:
    """The console script's entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, as for Ctrl-C: temporary files are removed
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
    source: AudioIn, target: TokensOut, model: Model = HUB, codebooks: Codebooks = None, device: Device = "cpu",
    dtype: Dtype = "float32", impl: Impl = "auto", stream: Stream = False, packed: Packed = False, plot: Plot = None,
) -> None:  # fmt: skip
    """Encode audio to a token file."""
    from ..io.audio import probe
    from . import report, work

    work.check_paths([source, Path(model)], [target, plot])
    file, picture = probe(source), work.picture(plot)
    codec = work.load(model, device, dtype, impl, codebooks)
    with ExitStack() as outputs:
        part = outputs.enter_context(replacing(target))
        encoded = work.encode(codec, file, model, packed=packed, stream=stream)
        part.write_bytes(encoded.tokens.to_bytes())
        if plot is not None:
            tracks = {"original": encoded.track}
            work.draw(outputs.enter_context(replacing(plot)), picture, encoded.tokens, tracks, source)
    report.show(
        report.input_rows(file), report.codes_rows(encoded.tokens), report.tokens_rows(encoded.tokens, target),
        report.speed_rows("encode", encoded.clock, encoded.tokens, stream), report.picture_rows(plot),
    )  # fmt: skip


@app.command()
def decode(
    source: TokensIn, target: AudioOut, model: Model = HUB, codebooks: Codebooks = None, device: Device = "cpu",
    dtype: Dtype = "float32", impl: Impl = "auto", stream: Stream = False, force: Force = False, plot: Plot = None,
) -> None:  # fmt: skip
    """Decode a token file to audio, at the codec's sample rate and with the original length."""
    from ..checkpoints.fit import check_fit
    from ..io.audio import output_format
    from ..io.tokens import Tokens
    from . import report, work

    work.check_paths([source, Path(model)], [target, plot])
    kind, picture = output_format(target), work.picture(plot)
    tokens = Tokens.load(source).first(codebooks)
    codec = work.load(model, device, dtype, impl)
    check_fit(tokens, codec, source, model, force=force)
    with ExitStack() as outputs:
        part = outputs.enter_context(replacing(target))
        decoded = work.decode(codec, tokens, part, kind, stream=stream)
        if plot is not None:
            tracks = {"decoded": decoded.track}
            work.draw(outputs.enter_context(replacing(plot)), picture, tokens, tracks, source)
    report.show(
        report.codes_rows(tokens), report.tokens_rows(tokens, source),
        report.speed_rows("decode", decoded.clock, tokens, stream), report.output_rows(target, tokens),
        report.picture_rows(plot),
    )  # fmt: skip
    report.note_model(model)


@app.command()
def roundtrip(
    source: AudioIn, target: AudioOut, model: Model = HUB, codebooks: Codebooks = None, device: Device = "cpu",
    dtype: Dtype = "float32", impl: Impl = "auto", stream: Stream = False, tokens: TokensBeside = None,
    packed: Packed = False, plot: Plot = None,
) -> None:  # fmt: skip
    """Encode audio and decode the codes, to hear what they preserve."""
    from ..io.audio import output_format, probe
    from . import report, work

    work.check_paths([source, Path(model)], [target, tokens, plot])
    file, kind, picture = probe(source), output_format(target), work.picture(plot)
    codec = work.load(model, device, dtype, impl, codebooks)
    with ExitStack() as outputs:
        part = outputs.enter_context(replacing(target))
        encoded = work.encode(codec, file, model, packed=packed, stream=stream)
        if tokens is not None:
            outputs.enter_context(replacing(tokens)).write_bytes(encoded.tokens.to_bytes())
        decoded = work.decode(codec, encoded.tokens, part, kind, stream=stream)
        if plot is not None:
            tracks = {"original": encoded.track, "decoded": decoded.track}
            work.draw(outputs.enter_context(replacing(plot)), picture, encoded.tokens, tracks, source)
    report.show(
        report.input_rows(file), report.codes_rows(encoded.tokens), report.tokens_rows(encoded.tokens, tokens),
        report.speed_rows("encode", encoded.clock, encoded.tokens, stream),
        report.speed_rows("decode", decoded.clock, encoded.tokens, stream), report.output_rows(target, encoded.tokens),
        report.quality_rows(model, source), report.picture_rows(plot),
    )  # fmt: skip
    report.note_model(model)


@app.command()
def info(source: AnyIn, device: Device = "cpu") -> None:
    """Describe a token file, an audio file or a model; for `mimi` or `jodio`, show the cost of each part."""
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
    """Show which implementation runs each op, why, and why others are not used."""
    from ..runtime.dispatch import explain, native_variant
    from . import report, work

    kind, title = work.device_type(device), f"{device}, {dtype}, impl={impl}"
    if model is None:  # without loading a model: the device need not exist
        choices = explain(kind, work.dtype_of(dtype), impl)
    else:
        choices, title = work.load(model, device, dtype, impl).explain(), f"{model}, {title}"
    if any(choice.chosen == "cpu" for choice in choices):
        title += f"; cpu: the {native_variant()} variant of the native kernels"
    report.dispatch(choices, title)


app.command()(corpus.tokenize)
app.add_typer(corpus.app, name="corpus")


@app.command("export")
def export_model(
    model: ModelIn, out: NewFolder, format: FilesFormat = "onnx", weights: StoredAs = "float32",
    codebooks: Codebooks = None, page: PageWith = None, no_check: NoCheck = False,
) -> None:  # fmt: skip
    """Write a codec as files for other runtimes: whole audio, and steps of streams (pip install 'fastmimi[onnx]')."""
    from .exporting import export

    export(model, out, format, weights, codebooks, page, not no_check)


@app.command()
def train(config: ConfigIn, changes: Changes = None) -> None:
    """Train a codec, or resume a run (needs pip install 'fastmimi[train]'). See fastmimi/train/config.py."""
    from .training import train

    train(config, changes or [])


@app.command()
def evaluate(
    folder: Speech, model: Model = HUB, codebooks: Counts = None, device: Device = "cpu", json: Json = None,
    plot: Pictures = None,
) -> None:  # fmt: skip
    """Measure the quality of a codec: encode and decode each file, and compare with the original."""
    from .training import evaluate

    evaluate(folder, model, codebooks, device, json, plot)


@app.command()
def serve(
    model: Model = HUB, host: Host = "127.0.0.1", port: Port = 8000, streams: Streams = 64,
    frames_per_tick: FramesPerTick = 4, codebooks: Codebooks = None, device: Device = "cpu", dtype: Dtype = "float32",
    weights: WeightsAs = None, impl: Impl = "auto", threads: Threads = None, token_file: TokenFile = None,
    allow_origin: Origins = None, per_client: PerClient = 64, upload_mb: Upload = 256, idle_s: Idle = 60.0,
    drain_s: Drain = 10.0, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Serve many live streams over WebSocket, files over REST, and a page (needs pip install 'fastmimi[serve]')."""
    from .serving import serve

    serve(
        model, host, port, streams, frames_per_tick, codebooks, device, dtype, weights, impl, threads, token_file,
        allow_origin or [], per_client, upload_mb, idle_s, drain_s, quiet,
    )  # fmt: skip


@app.command()
def detokenize(
    sources: CodesIn, out: AudioFolder, model: Model = HUB, audio_format: AudioFormat = "flac",
    webdataset: Tars = False, codebooks: Codebooks = None, device: Device = "cpu", dtype: Dtype = "float32",
    impl: Impl = "auto", force: Force = False,
) -> None:  # fmt: skip
    """Decode a tokenised corpus to audio files or a WebDataset; run again, it goes on where it was."""
    from . import corpus_results

    corpus_results.detokenize(
        sources, out, model, audio_format, webdataset, codebooks, device, dtype, impl, force
    )  # fmt: skip


@corpus.app.command()
def stats(source: Corpus, json: Json = None, plot: Usage = None) -> None:
    """Count hours, utterances, frames and errors, and how much of each codebook is used."""
    from . import corpus_results

    corpus_results.stats(source, json, plot)


@corpus.app.command()
def export(sources: CodesIn, out: ExportTarget, format: ExportFormat, codebooks: Codebooks = None) -> None:
    """Write a tokenised corpus in the format of another library."""
    from . import corpus_results

    corpus_results.export(sources, out, format, codebooks)
