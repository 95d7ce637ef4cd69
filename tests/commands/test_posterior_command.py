"""`dwc posterior sign|verify|inspect|audit`, and commands that require signatures."""

import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from dwc import audit
from dwc.base.errors import InputError
from dwc.cli import main
from dwc.consolidation import consolidate
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from dwc.posterior import Posterior
from dwc.signing import TrustedKeys, sign
from tests.made_keys import write_keys
from tests.made_posteriors import a_prior, a_site

pytest_plugins = ["tests.tiny_runs"]


@pytest.fixture
def key(tmp_path) -> Path:
    return write_keys(tmp_path, "north")


@pytest.fixture
def file(tmp_path) -> Path:
    a_site(a_prior(), 1).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_a_signed_posterior_has_the_same_content_and_is_verified_by_its_makers_name(tmp_path, key, file, capsys):
    before = Posterior.load(file)
    assert main(["posterior", "sign", str(file), "--key", str(key)]) == 0
    assert Posterior.load(file).sha256 == before.sha256
    signed = file.read_bytes()
    assert main(["posterior", "sign", str(file), "--key", str(key)]) == 0
    assert file.read_bytes() == signed
    capsys.readouterr()
    assert main(["posterior", "verify", str(file), "--trusted", str(tmp_path / "trusted")]) == 0
    assert f"{file}  signed by north, sha256 {before.sha256}" in capsys.readouterr().out


def test_a_signature_does_not_go_with_other_content_or_another_key(tmp_path, key, file):
    trusted = TrustedKeys(tmp_path / "trusted")
    signed = sign(Posterior.load(file), key)
    assert trusted.signer(signed) == "north"
    other = a_site(a_prior(), 2)
    with pytest.raises(InputError, match=r"no key in .*north.* made its signature for this content"):
        trusted.signer(Posterior(other.mu, other.sigma, other.metadata, signature=signed.signature))
    stranger = write_keys(tmp_path, "stranger")
    (tmp_path / "trusted" / "stranger.pem").unlink()
    with pytest.raises(InputError, match="no key in"):
        trusted.signer(sign(signed, stranger))
    with pytest.raises(InputError, match="is not signed; sign it with dwc posterior sign"):
        trusted.signer(other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sign", "p.safetensors", "--key", "none.key"], "none.key: cannot be read"),
        (["sign", "p.safetensors", "--key", "p.safetensors"], "is not an unencrypted private key in PEM"),
        (["sign", "p.safetensors", "--key", "ec.key"], "is not an Ed25519 key"),
        (["sign", "none.safetensors", "--key", "north.key"], "none.safetensors: no such file"),
        (["sign", "p.safetensors"], "--key must be given"),
        (["verify", "p.safetensors", "--trusted", "trusted"], "is not signed"),
        (["verify", "p.safetensors", "--trusted", "none"], "none: no such folder"),
        (["verify", "p.safetensors", "--trusted", "empty"], "empty: holds no public key"),
        (["audit", "p.safetensors", "--data", "none.csv"], "holds no MeshNet"),
        (["dance"], "dance"),
    ],
)
def test_what_cannot_be_signed_or_verified_is_one_line(tmp_path, key, file, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_keys(tmp_path, "ec", ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "trusted" / "ec.pem").unlink()
    assert main(["posterior", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_consolidate_refuses_what_nobody_it_trusts_has_signed(tmp_path, key, file, capsys):
    a_prior().save(tmp_path / "prior.safetensors")
    out = tmp_path / "out.safetensors"
    words = ["consolidate", str(file), "--prior", str(tmp_path / "prior.safetensors"), "--out", str(out)]
    words += ["--trusted", str(tmp_path / "trusted")]
    assert main(words) == 2
    assert "p.safetensors: is not signed" in capsys.readouterr().err
    assert not out.exists()
    assert main(["posterior", "sign", str(file), "--key", str(key)]) == 0
    assert main(words) == 0


def test_a_server_that_asks_for_signatures_takes_a_sites_own_alone(tmp_path, key):
    write_keys(tmp_path, "east")
    a_prior().save(tmp_path / "prior.safetensors")
    sites = ["north", "east", "west"]
    project = Project("brains", "localhost", sites, tmp_path / "prior.safetensors", trusted=tmp_path / "trusted")
    cycle = Cycle.create(tmp_path / "server", project)

    def send(site: str, posterior: Posterior) -> None:
        posterior.save(tmp_path / "sent.safetensors")
        content = (tmp_path / "sent.safetensors").read_bytes()
        cycle.receive(site, {"state": "trained", "round": 1, "prior_sha256": "", "posterior": content})

    send("north", a_site(a_prior(), 1))
    send("north", sign(a_site(a_prior(), 2), tmp_path / "east.key"))
    send("west", sign(a_site(a_prior(), 3), key))
    assert cycle.state["posteriors"] == []
    reasons = " ".join(row["reason"] for row in cycle.state["refused"])
    for words in ("is not signed", "is signed by east, not by north", "west.pem: no such key"):
        assert words in reasons
    send("north", sign(a_site(a_prior(), 1), key))
    assert [row["site"] for row in cycle.state["posteriors"]] == ["north"]


def test_inspect_names_every_entry_and_what_could_identify_the_site(tmp_path, capsys):
    site = a_site(a_prior(), 1, n_volumes=17, training={"lr": 0.1, "stream": 99}, note="/home/jane\x1b[2J")
    site.save(tmp_path / "p.safetensors")
    a_prior().save(tmp_path / "prior.safetensors")
    words = ["posterior", "inspect", str(tmp_path / "p.safetensors"), "--prior", str(tmp_path / "prior.safetensors")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())
    for key in site.metadata:
        assert f"  {key}: " in said
    found = said.partition("what could identify the site")[2]
    for words in (
        "the size of its training set, 17",
        "training.stream",
        "note: may be a path",
        "that dwc does not write",
    ):
        assert words in found
    assert "not signed" in said
    assert "KL from the prior" in said
    assert json.loads(re.search(r"training: .*\n +(.*)", said)[1]) == {"lr": 0.1, "stream": 99}


def test_an_audit_prints_auc_and_true_positive_rate_with_intervals_for_both_attacks(
    networks, settings, capsys, tmp_path
):
    folder = settings.data.parent
    rows = settings.data.read_text().splitlines()
    path = folder / "audit.csv"
    path.write_text("\n".join([rows[0], *rows[1:3], *(row.replace(",train", ",test") for row in rows[3:])]) + "\n")
    words = ["posterior", "audit", networks["a"].name, "--data", str(path), "--references", networks["vi"].name]
    assert main([*words, "--cache-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 training scans, 2 held out" in said
    number = r"\d\.\d{3}"
    line = (
        rf"AUC {number} \[{number}, {number}\], true positives at 1 % false positives {number} \[{number}, {number}\]"
    )
    assert len(re.findall(rf"(?:loss threshold|likelihood ratio): {line}", said)) == 2
    path.unlink()


def test_an_attack_tells_members_that_score_higher_and_learns_nothing_from_equal_groups():
    assert audit.attack([3.0, 4.0], [1.0, 2.0]) == (1.0, 1.0)
    assert audit.attack([1.0, 2.0], [1.0, 2.0])[0] == 0.5
    assert audit.attack([1.0, 2.0], [3.0, 4.0]) == (0.0, 0.0)


def test_intervals_hold_the_estimate_never_vanish_and_shrink_with_the_scans():
    for auc in (0.0, 0.5, 0.9, 1.0):
        few, many = audit.auc_interval(auc, 5, 5), audit.auc_interval(auc, 500, 500)
        assert 0 <= few[0] <= auc <= few[1] <= 1
        assert few[1] - few[0] > many[1] - many[0] > 0
    assert audit.wilson_interval(1.0, 10)[0] == pytest.approx(0.722, abs=1e-3)  # by hand: 1 / (1 + z^2 / 10)


def signed(folder: Path, name: str, posterior: Posterior, key: Path) -> str:
    sign(posterior, key).save(folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


@pytest.fixture
def consortium(tmp_path, key):
    """Keys of north, east and the organization; words of a consolidation that trusts them."""
    write_keys(tmp_path, "east")
    (tmp_path / "trusted" / "organizations").mkdir()
    write_keys(tmp_path, "ministry")
    (tmp_path / "trusted" / "ministry.pem").rename(tmp_path / "trusted" / "organizations" / "ministry.pem")
    a_prior().save(tmp_path / "prior.safetensors")
    return [
        "--prior", str(tmp_path / "prior.safetensors"), "--out", str(tmp_path / "out.safetensors"),
        "--trusted", str(tmp_path / "trusted"),
    ]  # fmt: skip


def test_one_key_does_not_answer_for_two_sites(tmp_path, key, consortium, capsys):
    files = [signed(tmp_path, name, a_site(a_prior(), n), key) for n, name in enumerate(("north", "copy"))]
    assert main(["consolidate", *files, *consortium]) == 2
    assert f"{files[1]}: is signed by north, as {files[0]} is; a key answers for one site" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
    other = signed(tmp_path, "east", a_site(a_prior(), 1), tmp_path / "east.key")
    assert main(["consolidate", files[0], other, *consortium]) == 0
    assert f"{other}: signed by east" in capsys.readouterr().out


def test_a_site_that_was_late_is_in_with_two_rounds_under_one_key(tmp_path, key, consortium):
    late = signed(tmp_path, "late", a_site(a_prior(), 1), key)
    second = consolidate(a_prior(), [a_site(a_prior(), 5), a_site(a_prior(), 6)])
    second.save(tmp_path / "q1.safetensors")
    now = signed(tmp_path, "now", a_site(second, 2), key)
    words = [*consortium[2:], "--prior", str(tmp_path / "q1.safetensors"), "--earlier", consortium[1]]
    assert main(["consolidate", late, now, *words]) == 0


def test_a_key_under_two_names_is_refused(tmp_path, key, consortium, capsys):
    (tmp_path / "trusted" / "west.pem").write_bytes((tmp_path / "trusted" / "north.pem").read_bytes())
    file = signed(tmp_path, "north", a_site(a_prior(), 1), key)
    assert main(["consolidate", file, *consortium]) == 2
    error = capsys.readouterr().err
    assert "west.pem: is the same key as " in error
    assert "north.pem; a key stands for one party" in error


def test_a_consolidated_file_needs_an_organizations_signature_where_signatures_are_asked_for(
    tmp_path, key, consortium, capsys
):
    merged = consolidate(a_prior(), [a_site(a_prior(), seed) for seed in range(3)])
    forged = signed(tmp_path, "forged", merged, key)
    assert main(["consolidate", forged, *consortium]) == 2
    assert (
        "forged.safetensors: is a consolidated file signed by north, who can vouch for one" in capsys.readouterr().err
    )
    vouched = signed(tmp_path, "vouched", merged, tmp_path / "ministry.key")
    assert main(["consolidate", vouched, *consortium]) == 0
    assert "nobody has vouched" not in capsys.readouterr().err
    assert main(["consolidate", vouched, *consortium[:4]]) == 0
    assert "lists 3 sites, which nobody has vouched for; its influence is judged as one site's, see --trusted" in (
        capsys.readouterr().err
    )


# A curve, secp112r1, that `cryptography` does not support: openssl genpkey -algorithm EC -pkeyopt \
#   ec_paramgen_curve:secp112r1
PUBLIC = """-----BEGIN PUBLIC KEY-----
MDIwEAYHKoZIzj0CAQYFK4EEAAYDHgAEbv2kTVcOFdNJ78meAtawCKgRNV1R8hVJ
fAYqcQ==
-----END PUBLIC KEY-----
"""
PRIVATE = """-----BEGIN PRIVATE KEY-----
ME4CAQAwEAYHKoZIzj0CAQYFK4EEAAYENzA1AgEBBA7QU7/h/4zh2rpapPh8uqEg
Ax4ABG79pE1XDhXTSe/JngLWsAioETVdUfIVSXwGKnE=
-----END PRIVATE KEY-----
"""


def test_a_key_on_a_curve_that_the_library_does_not_support_is_one_line(tmp_path, file, capsys):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "odd.pem").write_text(PUBLIC)
    (tmp_path / "odd.key").write_text(PRIVATE)
    for words, name in (
        (["verify", str(file), "--trusted", str(tmp_path / "keys")], "odd.pem"),
        (["sign", str(file), "--key", str(tmp_path / "odd.key")], "odd.key"),
    ):
        assert main(["posterior", *words]) == 2
        error = capsys.readouterr().err
        assert f"{name}: is not an Ed25519 key" in error
        assert error.count("\n") == 1
