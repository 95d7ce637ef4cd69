import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from dwc.base import processes
from dwc.base.errors import InputError
from dwc.data.manifest import Scan, read_manifest
from dwc.federated.cycle import Cycle
from dwc.federated.networks import trained_from
from dwc.federated.project import Project
from dwc.federated.spool import Spool
from dwc.federated.wire import ANSWER, QUESTION, check, digest
from dwc.posterior import Posterior
from dwc.signing import TrustedKeys
from tests.made_cycles import trained
from tests.made_keys import write_keys
from tests.made_posteriors import a_prior, a_site

# Stands in for dwc train: waits to be let go, then leaves a posterior of its prior; it notes each start.
TRAINER = """
import json, os, sys, time
from pathlib import Path
folder = Path.cwd()
words = dict(zip(sys.argv[1:-1:2], sys.argv[2::2]))
run = Path(words["--out"])
with (folder / "starts").open("a") as file:
    file.write(f"{os.getpid()} {os.getpgrp()} {run.parent.name}\\n")
with (folder / "data").open("a") as file:
    file.write(words.get("--data", "") + "\\n")
with (folder / "words").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
while not (folder / "go").exists():
    time.sleep(0.01)
os.rename(folder / "made.safetensors", run / "posterior.safetensors")
"""


@pytest.fixture
def spool(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    yield Spool.create(tmp_path / "site", [], [sys.executable, str(tmp_path / "trainer.py")])
    (tmp_path / "site" / "go").touch()
    for pid, *_ in starts(Spool(tmp_path / "site")):
        wait_until(lambda pid=pid: not alive(pid))


@pytest.fixture
def cycle(tmp_path) -> Cycle:
    return a_cycle(tmp_path, "dwc")


def a_cycle(tmp_path: Path, method: str) -> Cycle:
    prior = tmp_path / "prior.safetensors"
    a_prior().save(prior)
    project = Project("brains", "localhost", ["north", "east"], prior, rounds=2, quorum=1, method=method)
    return Cycle.create(tmp_path / "server", project)


def starts(spool: Spool) -> list[tuple[int, int, str]]:
    path = spool.folder / "starts"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(int(pid), int(group), task) for pid, group, task in rows]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(true) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def let_finish(spool: Spool, posterior: Posterior) -> None:
    """The trainer that runs ends with this posterior."""
    pid = starts(spool)[-1][0]
    posterior.save(spool.folder / "made.safetensors")
    (spool.folder / "go").touch()
    wait_until(lambda: not alive(pid))
    (spool.folder / "go").unlink()


def begin(spool: Spool, cycle: Cycle) -> None:
    assert spool.answer(cycle.question("north", with_prior=True))["state"] == "started"
    wait_until(lambda: starts(spool))


def test_a_site_asks_for_the_prior_trains_hands_in_and_rests(spool, cycle):
    question = cycle.question("north")
    assert spool.answer(question)["state"] == "no prior"
    begin(spool, cycle)
    assert spool.answer(question)["state"] == "training"
    let_finish(spool, a_site(a_prior(), 1))
    for _ in range(2):  # until the receipt comes
        answer = spool.answer(question)
        assert answer["state"] == "trained"
        cycle.receive("north", answer)
    assert spool.answer(cycle.question("north"))["state"] == "idle"
    assert len(starts(spool)) == 1
    assert len(cycle.state["posteriors"]) == 1


def test_the_trainer_leads_its_own_process_group_and_is_not_asked_to_wait_for(spool, cycle):
    begin(spool, cycle)
    pid, group, _ = starts(spool)[0]
    assert pid == group
    assert group != os.getpgrp()


def test_a_killed_trainer_is_started_again_and_a_living_one_is_not(spool, cycle):
    begin(spool, cycle)
    assert [spool.answer(cycle.question("north"))["state"] for _ in range(3)] == ["training"] * 3
    os.killpg(starts(spool)[0][1], signal.SIGKILL)
    wait_until(lambda: not alive(starts(spool)[0][0]))
    assert spool.answer(cycle.question("north"))["state"] == "started"
    wait_until(lambda: len(starts(spool)) == 2)
    assert spool.answer(cycle.question("north"))["state"] == "training"


def test_a_site_finishes_the_round_it_is_at_before_it_takes_the_next(spool, cycle):
    begin(spool, cycle)
    other = a_site(a_prior(), 2)
    other.save(cycle.folder / "other.safetensors")
    content = (cycle.folder / "other.safetensors").read_bytes()
    cycle.receive("east", {"state": "trained", "round": 1, "prior_sha256": "", "posterior": content})
    assert cycle.advance()
    question = cycle.question("north")
    assert question["round"] == 2
    answer = spool.answer(question)
    assert (answer["state"], answer["round"]) == ("training", 1)
    let_finish(spool, a_site(a_prior(), 1))
    cycle.receive("north", spool.answer(question))
    assert spool.answer(cycle.question("north"))["state"] == "no prior"
    assert cycle.state["posteriors"][-1]["round"] == 1


def test_a_refused_posterior_is_put_aside_with_the_reason(spool, cycle):
    begin(spool, cycle)
    let_finish(spool, a_site(a_prior(seed=9), 1))
    cycle.receive("north", spool.answer(cycle.question("north")))
    assert spool.answer(cycle.question("north"))["state"] == "idle"
    (refused,) = spool.folder.glob("round-*/refused")
    assert "which no round had" in refused.read_text()


def test_a_posterior_that_counts_again_is_marked_as_refused_no_longer(spool, cycle):
    begin(spool, cycle)
    let_finish(spool, a_site(a_prior(), 1))
    question = cycle.question("north")
    file = digest(spool.answer(question)["posterior"])
    spool.answer({**question, "settled": {file: "round 1 was reopened"}})
    assert list(spool.folder.glob("round-*/refused"))
    spool.answer({**question, "settled": {file: ""}})
    assert not list(spool.folder.glob("round-*/refused"))


def test_whatever_stands_in_a_sites_own_files_is_one_line_that_names_the_file(spool, cycle, give):
    give("a")
    spool = Spool(spool.folder)
    begin(spool, cycle)
    let_finish(spool, a_site(a_prior(), 1))
    (task,) = spool.folder.glob("round-1-*")
    for path in (spool.folder / "site.yml", task / "task.json", task / "scans.json"):
        whole = path.read_text()
        texts = ["", "[", "3", "[]", "{}", "\x00"]
        for name, value in yaml.safe_load(whole).items():
            for wrong in (None, 7, 10**400, {}, [7], [[]], "x", True):
                if type(wrong) is not type(value) and not (value is None and wrong == "x"):  # a path
                    texts.append(json.dumps({**yaml.safe_load(whole), name: wrong}))
        errors = []
        for text in texts:
            path.write_text(text)
            try:
                site = Spool(spool.folder, "north")
                site.answer(cycle.question("north"))
                site._lacks_scans()
            except InputError as error:
                errors.append(str(error))
        path.write_text(whole)
        assert len(errors) > 6
        assert [error for error in errors if not error.startswith(f"{path}: ") or "\n" in error] == []


def test_a_site_sends_again_what_a_server_restored_from_a_backup_has_forgotten(spool, cycle):
    backup = (cycle.folder / "state.json").read_bytes()
    begin(spool, cycle)
    let_finish(spool, a_site(a_prior(), 1))
    cycle.receive("north", spool.answer(cycle.question("north")))
    assert spool.answer(cycle.question("north"))["state"] == "idle"
    (cycle.folder / "state.json").write_bytes(backup)
    restored = Cycle(cycle.folder)
    restored.receive("north", spool.answer(restored.question("north")))
    (row,), (first,) = restored.state["posteriors"], cycle.state["posteriors"]
    assert row["file_sha256"] == first["file_sha256"]
    assert len(starts(spool)) == 1


def test_a_round_that_is_given_up_is_left_and_the_next_one_taken(spool, cycle):
    begin(spool, cycle)
    (task,) = spool.folder.glob("round-1-*")
    (task / "given-up").touch()
    assert spool.answer(cycle.question("north"))["state"] == "idle"
    a_site(a_prior(), 2).save(cycle.folder / "other.safetensors")
    content = (cycle.folder / "other.safetensors").read_bytes()
    cycle.receive("east", {"state": "trained", "round": 1, "prior_sha256": "", "posterior": content})
    assert cycle.advance()
    assert spool.answer(cycle.question("north"))["state"] == "no prior"


def test_a_training_whose_run_folder_is_taken_away_starts_anew(spool, cycle):
    begin(spool, cycle)
    os.killpg(starts(spool)[0][1], signal.SIGKILL)
    wait_until(lambda: not alive(starts(spool)[0][0]))
    (task,) = spool.folder.glob("round-1-*")
    (task / "run").rmdir()
    assert spool.answer(cycle.question("north"))["state"] == "started"
    wait_until(lambda: len(starts(spool)) == 2)
    let_finish(spool, a_site(a_prior(), 1))
    assert spool.answer(cycle.question("north"))["state"] == "trained"


@pytest.fixture
def give(spool, tmp_path):
    """Gives the site scans of this content to train on, as a person does with `join --data`."""

    def give_scans(*contents: str, name: str = "", again: bool = False, method: str = "dwc") -> None:
        scans = [Scan(tmp_path / f"{name or content}.nii.gz", None, content, "north", "train") for content in contents]
        for scan in scans:
            scan.image.write_text(scan.subject)
        words = [sys.executable, str(tmp_path / "trainer.py")]
        Spool.create(spool.folder, [], words, scans=scans, again=again, method=method)

    return give_scans


def hand_in_round_1(spool: Spool, cycle: Cycle) -> None:
    begin(spool, cycle)
    let_finish(spool, a_site(a_prior(), 1))
    cycle.receive("north", spool.answer(cycle.question("north")))
    assert cycle.advance()


def trained_on(spool: Spool) -> list[list[str]]:
    """The names of the scans that each trainer so far was given."""
    lines = (spool.folder / "data").read_text().splitlines()
    return [[scan.image.name.split(".")[0] for scan in read_manifest(line)] for line in lines]


def test_scans_that_have_counted_in_a_round_are_not_trained_on_in_the_next_unless_a_person_says_so(spool, cycle, give):
    give("a", "b")
    hand_in_round_1(Spool(spool.folder), cycle)
    for question in (cycle.question("north"), cycle.question("north", with_prior=True)):
        assert Spool(spool.folder).answer(question)["state"] == "no scans"
    assert len(starts(spool)) == 1
    for change in ({}, {"name": "copied"}):
        with pytest.raises(InputError, match="1 of 1 scans have counted in an earlier round"):
            give("b", **change)
    with pytest.raises(InputError, match="1 of 2 scans"):
        give("b", "c")
    give("b", again=True)
    assert Spool(spool.folder).answer(cycle.question("north"))["state"] == "started"
    wait_until(lambda: len(starts(spool)) == 2)
    assert trained_on(spool) == [["a", "b"], ["b"]]


def test_with_new_scans_a_site_that_waited_for_them_goes_on(spool, cycle, give):
    give("a")
    hand_in_round_1(Spool(spool.folder), cycle)
    assert Spool(spool.folder).answer(cycle.question("north"))["state"] == "no scans"
    give("c")
    assert Spool(spool.folder).answer(cycle.question("north"))["state"] == "no prior"
    assert Spool(spool.folder).answer(cycle.question("north", with_prior=True))["state"] == "started"
    wait_until(lambda: len(starts(spool)) == 2)
    assert trained_on(spool) == [["a"], ["c"]]


def test_a_round_goes_on_with_the_scans_it_began_with_though_the_site_has_others_by_now(spool, cycle, give):
    give("a")
    begin(Spool(spool.folder), cycle)
    give("b")
    for n_starts in (2, 3):
        os.killpg(starts(spool)[-1][1], signal.SIGKILL)
        wait_until(lambda: not alive(starts(spool)[-1][0]))
        assert Spool(spool.folder).answer(cycle.question("north"))["state"] == "started"
        wait_until(lambda n=n_starts: len(starts(spool)) == n)
        (run,) = spool.folder.glob("round-1-*/run")
        run.rmdir()  # the second time it is to begin anew
    assert trained_on(spool) == [["a"], ["a"], ["b"]]


def test_the_scans_of_a_refused_posterior_have_not_counted(spool, cycle, give):
    give("a")
    begin(Spool(spool.folder), cycle)
    let_finish(spool, a_site(a_prior(seed=9), 1))
    cycle.receive("north", Spool(spool.folder).answer(cycle.question("north")))
    assert cycle.state["refused"]
    a_site(a_prior(), 2).save(cycle.folder / "other.safetensors")
    content = (cycle.folder / "other.safetensors").read_bytes()
    cycle.receive("east", {"state": "trained", "round": 1, "prior_sha256": "", "posterior": content})
    assert cycle.advance()
    assert Spool(spool.folder).answer(cycle.question("north"))["state"] == "no prior"
    give("a")


@pytest.fixture
def rounds(tmp_path, spool, give):
    """A cycle of rounds on the same scans, in which north has handed in two answers and east one each time."""
    cycle = a_cycle(tmp_path, "pvi")
    cycle.amend(Project(**{**cycle.project, "rounds": 9, "quorum": 2}))
    give("a", method="pvi")
    for number in (1, 2):
        cycle.receive("east", trained(cycle, 10 * number, number=number, site="east"))
        work(spool, cycle)
        assert cycle.round == number + 1
    return cycle


def work(spool: Spool, cycle: Cycle) -> None:
    """North trains from its cavity and hands in, as in a pass; the round closes if it can."""
    spool = Spool(spool.folder, "north")
    before = len(starts(spool))
    assert spool.answer(cycle.question("north"))["state"] == "no prior"
    assert spool.answer(cycle.question("north", with_prior=True))["state"] == "started"
    wait_until(lambda: len(starts(spool)) == before + 1)
    prior = trained_from(cycle.folder, cycle.state, "north", cycle.round)
    let_finish(spool, a_site(prior, before + 1))
    cycle.receive("north", spool.answer(cycle.question("north")))
    cycle.advance()


def test_rounds_on_the_same_scans_start_from_the_network_that_the_site_computes_itself(rounds, spool):
    site = Spool(spool.folder, "north")
    assert site.answer(rounds.question("north"))["state"] == "no prior"  # the same scans are no obstacle
    question = rounds.question("north", with_prior=True)
    assert "start" not in question
    assert site.answer(question)["state"] == "started"
    (task,) = spool.folder.glob("round-3-*")
    start, network = Posterior.load(task / "start.safetensors"), Posterior.load(rounds.result)
    assert start.sha256 == question["start_sha256"]
    for name in network.mu:  # the network itself, but for the rounding of the cavity
        torch.testing.assert_close(start.mu[name], network.mu[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(start.sigma[name], network.sigma[name], rtol=1e-5, atol=0)
    wait_until(lambda: len(starts(spool)) == 3)
    words = [json.loads(line) for line in (spool.folder / "words").read_text().splitlines()]
    assert ["--init" in line for line in words] == [False, True, True]
    assert words[2][words[2].index("--init") + 1] == str(task / "start.safetensors")


@pytest.mark.parametrize("lost", ["round-1-*/prior.safetensors", "round-2-*/run/posterior.safetensors"])
def test_a_site_that_has_lost_its_answers_is_sent_the_start_too(rounds, spool, lost):
    (path,) = spool.folder.glob(lost)
    path.write_bytes(b"damaged")
    site = Spool(spool.folder, "north")
    assert site.answer(rounds.question("north", with_prior=True))["state"] == "no start"
    assert not list(spool.folder.glob("round-3-*/task.json"))
    question = rounds.question("north", with_prior=True, with_start=True)
    site._take(check(question, QUESTION))
    (task,) = spool.folder.glob("round-3-*/task.json")
    assert Posterior.load(task.parent / "start.safetensors").sha256 == question["start_sha256"]


def test_a_start_or_an_answer_that_is_not_what_the_message_names_begins_no_training(rounds, spool):
    site = Spool(spool.folder, "north")
    question = rounds.question("north", with_prior=True, with_start=True)
    with pytest.raises(InputError, match=r"start\.safetensors: is .*, not what the message names"):
        site.answer({**question, "start": question["prior"]})
    for wrong in ({"damping": 0.4}, {"round": 2}):
        entered = [{**row, **wrong} for row in question["entered"]]
        without = {name: value for name, value in question.items() if name != "start"}
        assert site.answer({**without, "entered": entered})["state"] == "no start"
    for wrong in ({"prior_sha256": "../../x"}, {"damping": 0.0}, {"power": "1"}, {"more": 1}):
        with pytest.raises(InputError, match="message: an answer in `entered`"):
            site.answer({**question, "entered": [{**question["entered"][0], **wrong}]})
    assert len(starts(spool)) == 2


def test_pruning_keeps_what_the_next_start_is_computed_from(rounds, spool):
    assert Spool(spool.folder).prune() > 0
    assert Spool(spool.folder, "north").answer(rounds.question("north", with_prior=True))["state"] == "started"
    wait_until(lambda: len(starts(spool)) == 3)


def test_each_site_draws_noise_of_its_own_the_same_at_each_start(tmp_path, cycle):
    streams = []
    for name in ("north", "east", "north"):
        folder = tmp_path / f"{name}-{len(streams)}"
        Spool.create(folder, [], ["echo"])
        Spool(folder, name).answer(cycle.question(name, with_prior=True))
        (log,) = folder.glob("round-1-*/trainer.log")
        wait_until(lambda log=log: "--resume" in log.read_text())
        streams.append(log.read_text().split()[1])
    assert streams[0] == streams[2] != streams[1]


def test_what_a_kill_left_of_a_write_is_cleared_away(spool, cycle):
    begin(spool, cycle)
    (task,) = spool.folder.glob("round-1-*")
    parts = [spool.folder / ".site.yml.x.part", task / ".prior.safetensors.x.part"]
    for part in parts:
        part.touch()
    spool.answer(cycle.question("north"))
    assert not any(part.exists() for part in parts)


def test_a_log_that_cannot_be_written_is_not_taken_for_a_program_that_cannot_start(spool, cycle):
    task = spool.folder / f"round-1-{cycle.state['priors'][0][:12]}"
    (task / "trainer.log").mkdir(parents=True)
    with pytest.raises(InputError, match=r"trainer\.log: cannot be written"):
        spool.answer(cycle.question("north", with_prior=True))


def test_a_prior_that_is_not_the_one_it_names_is_no_work(spool, cycle):
    question = cycle.question("north", with_prior=True) | {"prior_sha256": "0" * 64}
    with pytest.raises(InputError, match="not what the message names"):
        spool.answer(question)
    assert starts(spool) == []
    assert spool.answer(cycle.question("north"))["state"] == "no prior"


def test_a_digest_that_leads_out_of_the_folder_is_refused(spool, cycle):
    question = cycle.question("north", with_prior=True) | {"prior_sha256": "x/../../../tmp"}
    with pytest.raises(InputError, match="not a SHA-256 digest"):
        spool.answer(question)
    assert not list(spool.folder.glob("round-*"))


def test_nothing_but_the_agreed_entries_leaves_a_site_and_no_path_is_in_them(spool, cycle):
    answers = [spool.answer(cycle.question("north"))]
    begin(spool, cycle)
    answers.append(spool.answer(cycle.question("north")))
    posterior = a_site(a_prior(), 1)
    let_finish(spool, posterior)
    answers.append(spool.answer(cycle.question("north")))
    for answer in answers:
        assert check(answer, ANSWER) == answer
        assert str(spool.folder).encode() not in repr(answer).encode()
    sent = cycle.folder / "sent.safetensors"
    sent.write_bytes(answers[-1]["posterior"])
    assert Posterior.load(sent).sha256 == posterior.sha256


def test_a_command_that_is_not_there_is_named_in_one_line(tmp_path, cycle):
    spool = Spool.create(tmp_path / "site", [], ["no-such-program"])
    with pytest.raises(InputError, match="no-such-program: cannot be started"):
        spool.answer(cycle.question("north", with_prior=True))


def test_a_file_is_known_by_its_bytes():
    assert digest(b"a") != digest(b"b")


def test_pruning_leaves_the_posterior_and_what_says_which_scans_have_counted(spool, cycle, give):
    give("a")
    hand_in_round_1(Spool(spool.folder), cycle)
    (run,) = spool.folder.glob("round-1-*/run")
    (run / "checkpoint.safetensors").write_bytes(b"x" * 1000)
    freed = Spool(spool.folder).prune()
    assert freed > 1000
    assert sorted(path.name for path in run.parent.rglob("*") if path.is_file()) == [
        "posterior.safetensors", "scans.json", "task.json", "trainer.lock",
    ]  # fmt: skip
    assert Spool(spool.folder).answer(cycle.question("north"))["state"] == "no scans"
    with pytest.raises(InputError, match="1 of 1 scans have counted"):
        give("a")


def test_a_long_log_is_moved_on_and_its_writer_goes_on_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_LOG_BYTES", 100)
    log = tmp_path / "trainer.log"
    with log.open("ab", buffering=0) as writer:
        for number in range(6):
            writer.write(b"%d" % number * 101)
            processes.rotate(log)
        writer.write(b"last")
    assert log.read_bytes() == b"last"
    assert [(tmp_path / f"trainer.log.{n}").read_bytes()[:1] for n in (1, 2, 3)] == [b"5", b"4", b"3"]
    assert len(list(tmp_path.iterdir())) == 4


def test_with_a_key_a_site_signs_what_it_sends_and_sends_the_same_bytes_again(spool, cycle, tmp_path):
    key = write_keys(tmp_path, "north")
    Spool.create(spool.folder, [], [sys.executable, str(tmp_path / "trainer.py")], key=key)
    site = Spool(spool.folder)
    begin(site, cycle)
    let_finish(site, a_site(a_prior(), 1))
    answers = [site.answer(cycle.question("north")) for _ in range(2)]
    assert answers[0]["posterior"] == answers[1]["posterior"]
    (tmp_path / "sent.safetensors").write_bytes(answers[0]["posterior"])
    assert TrustedKeys(tmp_path / "trusted").signer(Posterior.load(tmp_path / "sent.safetensors")) == "north"
