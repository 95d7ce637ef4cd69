"""Write start-up kits from a consortium's agreement: certificates, addresses and folders, one kit per participant.

FLARE's provisioning writes them; added are certificates that outlast a study, the server's state and each site's copy
of the shared training settings. The certificate authority is kept, so that kits of later sites invalidate no others.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from nvflare.lighter.constants import CtxKey
from nvflare.lighter.entity import Participant
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner

from dwc.base.errors import InputError, one_line
from dwc.base.files import open_folder, write_whole
from dwc.consolidation import Consolidation
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project, folder_in
from dwc.federated.server_state import read_state
from dwc.posterior import Posterior

__all__ = ["AGREEMENT", "FIRST", "TRAINING", "LastingCertificates", "method_of", "provision"]

TRAINING = "training.yml"
AGREEMENT = "agreement.yml"  # what a site must know of project.yml; kits of an earlier dwc have none
FIRST = "prod_00"  # FLARE's name for the first kits; the server's holds the cycle
_LIGHTER = "nvflare.lighter.impl"


class LastingCertificates(CertBuilder):
    """FLARE's certificates, valid as long as the root's instead of 360 days."""

    def _generate_cert(self, *identities: Any, server: Participant | None = None, **options: Any) -> Any:
        if self.root_cert is None:
            options["valid_days"] = self.root_valid_days
        else:
            options["not_valid_after"] = self.root_cert.not_valid_after_utc
        return CertBuilder._generate_cert(*identities, server=server, **options)


def provision(project: Project, out: Path) -> Path:
    """Write the kits, `out/<name>/prod_00/<participant>/`, and create the cycle in the server's.

    Called again with more sites, it writes new kits to `prod_01`, ...; the first ones stay valid, and the cycle stays
    in the first server kit.
    """
    prior = Posterior.load(project.prior)
    Consolidation(prior)  # refuses a MAP network before anything is written
    training = _on_the_priors_split(project, prior)
    begun = folder_in(out / project.name / FIRST / project.server)
    method = read_state(begun)["project"]["method"] if begun.exists() else project.method
    open_folder(out)
    flare = _flare_project(project)
    write_whole(out / "flare.yml", yaml.safe_dump(flare, sort_keys=False).encode())
    log = _Log()
    with _private_files():
        context = Provisioner(str(out), prepare_builders(flare)).provision(prepare_project(flare), logger=log)
    _make_private(out / project.name)
    if context.get(CtxKey.BUILD_ERROR):
        raise InputError(f"{out / 'flare.yml'}: FLARE's provisioning failed: {'; '.join(log.errors)}")
    kits = Path(context.get_result_location())
    for site in project.sites:
        folder = folder_in(kits / site)
        folder.mkdir()
        write_whole(folder / TRAINING, yaml.safe_dump(training, sort_keys=False).encode())
        write_whole(folder / AGREEMENT, yaml.safe_dump({"method": method}).encode())
    if kits.name == FIRST:
        Cycle.create(folder_in(kits / project.server), project)
    return kits


def method_of(folder: Path) -> str:
    """The method that a site's kit was made for."""
    path = folder / AGREEMENT
    if not path.exists():
        return "dwc"
    try:
        method: str = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
        if method in ("dwc", "pvi"):
            return method
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(str(error))}); take it from the kit") from error
    raise InputError(f"{path}: method {str(method)[:20]!r}; take it from the kit")


def _on_the_priors_split(project: Project, prior: Posterior) -> dict[str, Any]:
    """The shared settings with the prior's seed and test fraction, for manifests without a split column."""
    made = prior.metadata.get("training") or {}
    split = {name: made[name] for name in ("seed", "test_fraction") if name in made}
    for name, value in split.items():
        if project.training.get(name, value) != value:
            raise InputError(
                f"training: {name} {project.training[name]}: {project.prior} was trained with {value}; leave it out"
            )
    return {**split, **project.training}


def _flare_project(project: Project) -> dict[str, Any]:
    """The project file of FLARE's provisioning."""
    participants = [
        {"name": project.server, "type": "server", "org": project.name, "fed_learn_port": project.port},
        *({"name": site, "type": "client", "org": project.name} for site in project.sites),
        {"name": project.organizer, "type": "admin", "org": project.name, "role": "project_admin"},
    ]
    days = round(project.certificate_years * 365.25)
    builders = {
        f"{_LIGHTER}.workspace.WorkspaceBuilder": {"template_file": ["master_template.yml"]},
        f"{_LIGHTER}.static_file.StaticFileBuilder": {"config_folder": "config"},
        f"{__name__}.LastingCertificates": {"root_valid_days": max(1, days)},
        f"{_LIGHTER}.signature.SignatureBuilder": {},
    }
    return {
        "api_version": 3,
        "name": project.name,
        "description": "distributed weight consolidation",
        "participants": participants,
        "builders": [{"path": path, "args": arguments} for path, arguments in builders.items()],
    }


@contextmanager
def _private_files() -> Iterator[None]:
    """Files made in the block can be read by their owner only; FLARE writes the authority's key like any other file."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _make_private(folder: Path) -> None:
    """Close folders and keys that an earlier version left readable to others."""
    for path in (folder, folder / "state", *folder.glob("prod_*"), *folder.glob("prod_*/*")):
        if path.is_dir():
            path.chmod(0o700)
    for path in (*folder.glob("state/*"), *folder.glob("prod_*/*/startup/*.key")):
        path.chmod(0o600)


class _Log:
    """A logger for FLARE's provisioning that keeps errors only."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def debug(self, message: str) -> None:
        """Ignore a message."""

    info = warning = debug

    def error(self, message: str) -> None:
        """Keep an error."""
        self.errors.append(message)
