"""The trainer for all networks of the paper: map, vi, vcl (variational continual learning) and fine-tuning.

Each step is a function of (seed, step) and the weights before it, so that a killed run can resume bit for bit. With
several ranks, each takes its share of every batch with its own noise, and rank 0 writes.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from dwc.base import ranks
from dwc.base.errors import InputError, Interrupted
from dwc.base.files import open_folder
from dwc.base.locks import held
from dwc.base.seeds import seed_of
from dwc.base.signals import Caught, catch_signals, ignore_signals
from dwc.data.admission import admit
from dwc.data.cache import prepare
from dwc.data.constants import SIDE
from dwc.data.dataset import SubVolumes
from dwc.data.sampling import PaperCubes, RandomCubes
from dwc.meshnet import MeshNet
from dwc.metrics.confusion import mean_dice
from dwc.posterior import Posterior
from dwc.training.log import Journal, read_log
from dwc.training.objective import Objective
from dwc.training.panel import Panel
from dwc.training.plateau import Plateau
from dwc.training.settings import TrainSettings
from dwc.training.specification import LOCK, RunSpecification, resolve
from dwc.training.state import Checkpoint, State, save_checkpoint
from dwc.training.step import Optimization, logits_of, penalty_of
from dwc.training.validation import draw_sub_volumes, validation_confusion, validation_cubes
from dwc_kernels import FFGConv3d

__all__ = ["TrainSettings", "train_network"]

_WORKERS_END_S = 10.0  # a killed run's data workers keep its lock until they notice, within this time


def train_network(settings: TrainSettings, *, resume: bool = False) -> Posterior:
    """Train a network by its `settings` and leave its run folder; returns what is in ``out/posterior.safetensors``.

    The folder holds config.yaml, checkpoint.safetensors, tensorboard/, posterior.safetensors and log.jsonl, whose lines
    are epochs: ``loss`` and ``nll`` (nats per voxel, means over the epoch's steps), ``penalty`` (nats; the KL, or -log
    p(w)), ``dice`` (held-out sub-volumes, network at its means, mean over the classes present in the truth without
    class 0) and ``dice_with_background``, ``plateau_step`` (null while the loss falls, and under one_cycle, whose
    falling learning rate flattens any loss), and per Bayesian layer the medians of sigma/sigma_0 (``sigma_ratio``) and
    |mu - mu_0|/sigma_0 (``shift``).

    With `resume`, it continues from the folder's checkpoint, or from the start if there is none. The result is bitwise
    the same as without the interruption, on the same machine with the same number of processes and threads.

    Raises
    ------
    Interrupted
        After SIGINT or SIGTERM, with a complete checkpoint on disk.
    """
    TrainSettings.check_type(settings, "settings")
    with ranks.joined():
        specification, checkpoint = resolve(settings, resume=resume)
        ranks.barrier()  # before any rank writes to the folder that others are checking
        open_folder(settings.out)
        with _alone_in(settings.out):
            ranks.barrier()
            # Check again: another run may have used the folder before it was locked.
            specification, checkpoint = resolve(settings, resume=resume)
            admit(
                [*specification.train_scans, *specification.test_scans],
                specification.label_map, specification.grid, specification.cache_dir,
            )  # fmt: skip
            where = specification.label_map, specification.grid, specification.cache_dir
            data = prepare(specification.train_scans, *where, intensity=specification.intensity)
            held_out = prepare(specification.test_scans, *where, intensity=specification.intensity)
            specification = specification.with_data(data, held_out)
            specification.check_resumes(checkpoint)
            if ranks.is_main():
                specification.write_config()  # only now: bad input must not leave a run behind
            device = specification.device
            with (
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                torch.backends.cudnn.flags(deterministic=True, benchmark=False),
            ):
                return _Run(specification, checkpoint, data, held_out).finish()


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the run folder's lock in rank 0, since ranks keep running when their launcher is killed."""
    if not ranks.is_main():
        yield
        return
    with held(out / LOCK, _WORKERS_END_S) as alone:
        if not alone:
            raise InputError(f"{out}: another dwc train is using it; wait until it ends, or stop it")
        yield


class _Run:
    """The network, optimizer, data and state of a run."""

    caught: Caught

    def __init__(
        self, specification: RunSpecification, checkpoint: Checkpoint | None, data: SubVolumes, held_out: SubVolumes
    ) -> None:
        settings = specification.settings
        self.specification, self.settings, self.out = specification, settings, settings.out
        self.data, self.held_out = data, held_out
        self.validation_draw = draw_sub_volumes(len(held_out), settings.validation_sub_volumes, settings.seed)
        self.steps_per_epoch = settings.steps_per_epoch or math.ceil(len(data) / settings.batch_size)
        self.total_steps = self.steps_per_epoch * settings.epochs
        n_sub_volumes = data.sub_volumes_per_volume if settings.mode == "finetune" else len(data)
        self.objective = Objective(n_sub_volumes, SIDE**3)
        self.network = _network(specification).to(specification.device)
        self.optimization = Optimization(self.network, settings, self.objective, settings.precision)
        self.state = State(Plateau(settings.plateau_window), identity=specification.identity)
        rows: list[dict[str, Any]] = []
        if checkpoint is not None:
            checkpoint.restore(self.network, self.optimization.adam)
            self.state = checkpoint.state()
            rows = read_log(self.out / "log.jsonl", self.state.step)
        self.replica = ranks.replicate(self.network)
        self.journal = Journal(
            self.out, rows, title=settings.mode, step=self.state.step, steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )  # fmt: skip

    def finish(self) -> Posterior:
        """Take the remaining steps and write the posterior."""
        settings, state = self.settings, self.state
        loader = DataLoader(
            _cubes(self.data, settings),
            batch_sampler=_Batches(settings.batch_size, range(state.step, self.total_steps)),
            num_workers=settings.workers,
            worker_init_fn=ignore_signals,
            pin_memory=self.specification.device.type == "cuda",
        )
        with catch_signals() as self.caught, self.journal:
            panel = Panel(self.held_out) if self.journal.shows_pictures and len(self.held_out) else None
            batches = iter(loader)
            while not self._done():
                self._epoch(batches)
                if panel is not None:
                    picture = panel.draw(self.network, self.specification.device, settings.precision)
                    self.journal.picture(state.step, picture)
        posterior = self._posterior()
        if ranks.is_main():
            posterior.save(self.out / "posterior.safetensors")
        return posterior

    def _done(self) -> bool:
        """Checked between epochs only, so that a resumed run finishes the epoch that a signal interrupted."""
        plateau = self.settings.stop_at_plateau and self.state.plateau.reached
        closed = self.state.step == self.state.epoch * self.steps_per_epoch
        return self.state.epoch >= self.settings.epochs or (plateau and closed)

    def _plateau_step(self) -> int | None:
        """Where the plateau began; None under one_cycle, whose falling learning rate flattens any loss."""
        return self.state.plateau.began_at if self.settings.schedule == "constant" else None

    def _epoch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Finish the current epoch: steps, validation, log line, checkpoint."""
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
            "penalty": penalty_of(self.network).item(),
            **scores,
            "plateau_step": self._plateau_step(),
            "layers": drift(self.network),
            "seconds": round(time.monotonic() - began, 3),
        }
        self.journal.epoch(row)  # before the checkpoint: an extra line is removed when resuming
        state.epoch, state.loss_sum, state.nll_sum = state.epoch + 1, 0.0, 0.0
        self._save()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        settings, state, device = self.settings, self.state, self.specification.device
        factor = learning_rate_factor(settings.schedule, state.step, self.total_steps)
        # Rank 0 has the seed of a single-process run, since seed_of ignores trailing zeros.
        torch.manual_seed(seed_of(settings.seed, state.step, ranks.rank(), settings.stream))
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
        share = len(images) * ranks.world_size() / settings.batch_size
        losses = self.optimization.step(self.replica, images, labels, factor=factor, share=share)
        loss, nll = ranks.mean([value.item() for value in losses])
        if not math.isfinite(loss):
            raise InputError(f"{self.out}: the loss is {loss} at step {state.step + 1}; train again with a lower `lr`")
        state.step += 1
        state.loss_sum += loss
        state.nll_sum += nll
        state.plateau.update(loss)
        self.journal.step(state.step, loss=loss, nll=nll, learning_rate=settings.lr * factor)

    def _validate(self) -> dict[str, float | None]:
        """Dice on the held-out sub-volumes, averaged over the classes present in the truth."""
        self.network.eval()
        confusion = validation_confusion(
            lambda images: logits_of(self.network, images, self.settings.precision, sample=False),
            validation_cubes(self.held_out, self.settings, self.network),
            ranks.share(self.validation_draw),
            n_classes=self.specification.label_map.n_classes,
            batch_size=self.settings.batch_size,
            device=self.specification.device,
            keep_going=lambda: self.caught.number is None,
        )
        self._stop_if_asked()
        assert confusion is not None  # None only after a signal
        total = torch.tensor(ranks.gather(confusion.tolist())).sum(dim=0)
        return {
            "dice": mean_dice(total, with_background=False),
            "dice_with_background": mean_dice(total, with_background=True),
        }

    def _stop_if_asked(self) -> None:
        """Stop all ranks after the same step if any of them received a signal."""
        if number := max(ranks.gather(self.caught.number or 0)):
            self._save()
            raise Interrupted(
                number,
                f"stopped by {signal.Signals(number).name} after step {self.state.step} of {self.total_steps}",
                f"resume with: dwc train --config {self.out / 'config.yaml'} --resume",
            )

    def _save(self) -> None:
        if ranks.is_main():
            save_checkpoint(self.out / "checkpoint.safetensors", self.network, self.optimization.adam, self.state)

    def _posterior(self) -> Posterior:
        specification, state = self.specification, self.state
        base = specification.base
        prior_sha256 = base.sha256 if base and self.settings.has_learned_prior else None
        start = specification.start
        training = {
            **specification.decisive_settings,
            "n_sub_volumes": self.objective.n_sub_volumes,
            "steps": state.step,
            "plateau_step": self._plateau_step(),
            "init_sha256": None if start is None or start.sha256 == prior_sha256 else start.sha256,
            "torch_version": torch.__version__,
        }
        metadata = {
            **specification.header,
            "n_volumes": len(specification.train_scans),
            "prior_sha256": prior_sha256,
            "training": training,
        }
        posterior = Posterior.from_model(self.network, **metadata)
        return Posterior(posterior.mu, posterior.sigma, posterior.metadata, str(self.out / "posterior.safetensors"))


def _network(specification: RunSpecification) -> MeshNet:
    settings, base = specification.settings, specification.base
    torch.manual_seed(seed_of(settings.seed))
    network = MeshNet.from_architecture(
        specification.header["architecture"],
        bayesian=settings.bayesian,
        activation_checkpointing=settings.activation_checkpointing,
    )
    if specification.start is not None:
        specification.start.to_model(network)
    if base is not None and settings.has_learned_prior:
        base.set_prior_of(network)
    return network


def learning_rate_factor(schedule: str, step: int, total_steps: int) -> float:
    """Factor of the learning rate at a step."""
    if schedule == "constant":
        return 1.0
    peak = 0.3 * total_steps
    fraction = step / peak if step < peak else 1 - (step - peak) / (total_steps - peak)
    return 0.04 + 0.96 * _cosine(fraction) if step < peak else _cosine(fraction)


def _cosine(fraction: float) -> float:
    return (1 - math.cos(math.pi * fraction)) / 2


@torch.no_grad()
def drift(network: nn.Module) -> dict[str, dict[str, float]]:
    """Distance of each Bayesian layer from its prior: medians of sigma/sigma_0 and |mu - mu_0|/sigma_0."""
    return {
        name: {
            "sigma_ratio": (layer.weight_sigma / layer.get_buffer("prior_weight_sigma")).median().item(),
            "shift": (
                ((layer.weight_mu - layer.get_buffer("prior_weight_mu")).abs() / layer.get_buffer("prior_weight_sigma"))
                .median()
                .item()
            ),
        }
        for name, layer in network.named_modules()
        if isinstance(layer, FFGConv3d)
    }


class _Batches(Sampler[list[int]]):
    """Positions of each step's batch in the run's sequence of cubes; each rank gets its share."""

    def __init__(self, batch_size: int, steps: range) -> None:
        self.batch_size, self.steps = batch_size, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield ranks.share(range(step * self.batch_size, (step + 1) * self.batch_size))


def _cubes(data: SubVolumes, settings: TrainSettings) -> Dataset[tuple[Tensor, Tensor]]:
    if settings.cubes == "paper":
        return PaperCubes(data, settings.seed)
    return RandomCubes(
        data, settings.seed, settings.margin, settings.air_share, settings.augmentation, settings.brain_share
    )
