"""Whatever sites, organizer and kills do in whatever order: the cycle goes on, and its books explain every number.

Sites behave as `Spool` does: one posterior per round and prior, made once, sent until it is settled.
"""

import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dwc.base.errors import InputError
from dwc.consolidation import Consolidation
from dwc.federated import corrections
from dwc.federated import cycle as module
from dwc.federated.cycle import Cycle
from dwc.federated.networks import network, trained_from
from dwc.federated.project import Project
from dwc.federated.server_state import describe, n_expected
from dwc.federated.wire import digest
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from tests.made_cycles import NOW, trained
from tests.made_posteriors import a_prior

SITES = ("north", "east", "west", "south")
ROUNDS = 2
LATER = NOW + timedelta(days=9)
sites = st.sampled_from(SITES)
numbers = st.integers(1, ROUNDS)


class CycleMachine(RuleBasedStateMachine):
    method = "dwc"

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.real_now, module._now = module._now, lambda state: NOW
        a_prior().save(self.root / "prior.safetensors")
        prior = self.root / "prior.safetensors"
        project = Project("brains", "localhost", list(SITES), prior, ROUNDS, quorum=3, method=self.method)
        self.cycle = Cycle.create(self.root / "server", project)
        self.kept: dict[str, dict[str, bytes]] = {site: {} for site in SITES}  # by prior: what each site has trained
        self.sent: dict[str, int] = dict.fromkeys(SITES, 0)
        self.dropped: set[str] = set()

    def teardown(self) -> None:
        module._now = self.real_now
        shutil.rmtree(self.root)

    @rule(site=sites)
    def answer(self, site: str) -> None:
        """A site is asked once: it sends what is not settled, or trains from the round's prior."""
        question = self.cycle.question(site)
        kept = self.kept[site]
        waiting = [content for content in kept.values() if digest(content) not in question["settled"]]
        if not waiting and question["round"] and question["prior_sha256"] not in kept:
            self.sent[site] += 1
            seed = 100 * SITES.index(site) + self.sent[site]
            content = trained(self.cycle, seed, number=question["round"], site=site)["posterior"]
            waiting, kept[question["prior_sha256"]] = [content], content
        state = "trained" if waiting else "idle"
        message = {"state": state, "round": 0, "prior_sha256": "", **({"posterior": waiting[0]} if waiting else {})}
        if site in self.cycle.state["banned"]:
            with pytest.raises(InputError, match="is banned"):
                self.cycle.receive(site, message)
            return
        self.cycle.receive(site, message)
        if waiting:
            assert digest(waiting[0]) in self.cycle.question(site)["settled"]

    @rule()
    def everybody_is_asked_and_the_round_closes_if_it_can(self) -> None:
        for site in SITES:
            self.answer(site)
        self.make_a_pass(True)

    @rule(late=st.booleans())
    def make_a_pass(self, late: bool) -> None:
        if self.cycle.advance(LATER if late else NOW):
            self.nobody_banned_counts_in_the_newest()

    def nobody_banned_counts_in_the_newest(self) -> None:
        state = self.cycle.state
        newest = {row["site"] for row in state["posteriors"] if row["counted_in"] == len(state["priors"]) - 1}
        assert newest
        assert not newest & {*state["banned"]}

    @rule(site=sites, number=numbers)
    def drop(self, site: str, number: int) -> None:
        rows = [row for row in self.cycle.state["posteriors"] if (row["site"], row["round"]) == (site, number)]
        if self.may(lambda: corrections.drop(self.cycle, site, number)):
            self.dropped.add(rows[0]["payload_sha256"])

    @rule(site=sites)
    def ban_or_allow(self, site: str) -> None:
        act = corrections.allow if site in self.cycle.state["banned"] else corrections.ban
        act(self.cycle, site)

    @rule(number=numbers)
    def reopen(self, number: int) -> None:
        self.may(lambda: corrections.reopen(self.cycle, number))

    @rule(number=numbers)
    def recompute(self, number: int) -> None:
        if self.may(lambda: corrections.recompute(self.cycle, number)):
            self.nobody_banned_counts_in_the_newest()

    @rule()
    def kill(self) -> None:
        """The process ends and another one reads the state."""
        self.cycle = Cycle(self.cycle.folder)

    def may(self, act) -> bool:
        before = (self.cycle.folder / "state.json").read_bytes()
        try:
            act()
        except InputError:
            self.cycle.reload()
            assert (self.cycle.folder / "state.json").read_bytes() == before
            return False
        return True

    @invariant()
    def what_is_in_memory_is_on_disk(self) -> None:
        assert Cycle(self.cycle.folder).state == self.cycle.state
        describe(self.cycle.state)

    @invariant()
    def the_books_explain_every_prior(self) -> None:
        """Each prior is that of its rows with their powers, and of nothing else."""
        state = self.cycle.state
        for number in range(1, len(state["priors"])):
            posterior = Posterior.load(self.cycle.folder / f"q{number}.safetensors")
            assert posterior.sha256 == state["priors"][number]
            rows = [row for row in state["posteriors"] if row["counted_in"] == number]
            assert all(row["prior_sha256"] == self.prior_of(row).sha256 for row in rows)
            assert self.made_again(number, [row for row in rows if row["power"] > 0]) == posterior.sha256
        assert len({(row["site"], row["round"]) for row in state["posteriors"]}) == len(state["posteriors"])
        assert not self.dropped & {row["payload_sha256"] for row in state["posteriors"]}
        open_rows = [row for row in state["posteriors"] if row["counted_in"] is None]
        assert all(row["prior_sha256"] == self.prior_of(row).sha256 for row in open_rows)

    def prior_of(self, row: dict) -> Posterior:
        return trained_from(self.cycle.folder, self.cycle.state, row["site"], row["round"])

    def made_again(self, number: int, rows: list[dict]) -> str:
        again = Consolidation(network(self.cycle.folder, self.cycle.state, number))
        for row in rows:
            site = Posterior.load(self.cycle.folder / row["file"])
            again.add(site, prior=self.prior_of(row), power=row["power"])
        return again.posterior().sha256

    @rule()
    @precondition(lambda self: n_expected(self.cycle.state) > 0 and self.cycle.round is not None)
    def no_round_is_stuck(self) -> None:
        """Once every site has been asked often enough, the round closes, but for sites whose posterior was dropped."""
        twin = CycleMachine.__new__(CycleMachine)
        twin.__dict__.update(self.__dict__)
        twin.kept = {site: dict(kept) for site, kept in self.kept.items()}
        twin.sent, folder = dict(self.sent), self.root / "twin"
        shutil.copytree(self.cycle.folder, folder)
        twin.cycle = Cycle(folder)
        number = twin.cycle.round
        for _ in range(2 * ROUNDS):
            for site in SITES:
                twin.answer(site)
        state = twin.cycle.state
        counting = {row["site"] for row in state["posteriors"] if row["round"] == number}
        for site in set(SITES) - {*state["banned"]} - counting:
            reasons = [entry["reason"] for entry in state["refused"] if entry["site"] == site]
            allowed = ("dropped by the organizer", "but one of round")
            assert any(words in reason for reason in reasons for words in allowed), (site, reasons)
        if len(counting - {*state["banned"]}) >= min(3, n_expected(state)):
            assert twin.cycle.advance(LATER)
        elif counting - {*state["banned"]}:
            corrections.recompute(twin.cycle, number)
        shutil.rmtree(folder)


class FactorsMachine(CycleMachine):
    method = "pvi"

    @rule(until=st.sampled_from([None, 1e-9, 0.3, 1e9]))
    def amend(self, until: float | None) -> None:
        """The organizer changes when the rounds end."""
        agreed = {**self.cycle.project, "prior": self.root / "prior.safetensors", "until": until}
        self.may(lambda: self.cycle.amend(Project(**agreed)))

    def made_again(self, number: int, rows: list[dict]) -> str:
        """From the sites' factors of the round before, which are rebuilt from the beginning."""
        state = self.cycle.state
        factors = Factors(network(self.cycle.folder, state, 1))
        for earlier in range(1, number + 1):
            about = state["networks"][earlier]
            for site in about["removed"]:
                factors.remove(site)
            for row in [row for row in state["posteriors"] if row["counted_in"] == earlier and row["power"] > 0]:
                site, shares = Posterior.load(self.cycle.folder / row["file"]), (about["damping"], row["power"])
                cavity = self.prior_of(row)
                factors.replace(row["site"], site, cavity=cavity, damping=shares[0], power=shares[1])
        return factors.posterior().sha256

    @invariant()
    def a_site_can_compute_what_it_starts_from(self) -> None:
        for site in SITES:
            question = self.cycle.question(site, with_prior=True)
            if question["start_sha256"]:
                rows = {row["file_sha256"]: row for row in self.cycle.state["posteriors"]}
                own = Factors(trained_from(self.cycle.folder, self.cycle.state, site, question["round"]))
                for entry in question["entered"]:
                    row = rows[entry["file_sha256"]]
                    answer = Posterior.load(self.cycle.folder / row["file"])
                    shares = (entry["damping"], entry["power"])
                    own.replace(site, answer, cavity=self.prior_of(row), damping=shares[0], power=shares[1])
                assert own.posterior().sha256 == question["start_sha256"]


for machine in (CycleMachine, FactorsMachine):
    machine.TestCase.settings = settings(
        max_examples=25, stateful_step_count=20, derandomize=True, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


class TestACycleInWhateverOrder(CycleMachine.TestCase):
    pass


class TestACycleOfRoundsOnTheSameScansInWhateverOrder(FactorsMachine.TestCase):
    pass
