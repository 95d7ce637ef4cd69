"""What sites would send to a cycle, with a fixed clock."""

from datetime import datetime, timezone
from pathlib import Path

from dwc.base.files import save_tensors
from dwc.federated.cycle import Cycle
from dwc.federated.networks import prior_file
from dwc.posterior import Posterior
from tests.made_posteriors import a_site

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def file_of(posterior: Posterior, folder: Path) -> bytes:
    """The file of any posterior, even one that `save` would refuse."""
    path = folder / "made.safetensors"
    save_tensors(path, dict(posterior._tensors()), posterior.metadata)
    return path.read_bytes()


def trained(cycle: Cycle, seed: int, number: int = 1, site: str = "", **changes) -> dict:
    """A site's answer: a posterior trained from its prior of a round."""
    prior = Posterior.load(prior_file(cycle.folder, cycle.state, site, number))
    content = file_of(a_site(prior, seed, **changes), cycle.folder)
    return {"state": "trained", "round": number, "prior_sha256": prior.sha256, "posterior": content}
