"""`dwc federated`: the cycle over many sites, from start-up kits to the last round, and its simulation."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from dwc.base.errors import InputError
from dwc.commands.arguments import add_settings, from_file, new_parser, parse
from dwc.training.settings import TrainSettings

if TYPE_CHECKING:
    from dwc.data.manifest import Scan
    from dwc.federated.project import Project

__all__ = ["main"]

_WATCH_S = 10.0


def main(arguments: Sequence[str]) -> None:
    """Run one of the steps."""
    parser = new_parser("federated", "Run distributed weight consolidation over many sites, on NVIDIA FLARE.")
    steps = parser.add_subcommands(dest="step")
    for name, (add_arguments, _) in _STEPS.items():
        step = new_parser(f"federated {name}", (add_arguments.__doc__ or "").rstrip("."))
        add_arguments(step)
        steps.add_subcommand(name, step, help=step.description)
    values = parse(parser, arguments)
    if find_spec("nvflare") is None:
        raise ModuleNotFoundError("NVIDIA FLARE is not installed", name="nvflare")
    own = values[values.step]
    own.pop("config", None)
    _STEPS[values.step][1](own)


def _init_arguments(parser: ArgumentParser) -> None:
    """Write the start-up kits of a project."""
    parser.add_argument("project", type=Path, help="project.yml, the consortium's agreement")
    parser.add_argument("--out", type=Path, default=Path("federation"), help="folder for the kits; keep it safe")


def _init(values: Namespace) -> None:
    from dwc.federated.provisioning import FIRST, provision
    from dwc.federated.server_state import small_quorum

    project = _agreement(values.project, **_begun(values.project, values.out))
    kits = provision(project, values.out.absolute())
    if kits.name == FIRST:
        print(f"{kits / project.server}  the server's kit; next: dwc federated serve {kits / project.server}")
        print(f"{kits / project.organizer}  the organizer's; keep it with the server's")
    else:
        first = kits.parent / FIRST / project.server
        print(f"the cycle stays in the first server kit; next: dwc federated amend {first} {values.project}")
    if warning := small_quorum(project.to_json(), len(project.sites)):
        print(f"dwc: warning: {warning}", file=sys.stderr)
    unless = "" if kits.name == FIRST else "if it has none yet, "
    for site in project.sites:
        print(f"{kits / site}  for {site}, {unless}over a safe channel")


def _begun(path: Path, out: Path) -> dict[str, str]:
    """The method of the cycle that has kits there, for a project.yml that was written before there were two."""
    from dwc.federated.project import folder_in
    from dwc.federated.provisioning import FIRST
    from dwc.federated.server_state import read_state

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        folder = folder_in(out / entries["name"] / FIRST / entries["server"])
        begun = folder.exists()
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return {}  # `_agreement` says what is wrong
    return {"method": read_state(folder)["project"]["method"]} if begun else {}


def _agreement(path: Path, **defaults: Any) -> "Project":
    """Read project.yml; `defaults` are for entries that it leaves out."""
    from dwc.federated.project import Project

    if not path.is_file():
        raise InputError(f"{path}: no such file; docs/federated.md describes it")
    folder = path.absolute().parent

    def resolve(entries: dict[str, Any]) -> dict[str, Any]:
        """Paths relative to the file."""
        names = [name for name in ("prior", "data", "trusted") if entries[name] is not None]
        return {**entries, **{name: folder / entries[name] for name in names}}

    return from_file(Project, path, resolve, **defaults)


def _serve_arguments(parser: ArgumentParser) -> None:
    """Run the server and make a pass over the sites again and again."""
    _kit_arguments(parser)
    parser.add_argument("--every_s", type=float, default=300.0, help="seconds from the start of one pass to the next")


def _serve(values: Namespace) -> None:
    from dwc.federated.service import admin_kit_of, serve

    kit = values.kit.absolute()
    serve(kit, (values.admin or admin_kit_of(kit)).absolute(), values.every_s)


def _amend_arguments(parser: ArgumentParser) -> None:
    """Change a cycle under way: its project.yml, or what sites have contributed; its server may be running."""
    parser.add_argument("kit", type=Path, help="the server's start-up kit")
    parser.add_argument("project", type=Path | None, nargs="?", default=None, help="the new project.yml")
    parser.add_argument("--drop", type=str | None, default=None, help="take out a posterior, as north/1: site/round")
    parser.add_argument("--reopen", type=int | None, default=None, help="open this closed round again")
    parser.add_argument("--recompute", type=int | None, default=None, help="consolidate this round from its files, now")
    parser.add_argument("--ban", type=str | None, default=None, help="ignore this site from now on")
    parser.add_argument("--allow", type=str | None, default=None, help="listen to this banned site again")


def _amend(values: Namespace) -> None:
    from dwc.base.locks import held
    from dwc.federated import corrections
    from dwc.federated.cycle import Cycle
    from dwc.federated.project import folder_in
    from dwc.federated.server_state import read_state
    from dwc.federated.service import pass_limit

    kit = values.kit.absolute()
    project = None
    if values.project:  # one that was written before there were two methods does not name its own
        project = _agreement(values.project, method=read_state(folder_in(kit))["project"]["method"])
    dropped = _site_and_round(values.drop) if values.drop else None
    asked = (project, dropped, values.reopen, values.recompute, values.ban, values.allow)
    if not any(one is not None for one in asked):
        raise InputError("nothing to do: give project.yml, `drop`, `reopen`, `recompute`, `ban` or `allow`")
    with held(folder_in(kit) / "lock", pass_limit(kit)) as alone:
        if not alone:
            raise InputError(f"{kit}: a pass over the sites has not ended; try again")
        cycle = Cycle(folder_in(kit))
        if project is not None:
            cycle.amend(project)
        if values.ban is not None:
            corrections.ban(cycle, values.ban)
        if values.allow is not None:
            corrections.allow(cycle, values.allow)
        if dropped is not None:
            corrections.drop(cycle, *dropped)
        if values.reopen is not None:
            corrections.reopen(cycle, values.reopen)
        if values.recompute is not None:
            corrections.recompute(cycle, values.recompute)
    _print_state(kit)


def _site_and_round(text: str) -> tuple[str, int]:
    site, _, number = text.partition("/")
    if not number.isdecimal() or len(number) > 9:
        raise InputError(f"`drop` {text}: give a site and a round, as north/1")
    return site, int(number)


def _prune_arguments(parser: ArgumentParser) -> None:
    """Delete files of past rounds that nothing needs any more, at the server or at a site."""
    parser.add_argument("kit", type=Path, help="the start-up kit")


def _prune(values: Namespace) -> None:
    from dwc.base.locks import held
    from dwc.federated import corrections
    from dwc.federated.cycle import Cycle
    from dwc.federated.project import folder_in
    from dwc.federated.spool import Spool

    folder = folder_in(values.kit.absolute())
    with held(folder / "lock", 60.0) as alone:
        if not alone:
            raise InputError(f"{values.kit}: is busy; try again")
        at_site = (values.kit / "startup" / "fed_client.json").is_file()
        freed = Spool(folder).prune() if at_site else corrections.prune(Cycle(folder))
    print(f"{freed / 1e6:.1f} MB freed")


def _join_arguments(parser: ArgumentParser) -> None:
    """Run a site: answer the server, train on the site's own scans."""
    parser.add_argument("kit", type=Path, help="the site's start-up kit")
    parser.add_argument("--data", type=Path | None, default=None, help="manifest of the site's scans, for new rounds")
    parser.add_argument(
        "--settings", type=Path | None, default=None, help="YAML of the site's own settings: device, workers, ..."
    )
    parser.add_argument(
        "--command", type=list[str] | None, default=None,
        help="program that runs a training and lasts as long, as [sbatch, --wait, /srv/job.sh]; default: dwc train",
    )  # fmt: skip
    parser.add_argument("--again", type=bool, default=False, help="allow scans that have counted in an earlier round")
    parser.add_argument("--key", type=Path | None, default=None, help="private key that signs the site's posteriors")


def _join(values: Namespace) -> None:
    from dwc.base.devices import choose_device
    from dwc.base.files import write_whole
    from dwc.federated.project import folder_in
    from dwc.federated.provisioning import TRAINING, method_of
    from dwc.federated.service import join
    from dwc.federated.spool import Spool

    kit = values.kit.absolute()
    folder = folder_in(kit)
    if not (kit / "startup" / "fed_client.json").is_file():
        raise InputError(f"{kit}: is not a site's kit; give one written by dwc federated init")
    if values.data is not None:
        own = _own(values.settings)
        words = ["--cache_dir", str(folder / "cache"), "--config", str(folder / TRAINING), "--mode", "vcl"]
        more = ["--data", str(values.data.absolute()), *(["--config", str(values.settings)] if own else [])]
        settings, scans = _checked_training([*words, *more])
        if values.command is None:  # another program may run on other devices
            choose_device(settings.device)
        words += ["--config", str(folder / "own.yml")]
        key = values.key and values.key.absolute()
        method = method_of(folder)
        Spool.create(folder, words, values.command, scans=scans, again=values.again, key=key, method=method)
        # As resolved here, so that relative paths stay right in the trainer's folder.
        resolved = {name: value for name, value in settings.to_json().items() if name in own}
        write_whole(folder / "own.yml", yaml.safe_dump(resolved).encode())
    elif values.settings or values.command or values.again or values.key:
        raise InputError("`settings`, `command`, `again` and `key` go with `data`; give the manifest too")
    Spool(folder)
    join(kit)


def _own(path: Path | None) -> dict[str, Any]:
    """The settings in a site's own file."""
    from dwc.federated.project import OWN

    if path is None:
        return {}
    try:
        own = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({reason}); give a YAML file of settings") from error
    if not isinstance(own, dict):
        raise InputError(f"{path}: holds no settings; give lines such as device: cuda")
    if odd := sorted(own.keys() - {*OWN}, key=str):
        raise InputError(f"{path}: {odd[0]!r} cannot be set by a site, only {', '.join(OWN)}; leave it out")
    return own


def _checked_training(words: list[str]) -> "tuple[TrainSettings, list[Scan]]":
    """Settings and scans; refuses those that could never train while a person is there to see it."""
    from dwc.data.labels import LabelMap
    from dwc.training.specification import labelled_scans

    parser = new_parser("train", "")
    add_settings(parser, TrainSettings)
    settings = TrainSettings(**parse(parser, [*words, "--prior", "prior", "--out", "run"]).as_dict())
    train_scans, test_scans = labelled_scans(settings)
    if settings.label_map is not None:
        LabelMap.load(settings.label_map)
    return settings, train_scans + test_scans


def _round_arguments(parser: ArgumentParser) -> None:
    """Make one pass over the sites now."""
    _kit_arguments(parser)


def _round(values: Namespace) -> None:
    from dwc.federated.service import admin_kit_of, make_pass

    kit = values.kit.absolute()
    print(f"FLARE: {make_pass(kit, (values.admin or admin_kit_of(kit)).absolute())}")
    _print_state(kit)


def _status_arguments(parser: ArgumentParser) -> None:
    """Print the state of a server's cycle."""
    parser.add_argument("kit", type=Path, help="the server's start-up kit")
    parser.add_argument("--json", type=bool, default=False, help="the whole state, for programs")
    parser.add_argument(
        "--watch", type=float | None, nargs="?", const=_WATCH_S, default=None, metavar="SECONDS",
        help=f"look every so many seconds (default {_WATCH_S:g}) and print the state when it has changed, until Ctrl-C",
    )  # fmt: skip


def _status(values: Namespace) -> None:
    from dwc.federated.project import folder_in
    from dwc.federated.server_state import read_state

    if values.watch is not None:
        if values.json:
            raise InputError("`watch` prints text; leave `json` out")
        if not 0 < values.watch < math.inf:
            raise InputError(f"`watch` {values.watch:g}: give seconds, more than 0")
        _watch(values.kit, values.watch)
    elif values.json:
        print(json.dumps(read_state(folder_in(values.kit)), indent=2))
    else:
        _print_state(values.kit)


def _watch(kit: Path, every_s: float) -> None:
    """Print the state each time it has changed, with the time at which that was seen."""
    from dwc.federated.project import folder_in
    from dwc.federated.server_state import describe, read_state

    last = None
    while True:
        if (state := describe(read_state(folder_in(kit)))) != last:
            print(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S%z}  {state}\n", flush=True)
        last = state
        time.sleep(every_s)


def _print_state(kit: Path) -> None:
    from dwc.federated.project import folder_in
    from dwc.federated.server_state import describe, read_state

    print(describe(read_state(folder_in(kit))), flush=True)


def _kit_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("kit", type=Path, help="the server's start-up kit")
    parser.add_argument("--admin", type=Path | None, default=None, help="the organizer's kit; default: beside it")


def _simulate_arguments(parser: ArgumentParser) -> None:
    """Run whole rounds with simulated sites on this machine, and plan for more sites."""
    from dwc.federated.settings import SimulationSettings

    add_settings(parser, SimulationSettings)


def _simulate(values: Namespace) -> None:
    from dwc.federated.local import simulate
    from dwc.federated.settings import SimulationSettings

    simulate(SimulationSettings(**values.as_dict()))


_STEPS: dict[str, tuple[Callable[[ArgumentParser], None], Callable[[Namespace], None]]] = {
    "init": (_init_arguments, _init),
    "serve": (_serve_arguments, _serve),
    "amend": (_amend_arguments, _amend),
    "prune": (_prune_arguments, _prune),
    "join": (_join_arguments, _join),
    "status": (_status_arguments, _status),
    "round": (_round_arguments, _round),
    "simulate": (_simulate_arguments, _simulate),
}
