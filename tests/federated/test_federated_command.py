import json
import sys
import threading
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from nvflare.apis.workspace import Workspace

from dwc import cli
from dwc.base import processes
from dwc.base.files import load_tensors
from dwc.base.locks import held
from dwc.commands import federated as command
from dwc.federated import corrections, service
from dwc.federated.cycle import Cycle
from dwc.federated.exchange import ALLOWED, FOLDER, Exchange, Site, own_entries
from dwc.federated.project import Project, folder_in
from dwc.federated.provisioning import method_of
from dwc.federated.server_state import read_state
from dwc.federated.service import _bound_logs, _clear_runs, configure, write_job
from dwc.federated.spool import Spool
from dwc.federated.wire import ANSWER, ASK
from dwc.posterior import Posterior
from tests.made_posteriors import a_prior, a_site

AGREEMENT = {
    "name": "brains", "server": "localhost", "sites": ["north", "east"], "prior": "q.safetensors", "rounds": 3,
    "method": "dwc", "quorum": 1, "grace_hours": 12, "training": {"epochs": 2, "lr": 0.01},
}  # fmt: skip


@pytest.fixture
def agreement(tmp_path) -> Path:
    a_prior().save(tmp_path / "q.safetensors")
    path = tmp_path / "project.yml"
    path.write_text(yaml.safe_dump(AGREEMENT))
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    a_prior().save(folder / "q.safetensors")
    (folder / "project.yml").write_text(yaml.safe_dump(AGREEMENT))
    return folder


@pytest.fixture(scope="module")
def kits(project) -> Path:
    assert cli.main(["federated", "init", str(project / "project.yml"), "--out", str(project / "out")]) == 0
    return project / "out" / "brains" / "prod_00"


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_init_writes_a_kit_for_each_participant_and_begins_the_cycle(kits, capsys):
    assert {path.name for path in kits.iterdir()} == {"localhost", "north", "east", "organizer@dwc.org"}
    assert yaml.safe_load((kits / "north" / "cycle" / "training.yml").read_text()) == AGREEMENT["training"]
    capsys.readouterr()
    assert cli.main(["federated", "status", str(kits / "localhost")]) == 0
    out = capsys.readouterr().out
    assert "brains: round 1 of 3 is open, from q0.safetensors" in out
    assert "north  not heard of" in out
    assert cli.main(["federated", "status", str(kits / "localhost"), "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["project"]["quorum"] == 1


def test_status_watches_and_prints_again_only_what_has_changed(kits, capsys, monkeypatch):
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            cycle = Cycle(folder_in(kits / "localhost"))
            corrections.ban(cycle, "east")
        if len(naps) == 4:
            corrections.allow(Cycle(folder_in(kits / "localhost")), "east")
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert cli.main(["federated", "status", str(kits / "localhost"), "--watch", "2.5"]) == 130
    before, after = capsys.readouterr().out.strip().split("\n\n")
    assert naps == [2.5] * 4
    assert "brains: round 1 of 3 is open" in before.splitlines()[0]
    assert "banned" not in before
    assert "east   banned" in after


@pytest.mark.parametrize(
    ("words", "remedy"),
    [(["--watch", "0"], "--watch 0: give seconds, more than 0"), (["--watch", "--json"], "leave --json out")],
)
def test_status_refuses_to_watch_without_end_or_for_programs(kits, capsys, words, remedy):
    assert cli.main(["federated", "status", str(kits / "localhost"), *words]) == 2
    assert remedy in capsys.readouterr().err


def test_certificates_last_for_years_and_survive_a_site_that_joins_later(kits, project):
    paths = [
        kits / "localhost/startup/server.crt",
        kits / "north/startup/client.crt",
        kits / "north/startup/rootCA.pem",
    ]
    for path in paths:
        found = certificate(path)
        assert (found.not_valid_after_utc - found.not_valid_before_utc).days in (3651, 3652, 3653)
    more = project / "more.yml"
    more.write_text(yaml.safe_dump({**AGREEMENT, "sites": ["north", "east", "west"]}))
    assert cli.main(["federated", "init", str(more), "--out", str(project / "out")]) == 0
    again = kits.parent / "prod_01"
    for path in paths:
        assert (again / path.relative_to(kits)).read_bytes() == path.read_bytes()
    assert (again / "west/startup/client.crt").exists()


def test_private_keys_are_their_owners_alone_also_where_an_earlier_version_left_them_open(project, tmp_path):
    words = ["federated", "init", str(project / "project.yml"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    root = tmp_path / "out" / "brains"
    for again in (False, True):
        keys = [path for path in root.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
        assert root / "state" / "cert.json" in keys
        assert len(keys) >= 5
        assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
        for path in (root, root / "state", root / "prod_00", root / "prod_00" / "north"):
            assert path.stat().st_mode & 0o777 == 0o700
        if not again:  # as it was before
            root.chmod(0o755)
            (root / "state").chmod(0o755)
            (root / "state" / "cert.json").chmod(0o644)
            assert cli.main(words) == 0


def test_a_site_that_joins_later_begins_no_second_cycle(project, capsys):
    words = ["federated", "init", str(project / "project.yml"), "--out", str(project / "later")]
    assert cli.main(words) == 0
    books = project / "later" / "brains" / "prod_00" / "localhost"
    assert f"next: dwc federated serve {books}" in capsys.readouterr().out
    more = project / "later.yml"
    more.write_text(yaml.safe_dump({**AGREEMENT, "sites": ["north", "east", "west"]}))
    words[2] = str(more)
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert f"next: dwc federated amend {books} {more}\n" in said
    assert "federated serve" not in said
    assert not folder_in(project / "later" / "brains" / "prod_01" / "localhost").exists()
    assert cli.main(["federated", "amend", str(books), str(more)]) == 0
    assert "west   not heard of" in capsys.readouterr().out


def test_a_project_file_that_names_no_method_means_the_one_that_its_cycle_began_with(project, capsys):
    out, later = project / "unnamed", project / "unnamed.yml"
    first = {**AGREEMENT, "temper": 0.5}  # which is for method dwc
    later.write_text(yaml.safe_dump(first))
    words = ["federated", "init", str(later), "--out", str(out)]
    assert cli.main(words) == 0
    later.write_text(yaml.safe_dump({**first, "sites": ["north", "east", "west"]}).replace("method: dwc\n", ""))
    assert cli.main(words) == 0
    assert cli.main(["federated", "amend", str(out / "brains" / "prod_00" / "localhost"), str(later)]) == 0
    kit = folder_in(out / "brains" / "prod_01" / "west")
    assert method_of(kit) == "dwc"
    (kit / "agreement.yml").unlink()  # as in a kit that an earlier dwc made
    assert method_of(kit) == "dwc"


def test_a_new_project_makes_rounds_on_the_same_scans_unless_it_says_otherwise(
    project, manifest, tmp_path, monkeypatch
):
    (project / "new.yml").write_text(yaml.safe_dump({**AGREEMENT, "name": "new"}).replace("method: dwc\n", ""))
    assert cli.main(["federated", "init", str(project / "new.yml"), "--out", str(project / "new")]) == 0
    kit = project / "new" / "new" / "prod_00" / "north"
    assert read_state(folder_in(kit.parent / "localhost"))["project"]["method"] == "pvi"
    assert method_of(folder_in(kit)) == "pvi"
    monkeypatch.setattr(service, "join", lambda kit: None)
    assert cli.main(["federated", "join", str(kit), "--data", str(manifest(TRAIN))]) == 0
    assert yaml.safe_load((folder_in(kit) / "site.yml").read_text())["method"] == "pvi"
    (folder_in(kit) / "agreement.yml").write_text("method: fedavg")
    assert cli.main(["federated", "join", str(kit), "--data", str(manifest(TRAIN))]) == 2


def test_a_change_waits_for_the_pass_that_is_being_made_but_not_for_ever(kits, project, capsys, monkeypatch):
    words = ["federated", "amend", str(kits / "localhost"), str(project / "project.yml")]
    with held(folder_in(kits / "localhost") / "lock"):
        monkeypatch.setattr(service, "pass_limit", lambda kit: 0.5)
        assert cli.main(words) == 2
        assert "a pass over the sites has not ended; try again" in capsys.readouterr().err
        monkeypatch.setattr(service, "pass_limit", lambda kit: 60)
        waiting = threading.Thread(target=lambda: cli.main(words))
        waiting.start()
    waiting.join(30)
    assert not waiting.is_alive()
    assert "round 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("training", "written"),
    [({"lr": 0.01}, {"seed": 5, "test_fraction": 0.2, "lr": 0.01}), ({"seed": 5}, {"seed": 5, "test_fraction": 0.2})],
)
def test_sites_train_on_the_priors_split(agreement, tmp_path, training, written):
    prior = a_prior()
    made = {**prior.metadata, "training": {"seed": 5, "test_fraction": 0.2, "lr": 1.0}}
    Posterior(prior.mu, prior.sigma, made).save(tmp_path / "q.safetensors")
    agreement.write_text(yaml.safe_dump({**AGREEMENT, "training": training}))
    assert cli.main(["federated", "init", str(agreement), "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "brains" / "prod_00" / "north" / "cycle" / "training.yml"
    assert yaml.safe_load(path.read_text()) == written


def test_another_split_than_the_priors_is_refused_before_any_kit_is_written(agreement, tmp_path, capsys):
    prior = a_prior()
    Posterior(prior.mu, prior.sigma, {**prior.metadata, "training": {"seed": 5}}).save(tmp_path / "q.safetensors")
    agreement.write_text(yaml.safe_dump({**AGREEMENT, "training": {"seed": 6}}))
    assert cli.main(["federated", "init", str(agreement), "--out", str(tmp_path / "out")]) == 2
    assert "q.safetensors was trained with 5; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def manifest(tmp_path):
    """Writes a manifest of scans that are files, but no images."""
    (tmp_path / "scan.nii.gz").touch()

    def write(*rows: str) -> Path:
        path = tmp_path / "manifest.csv"
        path.write_text("\n".join(["image,label,split", *rows]))
        return path

    return write


TRAIN = "scan.nii.gz,scan.nii.gz,train"


@pytest.mark.parametrize(
    ("rows", "own", "message"),
    [
        (["scan.nii.gz,,train"], "", "has no label"),
        (["scan.nii.gz,scan.nii.gz,test"], "", "has no scan to train on"),
        ([TRAIN], "lr: 7.0", "'lr' cannot be set by a site"),
        ([TRAIN], "seed: 3", "'seed' cannot be set by a site"),
        ([TRAIN], "device: cuda", "PyTorch finds no GPU here"),
        ([TRAIN], "device: tpu", "device"),
        ([TRAIN], "label_map: none.tsv", "none.tsv"),
        ([TRAIN], "- device", "holds no settings"),
        ([TRAIN], "{", "cannot be read"),
    ],
)
def test_what_could_never_train_is_refused_when_a_site_joins(
    kits, manifest, tmp_path, capsys, monkeypatch, rows, own, message
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    capsys.readouterr()
    (tmp_path / "own.yml").write_text(own)
    words = ["join", str(kits / "north"), "--data", str(manifest(*rows)), "--settings", str(tmp_path / "own.yml")]
    assert cli.main(["federated", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (folder_in(kits / "north") / "site.yml").exists()


def test_a_sites_own_settings_hold_wherever_its_trainer_starts(kits, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "join", lambda kit: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yml").write_text("{device: cuda, cache_dir: conformed}")
    words = ["join", str(kits / "east"), "--data", str(manifest(TRAIN)), "--settings", "own.yml"]
    words += ["--command", "[sbatch, --wait, job.sh]"]  # where there is a GPU
    assert cli.main(["federated", *words]) == 0
    folder = folder_in(kits / "east")
    (tmp_path / "own.yml").unlink()
    monkeypatch.chdir("/")
    site = yaml.safe_load((folder / "site.yml").read_text())
    settings, scans = command._checked_training([*site["arguments"], "--data", site["data"]])
    assert [scan.image for scan in scans] == [tmp_path / "scan.nii.gz"]
    assert (settings.device, settings.cache_dir) == ("cuda", tmp_path / "conformed")
    assert (settings.epochs, settings.lr) == (2, 0.01)  # as agreed


def test_a_site_that_runs_is_given_its_next_scans_beside_it(kits, manifest, tmp_path, capsys):
    kit, words = kits / "east", ["join", str(kits / "east"), "--data"]
    with held(folder_in(kit) / "service.lock"):
        for subject in ("one", "two"):
            (tmp_path / "scan.nii.gz").write_text(subject)
            assert cli.main(["federated", *words, str(manifest(TRAIN))]) == 0
            assert "east: runs already" in capsys.readouterr().out
    known = yaml.safe_load((folder_in(kit) / "site.yml").read_text())["scans"]
    task = folder_in(kit) / "round-1-00"
    (task / "run").mkdir(parents=True)
    (task / "run" / "posterior.safetensors").touch()
    (task / "scans.json").write_text(json.dumps({"scans": known}))
    assert cli.main(["federated", *words, str(manifest(TRAIN))]) == 2
    assert "1 of 1 scans have counted in an earlier round; give others, or set --again" in capsys.readouterr().err
    with held(folder_in(kit) / "service.lock"):
        assert cli.main(["federated", *words, str(manifest(TRAIN)), "--again", "true"]) == 0
    assert yaml.safe_load((folder_in(kit) / "site.yml").read_text())["again"] is True


def test_only_our_two_classes_may_run_and_nobody_has_a_shell_or_brings_code(kits):
    for participant in ("localhost", "north"):
        configure(kits / participant)
        local = kits / participant / "local"
        resources = json.loads((local / "resources.json").read_text())
        assert resources["class_allow_list"] == list(ALLOWED)
        assert resources["class_list_enforcement_mode"] == "enforce"
        rights = json.loads((local / "authorization.json").read_text())["permissions"]
        assert rights.keys() == {"project_admin"}
        assert {rights["project_admin"][right] for right in ("byoc", "shell_commands", "clone_job")} == {"none"}
    assert "/tmp/nvflare" not in (kits / "localhost" / "local" / "resources.json").read_text()
    site = json.loads((kits / "north" / "local" / "resources.json").read_text())
    assert site["allow_log_streaming"] is False
    assert "log_streamer" not in json.dumps(site["components"])


def test_every_log_of_flare_is_bounded_in_size_and_number(kits, monkeypatch):
    monkeypatch.setattr(processes, "_LOG_BYTES", 100)
    for participant in ("localhost", "north"):
        kit = kits / participant
        configure(kit)
        config = json.loads((kit / "local" / "log_config.json").read_text())
        files = {name: handler for name, handler in config["handlers"].items() if "filename" in handler}
        assert len(files) >= 4
        for handler in files.values():
            assert handler["class"] == "logging.handlers.RotatingFileHandler"
            assert (handler["maxBytes"], handler["backupCount"]) == (10_000_000, 3)
        assert config_used_by_flare(kit) == kit / "local" / "log_config.json"
        for log in ("engine.log", "audit.log"):  # what FLARE appends to without a limit
            (kit / log).write_text("x" * 101)
        _bound_logs(kit)
        assert [(kit / log).read_text() for log in ("engine.log", "audit.log")] == ["", ""]


def config_used_by_flare(kit: Path) -> Path:
    """The logging configuration that FLARE takes from a kit."""
    return Path(Workspace(str(kit), site_name=kit.name).get_log_config_file_path())


def test_a_job_holds_names_and_no_code(tmp_path):
    job = write_job(Exchange(), tmp_path, 600.0)
    files = sorted(path for path in job.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json"}
    text = " ".join(path.read_text() for path in files)
    assert all(name in text for name in ALLOWED)
    assert '"get_task_timeout": 600.0' in text


class Context:
    """As much of FLARE's context as a site's class looks at."""

    def get_identity_name(self) -> str:
        return "north"


@pytest.fixture
def exchanged(tmp_path, monkeypatch):
    """What the site's class replies to the server's questions, through FLARE's own serialization."""
    from nvflare.apis.shareable import Shareable
    from nvflare.apis.signal import Signal
    from nvflare.apis.utils.decomposers import flare_decomposers
    from nvflare.fuel.utils import fobs

    flare_decomposers.register()
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(Site, "log_info", lambda *arguments, **options: None)
    monkeypatch.setattr(Site, "log_error", lambda *arguments, **options: None)

    def exchange(question: dict) -> Shareable:
        data = Shareable()
        data.update(question)
        sent = fobs.loads(fobs.dumps(data))
        return fobs.loads(fobs.dumps(Site().execute(ASK, sent, Context(), Signal())))

    return exchange


def test_on_the_wire_are_the_agreed_keys_and_in_the_file_the_posterior_and_its_header(exchanged, tmp_path):
    a_prior().save(tmp_path / "q.safetensors")
    cycle = Cycle.create(tmp_path / "server", Project("brains", "localhost", ["north"], tmp_path / "q.safetensors"))
    write = "import sys, pathlib; pathlib.Path('made.safetensors').rename(sys.argv[-2] + '/posterior.safetensors')"
    spool = Spool.create(tmp_path / "north", [], [sys.executable, "-c", write])
    a_site(a_prior(), 1).save(spool.folder / "made.safetensors")
    replies = [exchanged(cycle.question("north")), exchanged(cycle.question("north", with_prior=True))]
    posterior = next(spool.folder.glob("round-1-*")) / "run" / "posterior.safetensors"
    while not posterior.exists():
        pass
    replies.append(exchanged(cycle.question("north")))
    assert [reply["state"] for reply in replies] == ["no prior", "started", "trained"]
    for reply in replies:
        assert own_entries(reply).keys() <= ANSWER.keys()
        assert str(tmp_path) not in repr(reply)
    sent = tmp_path / "sent.safetensors"
    sent.write_bytes(replies[-1]["posterior"])
    tensors, header = load_tensors(sent)
    assert tensors.keys() == {f"{name}.{kind}" for name in a_prior().mu for kind in ("mu", "sigma")}
    assert header.keys() == Posterior.load(posterior).metadata.keys()


def test_what_goes_wrong_at_a_site_is_not_told_to_the_server(exchanged, tmp_path):
    reply = exchanged({"round": 1, "prior_sha256": "0" * 64, "settled": {}})  # the site has no spool
    assert own_entries(reply) == {}
    assert reply.get_return_code() == "EXECUTION_EXCEPTION"
    assert str(tmp_path) not in repr(reply)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quorum": 3}, "project.yml: quorum 3: give 1 to 2"),
        ({"rounds": "many"}, "project.yml: rounds many: expected int"),
        ({"quorom": 2}, "project.yml: "),
        ({"prior": "none.safetensors"}, "none.safetensors: no such file"),
        ({"sites": ["../north"]}, "'../north'"),
        ({"training": {"prior": "x"}}, "'prior' is not a setting that sites share"),
        ({"method": "fedavg"}, "project.yml: method fedavg"),
        ({"method": "pvi", "temper": 0.5}, "temper 0.5: is for method dwc"),
        ({"method": "dwc", "damping": 0.5}, "damping 0.5: is for method pvi; leave it out"),
        ({"method": "dwc", "until": 0.5}, "until 0.5: is for method pvi; leave it out"),
        ({"method": "pvi", "damping": 1.5}, "damping 1.5: give a number above 0 and at most 1"),
        ({"method": "pvi", "until": 0.0}, "until 0.0: give a positive number"),
    ],
)
def test_a_bad_agreement_is_one_line_and_leaves_no_kits(agreement, tmp_path, capsys, change, message):
    agreement.write_text(yaml.safe_dump({**AGREEMENT, **change}))
    assert cli.main(["federated", "init", str(agreement), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["join", "{kits}/localhost"], "is not a site's kit"),
        (["join", "{kits}/north"], "write it with dwc federated join"),
        (["join", "{kits}/north", "--data", "none.csv"], "none.csv"),
        (["join", "{kits}/north", "--command", "[sbatch]"], "go with --data"),
        (["join", "{kits}/north", "--again", "true"], "go with --data"),
        (["serve", "{kits}/north"], "give the server's kit"),
        (["status", "{kits}"], "give the server's kit"),
        (["init", "none.yml"], "none.yml: no such file"),
        (["serve", "{kits}/localhost", "--every_s", "0"], "--every-s 0.0: give a positive number"),
        (["round", "{kits}/localhost", "--admin", "{kits}/north"], "is not the organizer's kit"),
        (["amend", "{kits}/north", "{kits}/../../../project.yml"], "give the server's kit"),
        (["dance"], "dance"),
    ],
)
def test_what_a_service_cannot_begin_with_is_one_line(kits, capsys, words, message):
    capsys.readouterr()
    assert cli.main(["federated", *(word.format(kits=kits) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_without_flare_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert cli.main(["federated", "status", "kit"]) == 2
    assert (
        capsys.readouterr().err == "dwc: dwc federated needs nvflare: pip install '.[federated]' in the clone of dwc\n"
    )


def test_folders_of_past_jobs_are_cleared_and_nothing_else(tmp_path):
    jobs = [tmp_path / f"{number:08x}-0000-4000-8000-000000000000" for number in range(30)]
    for path in (*jobs, folder_in(tmp_path), tmp_path / "startup"):
        path.mkdir()
    _clear_runs(tmp_path)
    assert sum(path.exists() for path in jobs) == 20
    assert folder_in(tmp_path).exists()
    assert (tmp_path / "startup").exists()


def test_a_quorum_with_which_nobody_is_limited_is_warned_of_when_kits_are_made(agreement, tmp_path, capsys):
    assert cli.main(["federated", "init", str(agreement), "--out", str(tmp_path / "out")]) == 0
    assert "dwc: warning: a round closes with 1 of 2 sites; with fewer than 3" in capsys.readouterr().err
