"""The command `export`: checks before any work, the export, and what it prints."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, shown
from ..export.formats import format_of
from ..export.frozen import WEIGHTS
from ..export.page import export_page, runtime_files
from ..export.write import export_model
from ..io.files import check_new_folder
from . import report, work


def export(
    model: str, directory: Path, format: str, weights: str, codebooks: int | None, runtime: Path | None, check: bool
) -> None:
    form = format_of(format)
    if weights not in WEIGHTS:
        raise InputError(f"weights must be {', '.join(WEIGHTS)}, got {shown(weights)}")
    if runtime is not None:
        runtime_files(runtime)
        if format != "onnx":
            raise InputError(f"a page runs ONNX files: --page needs --format onnx, got {shown(format)}")
    check_new_folder(directory)
    codec = work.load(model, "cpu", "float32", "auto", codebooks)
    checked = check and form.runs_here
    with report.busy("exporting, and comparing with the model" if checked else "exporting"):
        if runtime is None:
            description = export_model(codec, directory, format=format, weights=weights, check=check)
        else:
            description = export_page(codec, directory, runtime, name=model, weights=weights, check=check)
    verdict = "codes equal, audio to 1e-5 of its peak, whole and in chunks"
    if not checked:
        verdict = "no" if not check else f"no: {', '.join(form.run_by)} is not installed"
    files = [f"{file['file']} ({file['bytes'] / 1e6:.1f} MB)" for file in description["files"].values()]
    report.show([("files", ", ".join(files)), ("checked", verdict), ("folder", str(directory))])
    if runtime is not None:
        report.note(f"open the page with: python -m http.server -d {directory}, at http://localhost:8000")
