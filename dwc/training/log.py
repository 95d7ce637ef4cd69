"""Report a training run's progress: progress bar, TensorBoard, and log.jsonl with one line per epoch.

Only rank 0 reports. TensorBoard files, which add every step to what the log has, are written if tensorboard is
installed (extra `study`).
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from dwc.base import ranks
from dwc.base.files import canonical_json, write_whole

__all__ = ["Journal", "read_log", "write_log"]

_PICTURE = "validation/scan, truth, prediction, entropy"


class Journal:
    """A run's progress bar, TensorBoard writer and log; enter it as a context while steps are taken.

    `rows` are the log's lines so far, `title` labels the progress bar, and `step` steps of `total_steps` are done.
    An epoch has `steps_per_epoch`.
    """

    def __init__(
        self, out: Path, rows: list[dict[str, Any]], *, title: str, step: int, steps_per_epoch: int, total_steps: int
    ) -> None:
        self.out, self.rows, self.title, self.first_step = out, rows, title, step
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps

    def __enter__(self) -> "Journal":
        if ranks.is_main():
            self._board = _board(self.out / "tensorboard", self.first_step + 1)
            self._bar = tqdm(
                total=self.total_steps, initial=self.first_step, desc=self.title, unit="step", dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if ranks.is_main():
            self._bar.close()
            if self._board is not None:
                self._board.close()

    def step(self, step: int, **values: float) -> None:
        """Report a step; the values must include ``loss``."""
        if not ranks.is_main():
            return
        self._add_scalars(step, {f"train/{name}": value for name, value in values.items()})
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {self._last_dice()}", refresh=False)
        self._bar.update()

    def epoch(self, row: dict[str, Any]) -> None:
        """Report an epoch by its log line."""
        self.rows.append(row)
        if not ranks.is_main():
            return
        scores = {f"validation/{name}": row[name] for name in ("dice", "dice_with_background")}
        layers = {
            f"{name}/{layer}": value for layer, measures in row["layers"].items() for name, value in measures.items()
        }
        self._add_scalars(row["step"], {**scores, "train/penalty": row["penalty"], **layers})
        if self._board is not None:
            self._board.flush()
        write_log(self.out / "log.jsonl", self.rows)

    @property
    def shows_pictures(self) -> bool:
        """Whether `picture` has anywhere to put one."""
        return ranks.is_main() and self._board is not None

    def picture(self, step: int, picture: np.ndarray) -> None:
        """Show a picture, uint8 [height, width, 3], in TensorBoard."""
        self._board.add_image(_PICTURE, picture, step, dataformats="HWC")

    def _add_scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def _last_dice(self) -> str:
        """The last validation score, whose sub-volumes are held out, or when there will be one."""
        if not self.rows:
            return f"held-out Dice from step {self.steps_per_epoch} on"
        dice = self.rows[-1]["dice"]
        return f"held-out Dice {'undefined' if dice is None else f'{dice:.3f}'} at step {self.rows[-1]['step']}"


def _board(folder: Path, first_step: int) -> Any:
    """A TensorBoard writer, if tensorboard is installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # not in the core installation

    return SummaryWriter(folder, purge_step=first_step)


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a run's log, one JSON object per line."""
    write_whole(path, "".join(f"{canonical_json(row)}\n" for row in rows).encode())


def read_log(path: Path, until_step: int | None = None) -> list[dict[str, Any]]:
    """Read a run's log, [] if there is none, without the rows after `until_step`, whose steps will be repeated."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if until_step is None or row["step"] <= until_step]
