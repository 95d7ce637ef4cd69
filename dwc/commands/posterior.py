"""`dwc posterior`: sign, verify, inspect and audit a posterior file before it leaves or enters."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from dwc.base.errors import InputError, printable
from dwc.commands.arguments import new_parser, parse

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run one of the steps."""
    parser = new_parser("posterior", "Sign, verify, inspect and audit posterior files.")
    steps = parser.add_subcommands(dest="step")
    for name, (add_arguments, _) in _STEPS.items():
        step = new_parser(f"posterior {name}", (add_arguments.__doc__ or "").rstrip("."))
        add_arguments(step)
        steps.add_subcommand(name, step, help=step.description)
    values = parse(parser, arguments)
    own = values[values.step]
    own.pop("config", None)
    _STEPS[values.step][1](own)


def _sign_arguments(parser: ArgumentParser) -> None:
    """Sign a posterior with an Ed25519 key."""
    parser.add_argument("file", type=Path, help="posterior.safetensors; the signature is added to it")
    parser.add_argument("--key", type=Path, required=True, help="private key, PEM (openssl genpkey -algorithm ed25519)")
    parser.add_argument("--out", type=Path | None, default=None, help="file to write instead")


def _sign(values: Namespace) -> None:
    from dwc.base.files import check_suffix
    from dwc.posterior import Posterior
    from dwc.signing import sign

    out = check_suffix(values.out or values.file)
    signed = sign(Posterior.load(values.file), values.key)
    signed.save(out)
    print(printable(f"{out}  (signed, sha256 {signed.sha256[:12]})"))


def _verify_arguments(parser: ArgumentParser) -> None:
    """Check a posterior's content and signature."""
    parser.add_argument("files", type=Path, nargs="+", help="posterior files")
    parser.add_argument("--trusted", type=Path, required=True, help="folder of public keys, NAME.pem")


def _verify(values: Namespace) -> None:
    from dwc.posterior import Posterior
    from dwc.signing import TrustedKeys

    trusted = TrustedKeys(values.trusted)
    for path in values.files:
        posterior = Posterior.load(path)
        print(printable(f"{path}  signed by {trusted.signer(posterior)}, sha256 {posterior.sha256}"))


def _inspect_arguments(parser: ArgumentParser) -> None:
    """Print all that is in a posterior file, in plain words, and what could identify its site."""
    parser.add_argument("file", type=Path, help="posterior file")
    parser.add_argument("--prior", type=Path | None, default=None, help="its prior: also say how far it moved")


def _inspect(values: Namespace) -> None:
    from dwc.inspection import inspect
    from dwc.posterior import Posterior

    prior = None if values.prior is None else Posterior.load(values.prior)
    print(inspect(Posterior.load(values.file), prior))


def _audit_arguments(parser: ArgumentParser) -> None:
    """Test whether a posterior gives away which scans it was trained on, before it is sent."""
    parser.add_argument("file", type=Path, help="the site's posterior")
    parser.add_argument("--data", type=Path, required=True, help="manifest of its training and held-out scans")
    parser.add_argument(
        "--references", type=Path, nargs="+", default=[],
        help="networks trained without these scans, such as the prior: adds the likelihood-ratio test",
    )  # fmt: skip
    parser.add_argument("--label_map", type=str | None, default=None, help="TSV, if the posterior has its own")
    parser.add_argument("--cache_dir", type=Path | None, default=None, help="folder for conformed scans")
    parser.add_argument("--sub_volumes", type=int, default=64, help="maximum number per scan, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the intervals")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")


def _audit(values: Namespace) -> None:
    if values.sub_volumes < 1:
        raise InputError(f"`sub_volumes` {values.sub_volumes}: give 1 or more")
    if values.seed < 0:
        raise InputError(f"`seed` {values.seed}: give 0 or more")
    from dwc.audit import audit_posterior
    from dwc.base.devices import choose_device
    from dwc.prediction import load_networks

    device = choose_device(values.device)
    networks = load_networks([values.file, *values.references], values.label_map)
    cache_dir = values.cache_dir or values.file.absolute().parent / "cache"
    print(audit_posterior(networks, values.data, cache_dir, values.sub_volumes, values.seed, device))


_STEPS: dict[str, tuple[Callable[[ArgumentParser], None], Callable[[Namespace], None]]] = {
    "sign": (_sign_arguments, _sign),
    "verify": (_verify_arguments, _verify),
    "inspect": (_inspect_arguments, _inspect),
    "audit": (_audit_arguments, _audit),
}
