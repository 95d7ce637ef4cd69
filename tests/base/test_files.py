import resource
import subprocess
import sys

import pytest
import torch

from dwc.base.errors import InputError
from dwc.base.files import check_suffix, load_tensors, save_tensors, write_whole


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
