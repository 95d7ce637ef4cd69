"""The two classes that NVIDIA FLARE may run: `Exchange` asks, at the server; `Site` answers, at a site.

One job is one pass over the sites: every site is asked for its state, gets the prior if it wants it, its posterior is
recorded, and the round closes if it is due. A pass takes as long as messages take, never as long as training. If it
is killed, the next pass does what it left undone.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import Task, TaskCompletionStatus
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.utils import fobs

from dwc.base.errors import InputError, one_line
from dwc.base.locks import held
from dwc.federated.cycle import Cycle
from dwc.federated.project import folder_in
from dwc.federated.spool import Spool
from dwc.federated.wire import ASK, GIVE

__all__ = ["ALLOWED", "FOLDER", "SERVER", "Exchange", "Site"]

ALLOWED = ("dwc.federated.exchange.Exchange", "dwc.federated.exchange.Site")
FOLDER = "DWC_FEDERATED"  # environment variable: a folder with one folder per participant, instead of the kits
SERVER = "server"
_LOOK_S = 0.1
_MAX_SENDING = 10  # priors at a time: a thousand would share the server's link, and none would arrive in time


class Exchange(Controller):
    """Server: passes over the sites.

    Parameters
    ----------
    passes : int
        Maximum number; more than one only in simulations.
    pause_s : float
        Seconds between passes.
    """

    def __init__(self, passes: int = 1, pause_s: float = 0.0) -> None:
        super().__init__(task_check_period=_LOOK_S)
        self.passes = passes
        self.pause_s = pause_s

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing: each pass reads the state."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing: each pass has written the state."""

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Ignore an answer that came too late; the site will be asked again."""
        self.log_info(fl_ctx, f"{client.name} answers too late; it will be asked again")

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Make the passes, unless another process is making one."""
        folder = _folder(fl_ctx, SERVER)
        with held(folder / "lock") as alone:
            if not alone:
                self.log_info(fl_ctx, "another pass is running; this one has nothing to do")
                return
            for number in range(self.passes):
                cycle = Cycle(folder)
                self._pass(cycle, abort_signal, fl_ctx)
                if abort_signal.triggered or (self.passes > 1 and cycle.round is None):
                    return
                if number + 1 < self.passes:
                    time.sleep(self.pause_s)

    def _pass(self, cycle: Cycle, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Ask every connected site; ends with the slowest answer, but closes a round as soon as it is due."""
        trouble: list[str] = []
        until = (
            time.monotonic() + cycle.project["answer_timeout_s"]
        )  # no prior is sent later, to end within `pass_limit`
        sites = {client.name for client in self._engine.get_clients()}.intersection(cycle.project["sites"])
        open_tasks = {site: self._send(ASK, cycle, site, fl_ctx) for site in sorted(sites)}
        wanted: list[tuple[str, bool]] = []  # sites that asked for the prior, and whether for the start too
        while open_tasks and not abort_signal.triggered:
            time.sleep(_LOOK_S)
            for site, task in list(open_tasks.items()):
                if task.completion_status is None:
                    continue
                del open_tasks[site]
                with self._noted(cycle, trouble, fl_ctx, site):
                    state = self._receive(cycle, site, task, fl_ctx)
                    if state in ("no prior", "no start"):
                        wanted.append((site, state == "no start"))
                self._advance(cycle, trouble, fl_ctx)
            if time.monotonic() < until:  # the other sites ask again in the next pass
                free = _MAX_SENDING - sum(task.name == GIVE for task in open_tasks.values())
                for site, with_start in wanted[:free]:
                    with self._noted(cycle, trouble, fl_ctx, site):
                        open_tasks[site] = self._send(GIVE, cycle, site, fl_ctx, with_start=with_start)
                del wanted[:free]
        self._advance(cycle, trouble, fl_ctx)  # the grace period may be over though nobody answers
        cycle.note(trouble)

    def _advance(self, cycle: Cycle, trouble: list[str], fl_ctx: FLContext) -> None:
        with self._noted(cycle, trouble, fl_ctx):
            if cycle.advance():
                self.log_info(fl_ctx, f"published {cycle.result}")

    @contextmanager
    def _noted(self, cycle: Cycle, trouble: list[str], fl_ctx: FLContext, site: str = "") -> Iterator[None]:
        """Note any error about one site's message or file, and go on with the other sites."""
        try:
            yield
        except Exception as error:  # nothing that one site sends may end the pass of the others
            line = str(error)
            if not isinstance(error, InputError):
                self.log_exception(fl_ctx, f"{site or 'closing the round'} failed")
                line = one_line(f"{site or 'the round'}: {type(error).__name__}: {error}; see engine.log")
            self.log_error(fl_ctx, line)
            cycle.reload()
            if line not in trouble:
                trouble.append(line)

    def _send(self, name: str, cycle: Cycle, site: str, fl_ctx: FLContext, *, with_start: bool = False) -> Task:
        data = Shareable()
        data.update(cycle.question(site, with_prior=name == GIVE, with_start=with_start))
        task = Task(name, data, timeout=max(1, round(cycle.project["answer_timeout_s"])))
        self.send(task, fl_ctx, targets=[site])
        return task

    def _receive(self, cycle: Cycle, site: str, task: Task, fl_ctx: FLContext) -> str | None:
        """Record the answer; the site's new state, None if there was no answer."""
        result = task.client_tasks[-1].result if task.client_tasks else None
        if task.completion_status != TaskCompletionStatus.OK or not isinstance(result, Shareable):
            self.log_info(fl_ctx, f"{site}: no answer ({task.completion_status})")
            return None
        if result.get_return_code() != ReturnCode.OK:
            self.log_info(fl_ctx, f"{site}: {result.get_return_code()}; see its own log")
            return None
        cycle.count(site, task.data["round"], _size(task.data), _size(result))
        return cycle.receive(site, own_entries(result))["state"]


class Site(Executor):
    """Site: answers from its spool at once, under the name in its certificate."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer a question; errors go to the site's own log, not to the server."""
        try:
            name = fl_ctx.get_identity_name()
            answer = Spool(_folder(fl_ctx, name), name).answer(own_entries(shareable))
        except InputError as error:
            self.log_error(fl_ctx, str(error), fire_event=False)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        self.log_info(fl_ctx, f"round {answer['round']}: {answer['state']}", fire_event=False)
        reply = make_reply(ReturnCode.OK)
        reply.update(answer)
        return reply


def _size(message: Shareable) -> int:
    """Bytes of a message as FLARE serializes it, with its headers."""
    return len(fobs.dumps(message))


def own_entries(message: Shareable) -> dict[str, Any]:
    """A message without FLARE's headers."""
    return {key: value for key, value in message.items() if key != ReservedHeaderKey.HEADERS}


def _folder(fl_ctx: FLContext, participant: str) -> Path:
    if root := os.environ.get(FOLDER):
        return Path(root) / participant
    return folder_in(Path(fl_ctx.get_engine().get_workspace().get_root_dir()))
