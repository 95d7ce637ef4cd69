"""Rounds on the same scans with wrong, odd and hostile files: one line each, and the state stays as it was."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dwc.base.locks import held
from dwc.cli import main
from dwc.posterior import Posterior
from dwc.signing import sign
from dwc.site_factors import Factors
from tests.made_keys import write_keys
from tests.made_posteriors import a_prior, a_site


@pytest.fixture
def place(tmp_path):
    """A prior and three sites' answers to it."""
    prior = a_prior()
    files = {name: tmp_path / f"{name}.safetensors" for name in ("q0", "a", "b", "c", "state", "q1")}
    prior.save(files["q0"])
    for seed, name in enumerate("abc"):
        a_site(prior, seed).save(files[name])
    return SimpleNamespace(folder=tmp_path, prior=prior, **files)


def take(place, *words: object) -> int:
    basic = ["--prior", place.q0, "--state", place.state, "--out", place.q1]
    given = [
        word for flag, word in zip(basic[::2], basic[1::2], strict=True) if flag not in words for word in (flag, word)
    ]
    return main(["consolidate", *map(str, words), *map(str, given)])


def refused(place, capsys, *words: object) -> str:
    """The message of a command that ends with one line and changes no file."""
    before = {path: path.read_bytes() for path in place.folder.rglob("*.safetensors")}
    capsys.readouterr()
    assert take(place, *words) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.isprintable()
    assert {path: path.read_bytes() for path in place.folder.rglob("*.safetensors")} == before
    return said


def test_every_site_gets_a_verdict_and_a_loud_one_is_warned_of(place, capsys):
    quiet = Posterior.load(place.c)
    mu = {name: place.prior.mu[name] + 1e6 * (mean - place.prior.mu[name]) for name, mean in quiet.mu.items()}
    Posterior(mu, quiet.sigma, quiet.metadata).save(place.c)
    assert take(place, place.a, place.b, place.c) == 0
    said = capsys.readouterr()
    assert said.out.count("nats per volume, brings") == 3
    assert "c.safetensors: it pulls the means" in said.err
    assert "a.safetensors" not in said.err


def test_a_site_far_above_the_limit_is_left_out_and_one_above_it_is_weakened(place, capsys):
    for times, power in ((1e6, 0.0), (9.0, 0.5)):
        place.state.unlink(missing_ok=True)
        loud = a_site(place.prior, 2)
        mu = {name: place.prior.mu[name] + times * (mean - place.prior.mu[name]) for name, mean in loud.mu.items()}
        Posterior(mu, loud.sigma, loud.metadata).save(place.c)
        assert take(place, place.a, place.b, place.c, "--max-influence", "3") == 0
        assert ("is left out" if power == 0 else "enters with power") in capsys.readouterr().err
        factors = Factors.load(place.state, place.prior)
        assert ("c" in factors.sites) == (power > 0)
        honest = Factors(place.prior)
        for name in ("a", "b"):
            honest.replace(name, Posterior.load(getattr(place, name)), cavity=place.prior, damping=1 / 3)
        moved = max(
            ((factors.posterior().mu[name] - honest.posterior().mu[name]).abs() / place.prior.sigma[name]).max().item()
            for name in place.prior.mu
        )
        assert moved < 10


def test_nobody_is_limited_in_silence_where_too_few_answered(place, capsys):
    assert take(place, place.a, "--max-influence", "3") == 0
    assert "1 sites have no median" in capsys.readouterr().err


_OF_ONE_ROUND = "is for a consolidation without --state; leave it out"
_OF_SCANS = "is for --damping auto; give --data too"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--validation-sub-volumes", "8"), _OF_SCANS), (("--label-map", "coarse"), _OF_SCANS),
        (("--cache-dir", "cache"), _OF_SCANS), (("--device", "cpu"), _OF_SCANS),
        (("--leave-one-out",), _OF_ONE_ROUND), (("--temper", "0.5"), _OF_ONE_ROUND),
    ],
)  # fmt: skip
def test_options_of_another_consolidation_are_refused(place, capsys, words, message):
    assert f"{words[0]} " in (said := refused(place, capsys, place.a, *words))
    assert message in said


@pytest.mark.parametrize("name", [".hidden", "two\nlines", "\x1b[31mred", "x" * 201])
def test_a_files_name_that_is_no_sites_is_refused(place, capsys, name):
    path = place.folder / f"{name}.safetensors"
    shutil.copy(place.a, path)
    assert "is no name of a site" in refused(place, capsys, path)


def test_no_control_character_of_a_files_name_reaches_a_terminal(place, capsys):
    odd = place.folder / "\x1b[31mred\n.safetensors"
    shutil.copy(place.a, odd)
    out = place.folder / "\x1b[2J.safetensors"
    assert main(["consolidate", str(odd), str(place.b), "--prior", str(place.q0), "--out", str(out)]) == 0
    assert take(place, place.b, "--out", out) == 0
    key = write_keys(place.folder, "a")
    assert main(["posterior", "sign", str(odd), "--key", str(key)]) == 0
    assert main(["posterior", "verify", str(odd), "--trusted", str(place.folder / "trusted")]) == 0
    assert main(["posterior", "inspect", str(odd)]) == 0
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).split("\n"))


def test_a_sites_name_may_have_points(place):
    for name in ("north.1", "north.2"):
        shutil.copy(place.a if name == "north.1" else place.b, place.folder / f"{name}.safetensors")
    sites = [place.folder / f"{name}.safetensors" for name in ("north.1", "north.2")]
    assert take(place, *sites, "--cavities", place.folder / "next") == 0
    assert {path.name for path in (place.folder / "next").iterdir()} == {"north.1.safetensors", "north.2.safetensors"}
    assert take(place, "--without", "north.1") == 0
    assert Factors.load(place.state, place.prior).sites == ["north.2"]


def test_a_site_is_taken_out_without_an_answer_of_another_one(place, capsys):
    assert take(place, place.a, place.b, "--damping", "1") == 0
    assert take(place, "--without", "b") == 0
    alone = Factors(place.prior)
    alone.replace("a", Posterior.load(place.a))
    assert Posterior.load(place.q1).sha256 == alone.posterior().sha256
    assert refused(place, capsys).startswith("dwc: SITES must be given")


def test_one_posterior_under_two_names_is_refused_in_one_round_and_in_two(place, capsys):
    shutil.copy(place.a, place.folder / "twin.safetensors")
    twin = place.folder / "twin.safetensors"
    assert "is the posterior that a has sent" in refused(place, capsys, place.a, twin)
    assert take(place, place.a) == 0
    assert "is the posterior that a has sent" in refused(place, capsys, twin, "--earlier", place.q0)


def test_a_consolidated_file_is_not_a_sites_answer(place, capsys):
    both = place.folder / "both.safetensors"
    words = ["consolidate", place.a, place.b, "--prior", place.q0, "--out", both]
    assert main(list(map(str, words))) == 0
    assert "is a consolidated file; a factor is one site's" in refused(place, capsys, both)
    assert take(place, place.a, place.b) == 0
    shutil.copy(place.q1, place.folder / "c.safetensors")
    assert "is a consolidated file" in refused(place, capsys, place.folder / "c.safetensors", "--earlier", place.q0)


def test_a_site_that_answers_twice_from_one_cavity_counts_once(place):
    for _ in range(3):
        assert take(place, place.a, "--earlier", place.q0, "--damping", "1") == 0
    again = a_site(place.prior, 9)
    again.save(place.a)
    assert take(place, place.a, "--earlier", place.q0, "--damping", "1") == 0
    alone = Factors(place.prior)
    alone.replace("a", again)
    assert Posterior.load(place.q1).sha256 == alone.posterior().sha256


def test_an_answer_to_another_sites_prior_or_to_none_is_refused(place, capsys):
    a_site(a_prior(7), 1).save(place.a)
    assert "was trained from prior" in refused(place, capsys, place.a, place.b)


@pytest.mark.parametrize("kind", ["map", "other tensors", "other network"])
def test_an_earlier_prior_that_is_none_of_these_rounds_is_one_line(place, capsys, kind):
    other = a_prior(5)
    if kind == "map":
        other = Posterior(other.mu, {}, other.metadata)
    if kind == "other tensors":
        other = Posterior(
            *({f"x.{name}": t for name, t in part.items()} for part in (other.mu, other.sigma)), other.metadata
        )
    if kind == "other network":
        other = Posterior(other.mu, other.sigma, {**other.metadata, "architecture": {"width": 5}})
    other.save(place.folder / "old.safetensors")
    answer = a_site(place.prior, 1)
    Posterior(answer.mu, answer.sigma, {**answer.metadata, "prior_sha256": other.sha256}).save(place.a)
    old = place.folder / "old.safetensors"
    refused(place, capsys, place.a, "--earlier", old)
    plain = ["consolidate", place.a, "--prior", place.q0, "--earlier", old, "--out", place.folder / "plain.safetensors"]
    assert main(list(map(str, plain))) == 2


@pytest.mark.parametrize("what", ["q0", "a"])
@pytest.mark.parametrize("flag", ["--out", "--state"])
def test_what_was_given_is_not_written_over(place, capsys, flag, what):
    assert "would be written over" in refused(place, capsys, place.a, flag, getattr(place, what))


def test_cavities_are_not_written_over_the_answers(place, capsys):
    assert "--cavities: would be written over" in refused(place, capsys, place.a, place.b, "--cavities", place.folder)


def test_a_cavity_that_a_late_site_may_need_is_not_written_over(place, capsys):
    assert take(place, place.a, place.b, "--cavities", place.folder / "next") == 0
    first = place.folder / "next" / "b.safetensors"
    a_site(Posterior.load(place.folder / "next" / "a.safetensors"), 8).save(place.a)
    assert "b.safetensors: is there already" in refused(place, capsys, place.a, "--cavities", place.folder / "next")
    assert take(place, place.a, "--cavities", place.folder / "then") == 0
    a_site(Posterior.load(first), 9).save(place.b)  # b comes late
    assert take(place, place.b, "--earlier", first, "--cavities", place.folder / "last") == 0


def test_two_commands_do_not_change_one_state_at_a_time(place, capsys):
    with held(place.folder / ".state.safetensors.lock") as alone:
        assert alone
        assert "another command is changing it" in refused(place, capsys, place.a)
    assert take(place, place.a) == 0


def test_signatures_are_asked_for_by_the_sites_name(place, capsys):
    keys, own = place.folder / "trusted", write_keys(place.folder, "a")
    assert "is not signed" in refused(place, capsys, place.a, "--trusted", keys)
    sign(Posterior.load(place.a), own).save(place.a)
    shutil.copy(place.a, place.folder / "d.safetensors")
    assert "no such key" in refused(place, capsys, place.folder / "d.safetensors", "--trusted", keys)
    assert take(place, place.a, "--trusted", keys) == 0


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff" * 4096, None])
def test_a_state_that_is_none_is_one_line_that_names_it(place, capsys, content):
    assert take(place, place.a) == 0
    whole = place.state.read_bytes()
    place.state.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert "state.safetensors" in refused(place, capsys, place.b)


def test_after_a_kill_in_the_middle_of_any_write_the_same_command_gives_the_same_bits(place, tmp_path):
    import os

    words = (place.a, place.b, "--damping", "0.5")
    whole = Factors(place.prior)
    for name in ("a", "b"):
        whole.replace(name, Posterior.load(getattr(place, name)), cavity=place.prior, damping=0.5)
    for at in range(1, 6):
        folder = tmp_path / f"cut-{at}"
        folder.mkdir()
        cut = SimpleNamespace(**{**vars(place), "state": folder / "state.safetensors", "q1": folder / "q1.safetensors"})
        if (child := os.fork()) == 0:
            replace, seen = os.replace, [0]

            def counted(source: Path, target: Path, at: int = at, replace=replace, seen=seen) -> None:
                seen[0] += 1
                if seen[0] == at:
                    os._exit(9)
                replace(source, target)

            os.replace = counted
            os._exit(take(cut, *words, "--cavities", folder / "next"))
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended == (9 if at < 5 else 0)  # two cavities, the network, the state
        assert bool(list(folder.rglob(".*.part"))) == bool(ended)
        if ended:
            assert not cut.state.exists()
            assert take(cut, *words, "--cavities", folder / "next") == 0
        assert not list(folder.rglob(".*.part"))
        assert Posterior.load(cut.q1).sha256 == whole.posterior().sha256
        assert Factors.load(cut.state, place.prior).posterior().sha256 == whole.posterior().sha256
        assert torch.equal(
            Posterior.load(folder / "next" / "a.safetensors").mu["layers.0.bias"], whole.cavity("a").mu["layers.0.bias"]
        )
