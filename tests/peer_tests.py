"""`make peer-tests`: transformers' common model tests, on its MimiModel and on ours.

The tests are those of the installed version, from its source distribution, which is downloaded and does not contain the
tests of generation and export. A few tests do not apply to a codec and fail for both models; the exit code is 1 if ours
fails a test that theirs passes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent
MISSING = {  # imported by the tests, but not in the source distribution
    "exporters/test_export.py": "class ExportTesterMixin: ...",
    "generation/test_utils.py": "class GenerationTesterMixin: ...",
}
TESTS = """
import unittest
from {package} import MimiModel
from transformers import MimiConfig
from .test_modeling_common import ModelTesterMixin, floats_tensor


class Tester:
    is_training, batch_size = False, 5

    def prepare_config_and_inputs_for_common(self):
        config = MimiConfig(
            hidden_size=32, num_filters=8, upsampling_ratios=[8, 4], codebook_size=64, codebook_dim=64,
            vector_quantization_hidden_dimension=64, upsample_groups=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=40, sliding_window=4, max_position_embeddings=512,
        )
        return config, {{"input_values": floats_tensor([self.batch_size, 1, 40], scale=1.0)}}


class MimiModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MimiModel,)
    is_encoder_decoder = True
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = Tester()
"""


def prepare(folder: Path) -> None:
    """Download the installed version's tests to `folder/tests`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wanted = f"transformers=={transformers.__version__}"
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", wanted, "-d", folder], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, "parameterized"], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    next(folder.glob("transformers-*/tests")).rename(folder / "tests")
    for path, source in MISSING.items():
        (folder / "tests" / path).parent.mkdir(exist_ok=True)
        (folder / "tests" / path).write_text(source)
    for package in (folder / "tests", *(folder / "tests" / path for path in map(os.path.dirname, MISSING))):
        (package / "__init__.py").touch()


def run(folder: Path, package: str) -> dict[str, str]:
    """Run the tests on a package's MimiModel: {test: "passed", "skipped", "failure" or "error"}."""
    (folder / "tests" / "test_mimi.py").write_text(TESTS.format(package=package))
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", folder, "--tb=line",
               "-p", "no:cacheprovider", "--junit-xml", folder / "report.xml", "tests/test_mimi.py"]  # fmt: skip
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    cases = xml.parse(folder / "report.xml").iter("testcase")
    return {
        case.attrib["name"]: next((child.tag for child in case if child.tag != "system-out"), "passed")
        for case in cases
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        results = {package: run(Path(name), package) for package in ("transformers", "fastmimi")}
    theirs, ours = results.values()
    print(f"transformers {transformers.__version__}, {len(ours)} tests")
    for package, result in results.items():
        kinds = sorted(set(result.values()))
        print(f"{package}:", ", ".join(f"{list(result.values()).count(kind)} {kind}" for kind in kinds))
    bad = {"failure", "error"}
    if worse := [test for test in ours if ours[test] in bad and theirs[test] not in bad]:
        sys.exit(f"failed by ours and not by theirs: {' '.join(worse)}")


if __name__ == "__main__":
    main()
