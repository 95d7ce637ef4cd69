import json
from dataclasses import asdict

import numpy as np
import pytest

from dwc.training.plateau import Plateau


def run(losses, window=400) -> Plateau:
    plateau = Plateau(window)
    for loss in losses:
        plateau.update(float(loss))
        if plateau.reached:
            break
    return plateau


def decay(steps: int, time: float, noise: float, seed: int) -> np.ndarray:
    level = 0.3 + 2 * np.exp(-np.arange(steps) / time)
    return level * (1 + noise * np.random.default_rng(seed).standard_normal(steps))


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("time", [100, 400])
def test_the_plateau_begins_when_the_fall_is_over_whatever_the_noise(time, noise):
    for seed in range(5):
        began = run(decay(8000, time, noise, seed)).began_at
        assert 2 * np.exp(-began / time) < 0.15  # of a fall of 2, to a stable value of 0.3
        assert began < 12 * time


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_a_steadily_falling_loss_has_no_plateau(noise):
    for seed in range(5):
        falling = np.linspace(3, 0.5, 2000) * (1 + noise * np.random.default_rng(seed).standard_normal(2000))
        assert not run(falling).reached


@pytest.mark.parametrize("loss", [np.full(1000, 0.7), 0.7 + 0.3 * np.sin(np.arange(1000)), np.linspace(1, 2, 1000)])
def test_a_loss_that_is_constant_oscillates_or_rises_is_on_its_plateau_from_the_start(loss):
    plateau = run(loss)
    assert plateau.began_at == 0
    assert plateau.steps == 400


def test_where_the_loss_stops_falling_is_where_the_plateau_begins():
    rng = np.random.default_rng(0)
    losses = np.concatenate([np.linspace(3, 1, 1000), np.full(2000, 1.0)]) + 0.02 * rng.standard_normal(3000)
    assert 900 <= run(losses).began_at <= 1100


def test_one_wild_batch_does_not_move_the_plateau_much():
    losses = decay(4000, 200, 0.05, 0)
    calm = run(losses).began_at
    losses[700] *= 20
    assert abs(run(losses).began_at - calm) <= 400


def test_its_state_goes_through_json_and_continues_the_same():
    losses = decay(3000, 100, 0.1, 1)
    whole, part = run(losses), Plateau(400)
    for step, loss in enumerate(losses[: whole.steps]):
        part.update(float(loss))
        if step % 37 == 0:
            part = Plateau(**json.loads(json.dumps(asdict(part))))
    assert part == whole


def test_the_first_plateau_is_kept():
    plateau = Plateau(20)
    for loss in [1.0] * 20 + list(np.linspace(1, 0, 50)):
        plateau.update(loss)
    assert plateau.began_at == 0


@pytest.mark.parametrize("window", [0, 10, 30, -20])
def test_a_window_that_does_not_divide_is_refused(window):
    with pytest.raises(ValueError, match="multiple of 20"):
        Plateau(window)
