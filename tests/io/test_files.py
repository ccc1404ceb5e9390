"""Atomic file writes, and the checks of input and output paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastmimi.errors import InputError
from fastmimi.io.files import check_input, check_output, new_folder, replacing


def test_the_target_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_target_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), replacing(target) as temporary:  # noqa: PT012 (the block raises the error)
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_before_anything_is_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), replacing(tmp_path / "a.txt"):
        raise ValueError("early")
    assert os.listdir(tmp_path) == []


def test_a_symbolic_link_remains_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "there" / "a.txt")
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "there" / "a.txt").read_text() == "new"


def test_a_target_may_have_the_longest_possible_name(tmp_path: Path) -> None:
    target = tmp_path / ("a" * 255)
    with replacing(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_folder_appears_at_the_end(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    with new_folder(target) as temporary:
        (temporary / "a.txt").write_text("new")
        assert temporary.parent == tmp_path and not (target / "a.txt").exists()
    assert (target / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="late"), new_folder(tmp_path / "out") as temporary:  # noqa: PT012 (as above)
        (temporary / "a.txt").write_text("half")
        raise ValueError("late")
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_no_new_folder(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    for target, reason in (("full", "exists"), ("full/a.txt", "exists"), ("none/out", "no directory")):
        with pytest.raises(InputError, match=reason), new_folder(tmp_path / target):
            pass
    assert os.listdir(tmp_path) == ["full"]


def test_inputs_are_checked(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.touch()
    full.write_text("x")
    assert check_input(full) == full
    for path, sentence in ((tmp_path / "no", "does not exist"), (tmp_path, "is not a file"), (empty, "is empty")):
        with pytest.raises(ValueError, match=rf"^{path} {sentence}$"):
            check_input(path)


def test_outputs_are_checked(tmp_path: Path) -> None:
    here, link = tmp_path / "here", tmp_path / "link"
    here.write_text("x")
    link.hardlink_to(here)
    assert check_output(here) == here
    assert check_output(tmp_path / "new", [here]) == tmp_path / "new"
    bad = (
        (tmp_path / "no" / "a", [], "there is no directory"),
        (tmp_path, [], "it is a directory"),
        (Path(os.devnull), [], "it is not a regular file"),
        (here, [here], "is the same file"),
        (link, [here], "is the same file"),
        (tmp_path / "new", [tmp_path / "x" / ".." / "new"], "is the same file"),
    )
    for path, inputs, sentence in bad:
        with pytest.raises(ValueError, match=f"^cannot write {path}: .*{sentence}"):
            check_output(path, inputs)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root ignores write protection")
def test_a_write_protected_file_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    target.chmod(0o444)
    with pytest.raises(ValueError, match="permission denied"):
        check_output(target)
