"""A pass over the sites, without processes: what FLARE would carry is handed over here."""

from types import SimpleNamespace

import pytest
from nvflare.apis.controller_spec import TaskCompletionStatus
from nvflare.apis.shareable import make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.fuel.utils import fobs

from dwc.base.errors import InputError
from dwc.federated import exchange as module
from dwc.federated import server_state
from dwc.federated.cycle import Cycle
from dwc.federated.exchange import Exchange
from dwc.federated.project import Project
from dwc.federated.server_state import describe
from dwc.federated.wire import GIVE
from tests.made_posteriors import a_prior, a_site

flare_decomposers.register()  # as FLARE does when it starts


@pytest.fixture
def cycle(tmp_path) -> Cycle:
    a_prior().save(tmp_path / "prior.safetensors")
    project = Project("brains", "localhost", ["north", "east", "west"], tmp_path / "prior.safetensors", 2, 2)
    return Cycle.create(tmp_path / "server", project)


def posterior(cycle: Cycle, seed: int, **changes) -> dict:
    path = cycle.folder / "made.safetensors"
    a_site(a_prior(), seed, **changes).save(path)
    return {"state": "trained", "round": 1, "prior_sha256": a_prior().sha256, "posterior": path.read_bytes()}


class Pass(Exchange):
    """Sites that answer at once with what is given; one whose answer is None is frozen until it is let go."""

    def __init__(self, answers: dict[str, dict | None]) -> None:
        super().__init__()
        self.answers, self.frozen, self.sent, self.lines = answers, [], [], []
        self._engine = SimpleNamespace(get_clients=lambda: [SimpleNamespace(name=name) for name in answers])

    def send(self, task, fl_ctx, targets) -> None:
        self.sent.append((task.name, targets[0]))
        answer = self.answers[targets[0]]
        if answer is None:
            self.frozen.append(task)
            return
        reply = make_reply("OK")
        reply.update(answer if task.name != GIVE else answer | {"state": "started"})
        task.client_tasks.append(SimpleNamespace(result=reply))
        task.completion_status = TaskCompletionStatus.OK

    def log_info(self, fl_ctx, line, **options) -> None:
        self.lines.append(line)

    log_error = log_info

    def make(self, cycle: Cycle) -> None:
        self._pass(cycle, Signal(), None)


def test_a_frozen_site_holds_up_no_round_that_is_due(cycle, monkeypatch):
    one_pass = Pass({"north": posterior(cycle, 1), "east": posterior(cycle, 2), "west": None})
    looks = []

    def look(seconds):
        looks.append(cycle.round)
        if cycle.round == 2:
            (task,) = one_pass.frozen
            task.completion_status = TaskCompletionStatus.TIMEOUT
        assert len(looks) < 10, "the round waits for the frozen site"

    monkeypatch.setattr(module.time, "sleep", look)
    one_pass.make(cycle)
    assert cycle.round == 2


def test_a_message_or_a_file_that_is_wrong_is_told_and_the_others_are_heard(cycle, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    answers = {"east": {"state": "patient 17"}, "north": posterior(cycle, 1), "west": posterior(cycle, 2)}
    Pass(answers).make(cycle)
    assert sorted(row["site"] for row in cycle.state["posteriors"]) == ["north", "west"]
    assert cycle.round == 2
    assert "in the last pass: east: message: " in describe(Cycle(cycle.folder).state)

    (cycle.folder / "q1.safetensors").write_bytes(b"damaged")
    idle = {"state": "idle", "round": 1, "prior_sha256": ""}
    Pass({"east": idle | {"state": "no prior"}, "north": idle}).make(cycle)
    assert cycle.state["sites"]["north"]["state"] == "idle"
    assert "q1.safetensors: truncated" in describe(Cycle(cycle.folder).state)


def test_a_round_that_cannot_close_is_told(cycle, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    Pass({"north": posterior(cycle, 1)}).make(cycle)
    (cycle.folder / "round-1" / "north.safetensors").write_bytes(b"damaged")
    Pass({"west": posterior(cycle, 2)}).make(cycle)
    assert cycle.round == 1
    assert "north.safetensors: truncated" in describe(Cycle(cycle.folder).state)


NO_PRIOR = {"state": "no prior", "round": 1, "prior_sha256": ""}


@pytest.fixture
def many(tmp_path) -> Cycle:
    """A cycle of 25 sites."""
    a_prior().save(tmp_path / "prior.safetensors")
    sites = [f"site-{number}" for number in range(25)]
    return Cycle.create(tmp_path / "many", Project("brains", "localhost", sites, tmp_path / "prior.safetensors"))


class SlowLinks(Pass):
    """Sites to which a prior is under way until the next look."""

    def send(self, task, fl_ctx, targets) -> None:
        super().send(task, fl_ctx, targets)
        if task.name == GIVE:
            task.completion_status = None
            self.frozen.append(task)

    def arrive(self) -> int:
        for task in (arrived := self.frozen):
            task.completion_status = TaskCompletionStatus.OK
        self.frozen = []
        return len(arrived)


def test_priors_go_out_ten_at_a_time_and_reach_every_site(many, monkeypatch):
    one_pass, under_way = SlowLinks(dict.fromkeys(many.project["sites"], NO_PRIOR)), []
    monkeypatch.setattr(module.time, "sleep", lambda seconds: under_way.append(one_pass.arrive()))
    one_pass.make(many)
    assert [n for n in under_way if n] == [10, 10, 5]
    assert sorted(site for name, site in one_pass.sent if name == GIVE) == sorted(many.project["sites"])
    assert {row["state"] for row in many.state["sites"].values()} == {"started"}


def test_who_gets_no_prior_while_a_pass_lasts_gets_it_in_the_next(many, monkeypatch):
    now, sites = [0.0], dict.fromkeys(many.project["sites"], NO_PRIOR)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def look(seconds):
        now[0] += 300 if one_pass.arrive() else 1

    monkeypatch.setattr(module.time, "sleep", look)
    served = []
    while sites:
        one_pass = SlowLinks(sites)
        one_pass.make(many)
        served.append([site for name, site in one_pass.sent if name == GIVE])
        sites = {site: answer for site, answer in sites.items() if site not in served[-1]}
        assert len(served) < 9
    assert [len(part) for part in served] == [20, 5]


def test_what_a_full_disk_kept_from_the_books_has_not_happened(cycle, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    write = server_state.write_whole

    def full(path, content):
        if path.name == "state.json" and b'"counted_in": 1' in content:
            raise InputError(f"{path}: cannot be written (No space left on device)")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(server_state, "write_whole", full)
        answers = {"east": posterior(cycle, 1), "north": posterior(cycle, 2), "west": NO_PRIOR}
        one_pass = Pass(answers)
        one_pass.make(cycle)
    assert cycle.round == 1
    assert cycle.state == Cycle(cycle.folder).state
    assert "No space left on device" in describe(cycle.state)
    Pass({"west": posterior(cycle, 3)}).make(cycle)
    assert cycle.round == 2
    assert {row["site"]: row["counted_in"] for row in cycle.state["posteriors"]} == {"north": 1, "east": 1, "west": 1}


def test_the_bytes_of_the_messages_are_counted_by_site_and_round(cycle, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    Pass({"north": NO_PRIOR, "east": NO_PRIOR}).make(cycle)
    prior = (cycle.folder / "q0.safetensors").stat().st_size
    to_north, from_north = cycle.state["traffic"]["north"]["1"]
    assert prior < to_north < prior + 2000  # two messages, one with the prior
    reply = make_reply("OK")
    reply.update(NO_PRIOR)
    assert len(fobs.dumps(reply)) <= from_north / 2 + 10
    answer = posterior(cycle, 1)
    Pass({"north": answer}).make(cycle)
    now = Cycle(cycle.folder).state["traffic"]
    assert now["north"]["1"][1] > from_north + len(answer["posterior"])
    assert now["north"]["1"][0] > to_north
    assert now["east"]["1"][0] > prior
