"""One trainer for all networks of the paper: map, vi, vcl and fine-tuning, from settings to a posterior file.

`train` prepares the data, takes the steps and keeps the run folder: config.yaml, log.jsonl, tensorboard/,
checkpoint.safetensors and, at the end, posterior.safetensors. Every step is a function of (seed, step) and the weights
before it, so that a run that was killed continues bit for bit. What is minimised is `objective`'s business, what a
person can set `settings`'s, and `plan` has checked it all before the first step. Where `distributed` has several
ranks, each takes its share of every batch with noise of its own, and the first writes for all.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from dwc.base import ranks
from dwc.base.errors import InputError, Interrupted
from dwc.base.files import open_folder
from dwc.base.locks import held
from dwc.base.seeds import seed_of
from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import SIDE
from dwc.meshnet import MeshNet
from dwc.metrics.confusion import mean_dice
from dwc.posterior import Posterior
from dwc.training.log import Journal, read_log
from dwc.training.objective import Objective, SigmaProjection, negative_log_prior
from dwc.training.plateau import Plateau
from dwc.training.settings import TrainSettings
from dwc.training.specification import LOCK, Plan, bind, plan_run
from dwc.training.state import restore, save_checkpoint
from dwc.training.validation import draw_sub_volumes, validation_confusion
from dwc_kernels import FFGConv3d

__all__ = ["TrainSettings", "train_network"]

_WORKERS_END_S = 10.0  # in which a killed run's data workers, which hold its lock too, find out and end


def train_network(settings: TrainSettings, *, resume: bool = False) -> Posterior:
    """Train a network and leave its run folder.

    Each line of log.jsonl is an epoch: ``loss`` and ``nll`` (nats per voxel, means over the epoch's steps), ``penalty``
    (nats; the KL, or -log p(w)), ``dice`` (held-out sub-volumes, network at its means, mean over the classes present
    in the truth without class 0) and ``dice_with_background``, ``plateau_step`` (null while the loss falls, and
    under one_cycle, whose falling learning rate flattens any loss), and per Bayesian layer the medians of sigma/sigma_0
    (``sigma_ratio``) and |mu - mu_0|/sigma_0 (``shift``).

    Parameters
    ----------
    settings : TrainSettings
        What to train, on what, and where to.
    resume : bool
        Go on from the run folder's checkpoint, bit for bit as if it had never stopped (on the same machine with the
        same number of processes and threads); from the start if it has none.

    Returns
    -------
    Posterior
        What lies in ``out/posterior.safetensors``; without standard deviations after mode map.

    Raises
    ------
    InputError
        Before any work, if anything given is wrong or another process trains in the run folder; later if the loss
        diverges or the disk is full.
    Interrupted
        After SIGINT or SIGTERM, with a whole checkpoint on disk.
    """
    with ranks.joined():
        plan = plan_run(settings, resume=resume)
        ranks.barrier()  # before any rank writes where another still looks
        open_folder(settings.out)
        with _alone_in(settings.out):
            data, held_out = (
                prepare(part, plan.label_map, plan.grid, plan.cache_dir) for part in (plan.train_scans, plan.test_scans)
            )
            bound_to = bind(plan, data, held_out)
            if ranks.is_main():
                plan.write_config()  # only now, when no bad input is left, is the folder a run's
            devices = [plan.device] if plan.device.type == "cuda" else []
            with (
                torch.random.fork_rng(devices=devices),
                torch.backends.cudnn.flags(deterministic=True, benchmark=False),
            ):
                return _Run(plan, data, held_out, bound_to).finish()


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the run folder's lock, on the rank that writes there: ranks live on when their launcher is killed."""
    if not ranks.is_main():
        yield
        return
    with held(out / LOCK, _WORKERS_END_S) as alone:
        if not alone:
            raise InputError(f"{out}: another dwc train is at work in it; wait until it has ended, or end it")
        yield


@dataclass
class _State:
    """Where a run stands between two steps, as JSON beside the checkpoint's tensors."""

    plateau: Plateau
    step: int = 0
    epoch: int = 0  # epochs closed: validated, logged and saved
    loss_sum: float = 0.0  # over the steps of the open epoch
    nll_sum: float = 0.0
    binding: dict[str, Any] = field(default_factory=dict)


class _Run:
    """A network, its optimizer and its data on their way through the steps."""

    def __init__(self, plan: Plan, data: SubVolumes, held_out: SubVolumes, bound_to: dict[str, Any]) -> None:
        settings = plan.settings
        self.plan, self.settings, self.out, self.data, self.held_out = plan, settings, settings.out, data, held_out
        self.validation_draw = draw_sub_volumes(len(held_out), settings.validation_sub_volumes, settings.seed)
        self.steps_per_epoch = settings.steps_per_epoch or math.ceil(len(data) / settings.batch_size)
        self.total_steps = self.steps_per_epoch * settings.epochs
        n_sub_volumes = data.sub_volumes_per_volume if settings.mode == "finetune" else len(data)
        self.objective = Objective(n_sub_volumes, SIDE**3)
        self.network = _network(plan).to(plan.device)
        self.optimizer, self.learning_rates = _adam(self.network, settings)
        self.project = SigmaProjection(self.network)
        self.project()
        self.state = _State(Plateau(settings.plateau_window), binding=bound_to)
        log: list[dict[str, Any]] = []
        if plan.checkpoint is not None:
            tensors, state = plan.checkpoint
            restore(tensors, self.network, self.optimizer)
            self.state = _State(**{**state, "plateau": Plateau(**state["plateau"])})
            log = read_log(self.out / "log.jsonl", self.state.step)
        self.replica = ranks.replicate(self.network)
        self.journal = Journal(self.out, log, title=settings.mode, step=self.state.step, total_steps=self.total_steps)

    def finish(self) -> Posterior:
        """Take the remaining steps and write the posterior."""
        settings, state = self.settings, self.state
        loader = DataLoader(
            self.data,
            batch_sampler=_Batches(len(self.data), settings.batch_size, settings.seed, state.step, self.total_steps),
            num_workers=settings.workers,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=self.plan.device.type == "cuda",
        )
        with _caught_signals() as self.caught, self.journal:
            batches = iter(loader)
            while not self._done():
                self._epoch(batches)
        posterior = self._posterior()
        if ranks.is_main():
            posterior.save(self.out / "posterior.safetensors")
        return posterior

    def _done(self) -> bool:
        """Asked between epochs only, so that a resumed run closes the epoch that a signal left open."""
        plateau = self.settings.stop_at_plateau and self.state.plateau.reached
        closed = self.state.step == self.state.epoch * self.steps_per_epoch
        return self.state.epoch >= self.settings.epochs or (plateau and closed)

    def _plateau_step(self) -> int | None:
        """Where the plateau began; a falling learning rate flattens any loss, which proves nothing."""
        return self.state.plateau.began_at if self.settings.schedule == "constant" else None

    def _epoch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """The rest of the open epoch: steps, validation, log line, checkpoint."""
        state, began = self.state, time.monotonic()
        for _ in range(state.step, (state.epoch + 1) * self.steps_per_epoch):
            self._step(*next(batches))
            self._stop_if_asked()
        scores = self._validate()
        row = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "loss": state.loss_sum / self.steps_per_epoch,
            "nll": state.nll_sum / self.steps_per_epoch,
            "penalty": self._penalty().item(),
            **scores,
            "plateau_step": self._plateau_step(),
            "layers": drift(self.network),
            "seconds": round(time.monotonic() - began, 3),
        }
        self.journal.epoch(row)  # before the checkpoint: a line too many is cut when resuming
        state.epoch, state.loss_sum, state.nll_sum = state.epoch + 1, 0.0, 0.0
        self._save()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        settings, state, device = self.settings, self.state, self.plan.device
        factor = learning_rate_factor(settings.schedule, state.step, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * factor
        # The first rank's seed is that of a run in one process: seed_of counts no zeros at the end.
        torch.manual_seed(seed_of(settings.seed, state.step, ranks.rank(), settings.stream))
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._logits(self.replica, images.to(device, non_blocking=True))
        share = len(images) * ranks.world_size() / settings.batch_size
        loss, nll = self.objective(logits, labels.to(device, non_blocking=True), self._penalty(), share=share)
        loss.backward()
        self.optimizer.step()
        self.project()
        loss, nll = ranks.mean((loss.item(), nll.item()))
        if not math.isfinite(loss):
            raise InputError(f"{self.out}: the loss is {loss} at step {state.step + 1}; train again with a lower --lr")
        state.step += 1
        state.loss_sum += loss
        state.nll_sum += nll
        state.plateau.update(loss)
        self.journal.step(state.step, loss=loss, nll=nll, learning_rate=settings.lr * factor)

    def _logits(self, network: nn.Module, images: Tensor, sample: bool | None = None) -> Tensor:
        with torch.autocast(self.plan.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return network(images, sample=sample)

    def _penalty(self) -> Tensor:
        """In nats: the KL from the prior (Eq. 5), or -log p(w) (Eq. 2)."""
        return self.network.kl_loss() if self.settings.bayesian else negative_log_prior(self.network)

    def _validate(self) -> dict[str, float | None]:
        """Dice on the held-out sub-volumes, averaged over the classes present in the truth."""
        self.network.eval()
        confusion = validation_confusion(
            lambda images: self._logits(self.network, images, sample=False),
            self.held_out,
            ranks.share(self.validation_draw),
            n_classes=self.plan.label_map.n_classes,
            batch_size=self.settings.batch_size,
            device=self.plan.device,
            keep_going=lambda: self.caught.number is None,
        )
        self._stop_if_asked()
        confusion = sum(map(torch.tensor, ranks.gather(confusion.tolist())))
        return {
            "dice": mean_dice(confusion, with_background=False),
            "dice_with_background": mean_dice(confusion, with_background=True),
        }

    def _stop_if_asked(self) -> None:
        """All ranks after the same step, whichever was asked."""
        if number := max(ranks.gather(self.caught.number or 0)):
            self._save()
            raise Interrupted(
                number,
                f"stopped by {signal.Signals(number).name} after step {self.state.step} of {self.total_steps}",
                f"resume with: dwc train --config {self.out / 'config.yaml'} --resume",
            )

    def _save(self) -> None:
        if ranks.is_main():
            save_checkpoint(self.out / "checkpoint.safetensors", self.network, self.optimizer, asdict(self.state))

    def _posterior(self) -> Posterior:
        base, plan, state = self.plan.base, self.plan, self.state
        base_sha256 = base.sha256 if base else None
        training = {
            **self.settings.binding(),
            "n_sub_volumes": self.objective.n_sub_volumes,
            "steps": state.step,
            "plateau_step": self._plateau_step(),
            "init_sha256": None if plan.has_learned_prior else base_sha256,
            "torch_version": torch.__version__,
        }
        metadata = {
            **plan.header(),
            "n_volumes": len(plan.train_scans),
            "prior_sha256": base_sha256 if plan.has_learned_prior else None,
            "training": training,
        }
        posterior = Posterior.from_model(self.network, **metadata)
        return Posterior(posterior.mu, posterior.sigma, posterior.metadata, str(self.out / "posterior.safetensors"))


def _network(plan: Plan) -> MeshNet:
    torch.manual_seed(seed_of(plan.settings.seed))
    network = MeshNet.from_architecture(
        plan.header()["architecture"],
        bayesian=plan.settings.bayesian,
        activation_checkpointing=plan.settings.activation_checkpointing,
    )
    if plan.base is not None:
        plan.base.to_model(network)
    if plan.has_learned_prior:
        plan.base.set_prior_of(network)
    return network


def _adam(network: nn.Module, settings: TrainSettings) -> tuple[torch.optim.Adam, list[float]]:
    """Adam over means and rho, each with its learning rate."""
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in network.named_parameters():
        parts[name.endswith("_rho")].append(parameter)
    rates = {False: settings.lr, True: settings.lr if settings.rho_lr is None else settings.rho_lr}
    groups = [{"params": parameters, "lr": rates[is_rho]} for is_rho, parameters in parts.items() if parameters]
    return torch.optim.Adam(groups), [group["lr"] for group in groups]


def learning_rate_factor(schedule: str, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by at a step: a function of the step alone."""
    if schedule == "constant":
        return 1.0
    peak = 0.3 * total_steps
    fraction = step / peak if step < peak else 1 - (step - peak) / (total_steps - peak)
    return 0.04 + 0.96 * _cosine(fraction) if step < peak else _cosine(fraction)


def _cosine(fraction: float) -> float:
    return (1 - math.cos(math.pi * fraction)) / 2


@torch.no_grad()
def drift(network: nn.Module) -> dict[str, dict[str, float]]:
    """How far each Bayesian layer's weights are from their prior: medians of sigma/sigma_0 and |mu - mu_0|/sigma_0."""
    return {
        name: {
            "sigma_ratio": (layer.weight_sigma / layer.prior_weight_sigma).median().item(),
            "shift": ((layer.weight_mu - layer.prior_weight_mu).abs() / layer.prior_weight_sigma).median().item(),
        }
        for name, layer in network.named_modules()
        if isinstance(layer, FFGConv3d)
    }


class _Batches(Sampler[list[int]]):
    """Batches of indices for the steps `first` to `last`: pass after pass over the data, each in its own order.

    Batch k is the k-th stretch of one endless sequence of passes, whatever step the run begins with; a batch may
    straddle two passes, so that every batch is full. Each rank gets its share of every batch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.n, self.batch_size, self.seed, self.first, self.last = n, batch_size, seed, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        order, current = None, -1
        for step in range(self.first, self.last):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                passed, place = divmod(position, self.n)
                if passed != current:
                    order, current = np.random.default_rng([self.seed, 1, passed]).permutation(self.n), passed
                batch.append(int(order[place]))
            yield ranks.share(batch)


@dataclass
class _Caught:
    number: int | None = None


@contextmanager
def _caught_signals() -> Iterator[_Caught]:
    """Note SIGINT and SIGTERM for the loop to see after its step; the second one ends the process as usual."""
    caught = _Caught()
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be caught
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        caught.number = number
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; a worker goes on until the trainer ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
