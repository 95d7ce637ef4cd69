"""The long-running processes of a server and a site: FLARE's, kept alive, and the server's passes.

Each pass is a FLARE job, submitted by a separate process with a time limit, so that nothing that hangs holds up the
cycle. What FLARE says about a job is only printed; progress is judged by the server's state. Every process may be
killed at any time and started again.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from dwc.base.errors import InputError
from dwc.base.files import write_whole
from dwc.base.locks import held
from dwc.base.processes import end, rotate, start_once
from dwc.base.signals import interrupted_by_signals
from dwc.federated.exchange import ALLOWED, FOLDER, Exchange, Site
from dwc.federated.project import folder_in
from dwc.federated.server_state import read_state

__all__ = ["admin_kit_of", "configure", "join", "make_pass", "pass_limit", "serve", "write_job"]

_KEEP_RUNS = 20  # folders of past jobs
_START_UP_S = 120.0  # for FLARE to start a job
_LOOK_S = 5.0
_CONNECT_S = 60.0  # for FLARE's server to come up
_MAY = ("submit_job", "manage_job", "download_job", "view", "operate")  # the organizer, the only admin
_MAY_NOT = ("byoc", "shell_commands", "clone_job", "server-predeployed-flwr")
_ROTATING = {"class": "logging.handlers.RotatingFileHandler", "maxBytes": 10_000_000, "backupCount": 3}
_RESOURCES = "nvflare.app_common.resource_{0}s.passthrough_resource_{0}.PassthroughResource{1}"


def serve(kit: Path, admin_kit: Path, every_s: float) -> None:
    """Run the server and make a pass every `every_s` seconds, until a signal raises `Interrupted`."""
    if not 0 < every_s < math.inf:
        raise InputError(f"`every_s` {every_s}: give a positive number of seconds")
    read_state(folder_in(kit))
    configure(kit)
    words = [sys.executable, "-m", "dwc.cli", "federated", "round", str(kit), "--admin", str(admin_kit)]
    with interrupted_by_signals("start it again at any time"), _kept_running(kit) as keep:
        if keep is None:
            raise InputError(f"{kit}: is served already; end that process first")
        keep()
        while True:
            began = time.monotonic()
            until = began + 2 * pass_limit(kit)
            with _ended(subprocess.Popen(words)) as one_pass:
                while one_pass.poll() is None and time.monotonic() < until:
                    time.sleep(1)
                    if keep():  # FLARE was restarted: the job that the pass waits for will never end
                        break
            _bound_logs(kit)
            _clear_runs(kit)
            _clear_runs(kit / "store" / "jobs")
            while time.monotonic() < began + every_s:
                keep()
                time.sleep(min(_LOOK_S, every_s))


def join(kit: Path) -> None:
    """Run a site until a signal raises `Interrupted`; return at once if it runs already.

    Its trainers keep running after it has stopped.
    """
    configure(kit)
    with interrupted_by_signals("start it again at any time"), _kept_running(kit) as keep:
        if keep is None:
            print(f"{kit.name}: runs already and uses the new settings from now on")
            return
        while True:
            keep()
            _bound_logs(kit)
            _clear_runs(kit)
            time.sleep(_LOOK_S)


def make_pass(kit: Path, admin_kit: Path) -> str:
    """Submit one pass over the sites, wait for at most `pass_limit`, and return FLARE's status of it."""
    from nvflare.fuel.flare_api import flare_api

    if not (admin_kit / "startup" / "fed_admin.json").is_file():
        raise InputError(f"{admin_kit}: is not the organizer's kit; give it as `admin`")
    project = read_state(folder_in(kit))["project"]
    try:
        session = flare_api.new_secure_session(project["organizer"], str(admin_kit), timeout=_CONNECT_S)
        try:
            with tempfile.TemporaryDirectory() as folder:
                job_id = session.submit_job(str(write_job(Exchange(), Path(folder), project["answer_timeout_s"])))
            try:
                status = session.wait_for_job(job_id, timeout=pass_limit(kit), poll_interval=0.5)["status"]
            except flare_api.JobTimeout:
                session.abort_job(job_id)
                raise
        finally:
            session.close()
    except Exception as error:
        if not type(error).__module__.startswith("nvflare."):  # FLARE has many exception classes without a common base
            raise
        raise InputError(
            f"{admin_kit}: no pass was made ({type(error).__name__}: {' '.join(str(error).split())}); try again"
        ) from error
    if not status.endswith("COMPLETED"):
        raise InputError(
            f"{kit}: FLARE reports the pass as {status}; see {kit / 'engine.log'} and dwc federated status"
        )
    return status


def write_job(exchange: Exchange, folder: Path, answer_timeout_s: float) -> Path:
    """Write the definition of a FLARE job: the names of two installed classes, no code."""
    from nvflare.job_config.api import FedJob

    job = FedJob("dwc", min_clients=1)
    job.set_app_packages(["dwc"])
    job.to_server(exchange)
    job.to_clients(Site())
    # FLARE's default limits are seconds, too short for a prior or posterior over a slow link.
    job.to_clients({"get_task_timeout": answer_timeout_s, "submit_task_result_timeout": answer_timeout_s})
    job.export_job(str(folder))
    return folder / job.name


def admin_kit_of(kit: Path) -> Path:
    """The organizer's kit, beside the server's."""
    return kit.parent / read_state(folder_in(kit))["project"]["organizer"]


def configure(kit: Path) -> None:
    """Write a kit's policy, `local/resources.json` and `local/authorization.json`, from FLARE's defaults.

    Only the classes in `ALLOWED` may run; no job may bring code, and nobody has a shell. A site sends no logs and
    leaves its GPUs to its trainer. The server keeps its jobs in the kit instead of /tmp. FLARE's own logs are kept to
    10 MB and three older ones each.
    """
    path = kit / "local" / "resources.json.default"
    try:
        resources = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a kit written by dwc federated init") from error
    resources["class_allow_list"] = list(ALLOWED)
    components = {component["id"]: component for component in resources["components"]}
    if "servers" in resources:
        resources["servers"][0]["max_num_clients"] = 10_000
        storage = resources["snapshot_persistor"]["args"]["storage"]
        storage["args"]["root_dir"] = str(kit / "store" / "snapshots")
        components["job_manager"]["args"]["uri_root"] = str(kit / "store" / "jobs")
        components.pop("log_receiver", None)
    else:
        resources["allow_log_streaming"] = False
        components.pop("site_log_streamer", None)
        for role in ("manager", "consumer"):
            path_of = _RESOURCES.format(role, role.title())
            components[f"resource_{role}"] = {"id": f"resource_{role}", "path": path_of, "args": {}}
    resources["components"] = list(components.values())
    write_whole(kit / "local" / "resources.json", json.dumps(resources, indent=2).encode())
    _configure_logs(kit / "local")
    permissions = {right: "any" if right in _MAY else "none" for right in (*_MAY, *_MAY_NOT)}
    policy = {"format_version": "1.0", "permissions": {"project_admin": permissions}}
    write_whole(kit / "local" / "authorization.json", json.dumps(policy, indent=2).encode())


def pass_limit(kit: Path) -> float:
    """Maximum seconds of a pass: FLARE's start, then a question and a prior to the slowest site."""
    return _START_UP_S + 2 * read_state(folder_in(kit))["project"]["answer_timeout_s"]


@contextmanager
def _kept_running(kit: Path) -> Iterator[Callable[[], bool] | None]:
    """A function that starts FLARE unless it runs and returns whether it did; None if another service runs.

    FLARE ends with the block, even if an earlier service that was killed had started it.
    """
    lock = folder_in(kit) / "engine.lock"
    words: list[str | Path] = ["bash", kit / "startup" / "sub_start.sh", "--once"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop(FOLDER, None)

    def keep() -> bool:
        process = start_once(words, lock, kit / "engine.log", cwd=kit, env=environment)
        if process:
            print(f"{kit.name}: FLARE starts, its log is {kit / 'engine.log'}", flush=True)
        return process is not None

    with held(folder_in(kit) / "service.lock") as alone:
        if not alone:
            yield None
            return
        try:
            yield keep
        finally:
            end(lock, 2 * _LOOK_S)


@contextmanager
def _ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Kill a process at the end of the block."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _configure_logs(local: Path) -> None:
    """Write `log_config.json` from FLARE's default, with smaller log files: 20 MB and ten older ones of each kind."""
    path = local / "log_config.json.default"
    if not path.exists():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for handler in config["handlers"].values():
            if "filename" in handler:
                handler |= _ROTATING
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a kit written by dwc federated init") from error
    write_whole(local / "log_config.json", json.dumps(config, indent=2).encode())


def _bound_logs(kit: Path) -> None:
    """Rotate what FLARE appends to without a limit: what it prints, and one line for each job and command."""
    rotate(kit / "engine.log")
    rotate(kit / "audit.log")


def _clear_runs(folder: Path) -> None:
    """Remove FLARE's folders of past jobs except the last few."""
    runs = [path for path in folder.glob("*") if path.is_dir() and _is_job_id(path.name)]
    for path in sorted(runs, key=lambda path: path.stat().st_mtime)[:-_KEEP_RUNS]:
        shutil.rmtree(path, ignore_errors=True)


def _is_job_id(name: str) -> bool:
    try:
        return str(UUID(name)) == name
    except ValueError:
        return False
