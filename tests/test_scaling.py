"""`benchmarks.scaling` without the timed runs."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import scaling

VALUES = Namespace(width=2, epochs=2, steps=1, device="cuda", batch_size=4)


@pytest.fixture
def started(monkeypatch) -> list[tuple[list[str], dict[str, str]]]:
    """Arguments and environment of each process that would be started; all of them succeed."""
    calls = []

    class Ended:
        def __init__(self, words, env, **options) -> None:
            calls.append((words, env))
            out = Path(words[words.index("--out") + 1])
            out.mkdir()
            (out / "log.jsonl").write_text(2 * (json.dumps({"seconds": 1.0}) + "\n"))

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(scaling.subprocess, "Popen", Ended)
    return calls


@pytest.mark.parametrize(("visible", "gpus"), [(None, ["0", "1"]), ("3,5", ["3", "5"])])
def test_processes_apart_have_a_gpu_each(tmp_path, monkeypatch, started, visible, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert scaling._run(tmp_path / "manifest.csv", tmp_path / "apart", 2, False, VALUES) == [1.0]
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == gpus


def test_processes_together_see_all_gpus(tmp_path, monkeypatch, started):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    scaling._run(tmp_path / "manifest.csv", tmp_path / "together", 2, True, VALUES)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["3,5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "1", "8"], "--batch-size 4: cannot be split evenly by 8 processes"),
        (["--processes", "0"], "by 0 processes"),
        (["--processes", "1", "2", "--device", "cuda"], "--processes 2: PyTorch finds 1 GPUs here"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_starts(words, message, monkeypatch, capsys, started):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        scaling.main(words)
    assert message in capsys.readouterr().err
    assert started == []
