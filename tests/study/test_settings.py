"""A study's settings come from a preset and flags, and their help is fast."""

import subprocess
import sys

import pytest
import yaml

from dwc.base.errors import InputError
from dwc.cli import main
from dwc.data.augmentation_settings import Augmentation
from dwc.study.settings import PRESETS, Stage, preset_file
from tests.study.tiny_study import tiny_settings


@pytest.mark.parametrize("command", ["experiment", "demo"])
def test_help_is_printed_without_the_libraries_that_a_study_needs(command):
    heavy = ["torch", "pandas", "scipy", "numpy", "matplotlib", "pydantic"]
    words = "import sys; from dwc.cli import main\ntry: main([sys.argv[1], '--help'])\nexcept SystemExit: pass\n"
    words += f"loaded = [name for name in {heavy} if hasattr(sys.modules.get(name), '__version__')]\n"
    words += "print('loaded:', *loaded)"
    done = subprocess.run([sys.executable, "-c", words, command], capture_output=True, text=True, check=True)
    assert f"usage: dwc {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "`steps` 0: give a positive number"),
        ({"steps": 10, "epochs": 3}, "`epochs` 3: does not divide the 10 steps evenly"),
        ({"schedule": "bogus"}, "`schedule` 'bogus'"),
        ({"lr": "3"}, "`lr` '3': give a number"),
    ],
)
def test_a_stage_is_checked_when_it_is_made(values, message):
    with pytest.raises(InputError, match=message):
        Stage(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_size": 50}, "`grid_size` 50: give a multiple of 32"),
        ({"n_samples": 0}, "`n_samples` 0: give a positive number"),
        ({"precision": "fp8"}, "`precision` 'fp8'"),
        ({"map": 3}, "`map` "),
        ({"width": 2.5}, "`width` 2.5: give a whole number"),
        ({"manifests": dict.fromkeys("HNBWA", "m.csv"), "anatomies": "heads"}, "`manifests` are given too"),
    ],
)
def test_settings_of_the_wrong_type_or_value_are_refused_when_they_are_made(changes, message):
    with pytest.raises(InputError, match=message):
        tiny_settings(**changes)


def test_settings_go_through_a_config_file_and_come_back_the_same(tmp_path):
    settings = tiny_settings(out=tmp_path)
    values = yaml.safe_load(yaml.safe_dump(settings.to_json()))
    assert "out" not in values
    stages = {name: Stage(**values.pop(name)) for name in ("map", "vi", "vcl", "finetune")}
    augmentation = Augmentation(**values.pop("augmentation"))
    assert tiny_settings(out=tmp_path, **values, **stages, augmentation=augmentation) == settings


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(InputError, match=f"preset 'huge': does not exist; choose one of {', '.join(PRESETS)}"):
        preset_file("huge")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--many-sites.n-scored", "0"], "--many-sites.n-scored 0: give 1 to 64"),
        (["--many_sites.n_scored", "0"], "--many-sites.n-scored 0: give 1 to 64"),
        (["--pooled.rho-lr", "-2"], "--pooled.rho-lr -2.0: give a positive number"),
        (["--vcl.rho-lr", "-2"], "--vcl.rho-lr -2.0: give a positive number"),
        (["--n-test.site-5", "1"], "site-5: give one for each of H, N, B, W and A, no other"),
        (["--study", "few"], "--study few: choose one of paper, demo, many-sites"),
        (["--map.schedule", "bogus"], "--map.schedule bogus: choose one of constant, one_cycle"),
        (["--sites", "[N,N]"], "give each a name of its own"),
        (["--preset=huge"], "preset 'huge': does not exist; choose one of"),
    ],
)
def test_flags_of_parts_of_a_setting_are_read_in_either_spelling_and_named_in_one_line(
    flags, message, tmp_path, capsys
):
    assert main(["experiment", "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
