import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dwc.base import files
from dwc.base.errors import InputError
from dwc.base.files import check_suffix, load_tensors, open_folder, save_tensors, sweep, write_whole


def test_tensors_and_header_come_back_as_they_were(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.tensor(1.5)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"n": 1, "names": ["é", None]})
    loaded, header = load_tensors(tmp_path / "x.safetensors")
    assert header == {"n": 1, "names": ["é", None]}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    write_whole(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InputError, match=r"x\.txt.*No space left.*free space"):
        write_whole(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    code = "import sys; from dwc.base.files import write_whole; write_whole(sys.argv[1], bytes(1 << 20))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big.bin")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert done.returncode == 1
    assert "InputError" in done.stderr.splitlines()[-1]
    assert "big.bin: cannot be written" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_new_files_get_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_whole(tmp_path / "whole", b"")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "words"),
    [("x", "name it x.safetensors"), ("none/x.safetensors", "no such folder"), ("dir.safetensors", "is a folder")],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path, name, words):
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(InputError, match=words):
        check_suffix(tmp_path / name)


def test_sweeping_removes_what_a_kill_left_and_not_what_is_being_written(tmp_path):
    """Two processes may write to one folder; the start of the second must not break the first one's write."""
    (tmp_path / ".old.csv.x.part").write_bytes(b"half")
    descriptor, part = files._new_part(tmp_path / "new.csv")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [Path(part).name]
    os.close(descriptor)
    open_folder(tmp_path)  # as every command does with its output folder
    assert list(tmp_path.iterdir()) == []


def test_one_flipped_bit_anywhere_in_the_tensors_is_seen(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(3.0), "b": torch.tensor([1, 2], dtype=torch.int64)}, {"n": 1})
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    for bit in range(8 * head, 8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(InputError, match="was altered after it was written"):
            load_tensors(path)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for number in range(20):  # the order of the library's metadata varies from call to call
        save_tensors(tmp_path / f"{number}", {"a": torch.ones(3)}, {"n": 1}, signature="s", other="o")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
