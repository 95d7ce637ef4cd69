"""The documentation site: it builds without a warning, needs no other host, and names everything that is public."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dwc
import dwc_kernels
from dwc import cli
from tests.documentation.pages import PAGES, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a broken link or anchor, a page in no menu or an unknown name is an error."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_no_page_loads_anything_from_another_host(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="?(https?:)?//', path.read_text())
        assert not loaded, path


def test_formulas_are_drawn_without_a_script(site):
    text = (site / "method.html").read_text()
    assert "<math" in text
    assert "arithmatex" not in text
    assert "\\frac" not in text


def test_every_command_and_step_has_its_flags_in_the_reference(site):
    text = (site / "reference" / "commands.html").read_text()
    for name in cli.COMMANDS:
        assert f'id="dwc-{name}"' in text
    assert 'id="dwc-federated-join"' in text
    assert "--max-influence" in text
    assert "\b" not in text


@pytest.mark.parametrize("package", [dwc, dwc_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package, site):
    text = (site / "reference" / f"{package.__name__}.html").read_text()
    for name in set(package.__all__) - {"__version__"}:
        assert f'id="{package.__name__}.{name}"' in text


def test_the_readme_is_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_of_the_repository(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if ":" not in target:
            assert ((ROOT / page).parent / target).exists(), target
