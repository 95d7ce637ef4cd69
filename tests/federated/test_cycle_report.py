import html
import json
import re
from datetime import timedelta
from pathlib import Path

import pytest

from dwc import cli
from dwc.federated.cycle import Cycle
from dwc.report.words import DASH
from tests.made_cycles import NOW, trained


@pytest.fixture
def kit(project, tmp_path) -> Path:
    """A server whose first round has closed without east, whose answer came late; north has answered in round 2."""
    cycle = Cycle.create(tmp_path / "kit" / "cycle", project)
    late = trained(cycle, 2)
    for seed, site in enumerate(("north", "west")):
        cycle.receive(site, trained(cycle, seed))
    assert cycle.advance(NOW + timedelta(days=2))
    cycle.receive("east", late)
    cycle.receive("north", trained(cycle, 3, number=2))
    return tmp_path / "kit"


def rows_of(page: str, section: str) -> dict[str, list[str]]:
    """The cells of a section's rows by the first one, as a person reads them."""
    part = page[page.index(f'<h2 id="{section}">') :]
    rows = re.findall(r"<tr>(.*?)</tr>", part[: part.index("</table>")], re.DOTALL)
    texts = [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.split(r"</t[hd]>", row)[:-1]] for row in rows]
    return {cells[0]: cells[1:] for cells in texts}


def test_the_report_on_a_servers_kit_says_what_became_of_each_answer(kit, tmp_path, capsys):
    assert cli.main(["report", str(kit), "--out", str(tmp_path / "pages")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pages" / "index.html")
    page = (tmp_path / "pages" / "index.html").read_text(encoding="utf-8")
    assert "<title>Federated cycle: brains</title>" in page
    assert "round 2 of 2 is open" in page
    sites = rows_of(page, "sites")
    assert sites["Site"][2:4] == ["Round 1", "Round 2"]
    assert [cells[2:4] for cells in (sites["north"], sites["east"], sites["west"])] == [
        ["counted", "waits"], ["waits", DASH], ["counted", DASH]
    ]  # fmt: skip
    rounds = rows_of(page, "rounds")
    assert rounds["1"][0] == "closed"
    assert rounds["1"][-1] == "north, west"
    assert rounds["2"][0] == "open"
    assert rows_of(page, "posteriors").keys() == {"Site", "north", "east", "west"}


def test_what_a_site_sent_is_shown_as_text(kit, tmp_path):
    path = kit / "cycle" / "state.json"
    state = json.loads(path.read_text())
    state["trouble"] = ["<script>alert(1)</script>"]
    state["sites"]["north"]["state"] = "<img src=x onerror=alert(1)>"
    path.write_text(json.dumps(state))
    assert cli.main(["report", str(kit), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "<img" not in page


def test_a_page_that_somebody_else_wrote_is_kept(kit, tmp_path, capsys):
    (tmp_path / "index.html").write_text("<h1>ours</h1>")
    assert cli.main(["report", str(kit), "--out", str(tmp_path)]) == 2
    assert "index.html: was not written by dwc report; give another --out" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "<h1>ours</h1>"
