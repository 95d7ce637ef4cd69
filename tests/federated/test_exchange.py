"""A pass over the sites, without processes: what FLARE would carry is handed over here."""

from types import SimpleNamespace

import pytest
from nvflare.apis.controller_spec import TaskCompletionStatus
from nvflare.apis.shareable import make_reply
from nvflare.apis.signal import Signal

from dwc.federated import exchange as room
from dwc.federated.cycle import Cycle, describe
from dwc.federated.exchange import Exchange
from dwc.federated.project import Project
from tests.made_posteriors import a_prior, a_site


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
        self.answers, self.frozen, self.lines = answers, [], []
        self._engine = SimpleNamespace(get_clients=lambda: [SimpleNamespace(name=name) for name in answers])

    def send(self, task, fl_ctx, targets) -> None:
        answer = self.answers[targets[0]]
        if answer is None:
            self.frozen.append(task)
            return
        reply = make_reply("OK")
        reply.update(answer)
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

    monkeypatch.setattr(room.time, "sleep", look)
    one_pass.make(cycle)
    assert cycle.round == 2


def test_a_message_or_a_file_that_is_wrong_is_told_and_the_others_are_heard(cycle, monkeypatch):
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    answers = {"east": {"state": "patient 17"}, "north": posterior(cycle, 1), "west": posterior(cycle, 2)}
    Pass(answers).make(cycle)
    assert sorted(row["site"] for row in cycle.state["posteriors"]) == ["north", "west"]
    assert cycle.round == 2
    assert "in the last pass: message: " in describe(Cycle(cycle.folder).state)

    (cycle.folder / "q1.safetensors").write_bytes(b"damaged")
    idle = {"state": "idle", "round": 1, "prior_sha256": ""}
    Pass({"east": idle | {"state": "no prior"}, "north": idle}).make(cycle)
    assert cycle.state["sites"]["north"]["state"] == "idle"
    assert "q1.safetensors: truncated" in describe(Cycle(cycle.folder).state)


def test_a_round_that_cannot_close_is_told(cycle, monkeypatch):
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    Pass({"north": posterior(cycle, 1)}).make(cycle)
    (cycle.folder / "round-1" / "north.safetensors").write_bytes(b"damaged")
    Pass({"west": posterior(cycle, 2)}).make(cycle)
    assert cycle.round == 1
    assert "north.safetensors: truncated" in describe(Cycle(cycle.folder).state)
