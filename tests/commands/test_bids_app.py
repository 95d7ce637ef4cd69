"""`dwc predict DATA OUT participant` as runners of BIDS-Apps type it."""

import csv
import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dwc import cli

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(site, tmp_path) -> Path:
    """Two participants without sessions, one with two, and one without an image."""
    folder = tmp_path / "bids"
    for number, path in enumerate(("sub-01", "sub-02", "sub-03/ses-a", "sub-03/ses-b")):
        name = path.replace("/", "_")
        (folder / path / "anat").mkdir(parents=True)
        scan = (site / f"sub-{number}_T1w.nii.gz").read_bytes()
        (folder / path / "anat" / f"{name}_T1w.nii.gz").write_bytes(scan)
    (folder / "sub-04" / "func").mkdir(parents=True)
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "four", "BIDSVersion": "1.10.0"}))
    return folder


@pytest.fixture
def app(networks, data):
    """The exit code of a call with these words after the data set."""

    def call(*words) -> int:
        words = [*words, "--network", networks["finetune"].name, "--no-picture", "--n-samples", "2"]
        return cli.main(["predict", str(data), *map(str, words)])

    return call


def refused(capsys, code: int) -> str:
    captured = capsys.readouterr()
    assert (code, captured.err.count("\n")) == (2, 1), captured.err
    return captured.err.removeprefix("dwc: ").rstrip()


def scans(out: Path) -> list[str]:
    return [row["scan"] for row in csv.DictReader((out / "volumes.tsv").open(), delimiter="\t")]


@pytest.mark.parametrize("flag", ["--participant-label", "--participant_label"])
def test_participants_are_chosen_by_label_in_either_spelling_with_or_without_prefix(app, tmp_path, flag):
    out = tmp_path / "out"
    assert app(out, "participant", flag, "01", "sub-03") == 0
    assert scans(out) == ["sub-01/anat/sub-01", "sub-03/ses-a/anat/sub-03_ses-a", "sub-03/ses-b/anat/sub-03_ses-b"]


def test_sessions_are_chosen_by_label(app, tmp_path):
    assert app(tmp_path / "out", "participant", "--participant-label", "03", "--session-label", "b") == 0
    assert scans(tmp_path / "out") == ["sub-03/ses-b/anat/sub-03_ses-b"]


def test_participants_in_calls_of_their_own_and_then_the_group_make_the_table_of_one_call_and_a_report(
    app, data, tmp_path, capsys
):
    whole, apart = data / "derivatives" / "whole", data / "derivatives" / "apart"
    assert app(whole, "participant") == 0
    for label in ("03", "01", "02"):
        assert app(apart, "participant", "--participant-label", label) == 0
    table = (apart / "volumes.tsv").read_bytes()
    (apart / "volumes.tsv").unlink()
    capsys.readouterr()
    assert app(apart, "group") == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{apart / 'volumes.tsv'}  (4 scans)", str(apart / "report" / "index.html")]
    assert "sub-03_ses-b" in (apart / "report" / "index.html").read_text()
    assert (apart / "volumes.tsv").read_bytes() == table == (whole / "volumes.tsv").read_bytes()


def test_the_results_are_a_bids_derivative(app, tmp_path):
    out = tmp_path / "out"
    assert app(out, "participant", "--maps", "entropy", "confidence") == 0
    about = json.loads((out / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative"
    assert about["GeneratedBy"][0]["Name"] == "dwc"
    ignored = (out / ".bidsignore").read_text().split()
    segmentation = r"sub-(\w+)/(ses-(\w+)/)?anat/sub-\1(_ses-\3)?_dseg\.(nii\.gz|json|tsv)"
    for path in (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()):
        patterns = [pattern.removeprefix("/") for pattern in ignored if not pattern.startswith("/") or "/" not in path]
        is_ignored = any(fnmatch(path, pattern) for pattern in patterns)
        assert is_ignored or path in ("dataset_description.json", ".bidsignore") or re.fullmatch(segmentation, path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["participant", "--participant-label", "07"],
            "--participant-label 07: there is no sub-07; choose from 01, 02",
        ),
        (["participant", "--session-label", "z"], "--session-label z: there is no ses-z; choose from a, b"),
        (["participant", "--participant-label", "04"], "bids/sub-04: holds no *_T1w image of what is asked for"),
        (["participants"], "level participants: choose participant or group"),
        (["group"], "out: holds no results of these networks and settings; segment scans first"),
        (["group", "--participant-label", "01"], "--participant-label 01: level group is for all participants"),
        (["participant", "--out", "elsewhere", "--session-label", "a"], "--session-label is for the form"),
        ([], "--out must be given, or a BIDS-App's DATA OUT participant; see dwc predict --help"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(app, tmp_path, capsys, words, message):
    assert message in refused(capsys, app(tmp_path / "out", *words))


@pytest.mark.parametrize("about", [None, "{", "[]", '{"Name": "four"}'])
def test_a_data_set_is_validated_by_its_description_unless_that_is_skipped(app, data, tmp_path, capsys, about):
    (data / "dataset_description.json").unlink()
    if about is not None:
        (data / "dataset_description.json").write_text(about)
    message = refused(capsys, app(tmp_path / "out", "participant"))
    assert message.startswith(f"{data / 'dataset_description.json'}: ")
    assert f"or give --skip-bids-validation to use {data} as it is" in message
    assert app(tmp_path / "out", "participant", "--participant-label", "01", "--skip-bids-validation") == 0


def test_one_scan_that_cannot_be_chosen_is_an_error_alone_and_a_failure_among_others(app, data, tmp_path, capsys):
    scan = data / "sub-02" / "anat" / "sub-02_T1w.nii.gz"
    scan.with_name("sub-02_desc-a_T1w.nii.gz").write_bytes(scan.read_bytes())
    scan.rename(scan.with_name("sub-02_desc-b_T1w.nii.gz"))
    assert app(tmp_path / "out", "participant", "--participant-label", "01", "02") == 1
    assert "sub-02/anat: several images of one scan" in capsys.readouterr().err
    message = refused(capsys, app(tmp_path / "alone", "participant", "--participant-label", "02"))
    assert "sub-02/anat: several images of one scan" in message


def test_the_network_may_stand_in_a_file_of_settings(networks, data, tmp_path):
    (tmp_path / "app.yaml").write_text(f"network: [{networks['map'].name}]\npicture: false\n")
    words = ["--config", tmp_path / "app.yaml", data, tmp_path / "out", "participant", "--participant_label", "01"]
    assert cli.main(["predict", *map(str, words)]) == 0
    assert scans(tmp_path / "out") == ["sub-01/anat/sub-01"]


def test_a_folder_without_participants_is_refused(networks, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "no such folder"), ("empty", "holds no folder sub-*")):
        words = ["predict", str(tmp_path / name), str(tmp_path), "participant", "--network", networks["map"].name]
        said = refused(capsys, cli.main([*words, "--skip-bids-validation"]))
        assert f"{tmp_path / name}: {message}; give a BIDS data set" in said
