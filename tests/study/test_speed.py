"""VCL is compared with MAP at equal steps, or at plateaus if those are comparable."""

from dataclasses import replace

import pytest

from dwc.study.graph import map_network, variational, vcl
from dwc.study.settings import Stage, StudySettings
from dwc.study.speed import compared, controls, plateaus_compare
from tests.study.tiny_study import tiny_settings

SITES = ("N", "B", "W")
CONSTANT = Stage(steps=400, lr=1e-2, schedule="constant", stop_at_plateau=True)
NETWORKS = [network for site in SITES for network in (map_network(site), vcl(variational("H"), site))]


def log(*dice: float | None, every: int = 10, plateau: int | None = None) -> list[dict]:
    return [{"step": every * (k + 1), "dice": value, "plateau_step": plateau} for k, value in enumerate(dice)]


@pytest.fixture
def settings() -> StudySettings:
    stage = Stage(steps=12, lr=1e-3, rho_lr=1e-2, epochs=3)
    return tiny_settings(map=Stage(steps=100, lr=0.1, epochs=5), vi=stage, vcl=stage, finetune=stage)


def start(dice: float) -> dict:
    return {"step": 0, "dice": dice}


def test_logs_of_one_shape_are_compared_at_equal_steps_whatever_their_schedules_length():
    shape = (0.1, 0.2, 0.5, 0.6)
    full, control, ours = log(*shape, every=100), log(0.1, 0.2, 0.2, 0.3), [start(0.05), *log(*shape)]
    speed = compared(full, control, ours, plateaus=False)
    assert (speed["steps"], speed["map_dice"], speed["vcl_dice"], speed["vcl_start_dice"]) == (40, 0.3, 0.6, 0.05)
    assert (speed["map_steps"], speed["map_last_dice"]) == (400, 0.6)
    assert (speed["map_target_step"], speed["vcl_target_step"]) == (400, 40)


def test_a_prior_that_is_as_good_already_reaches_the_target_at_step_0():
    speed = compared(log(0.2, 0.4), log(0.1), [start(0.39), *log(0.3)], plateaus=False)
    assert speed["target_dice"] == pytest.approx(0.38)
    assert speed["vcl_target_step"] == 0


def test_a_target_that_is_never_reached_has_no_step_and_a_volume_without_classes_no_dice():
    speed = compared(log(0.1, 0.4), log(0.1), [start(0.1), *log(None, 0.3)], plateaus=False)
    assert speed["vcl_target_step"] is None
    assert (speed["steps"], speed["vcl_dice"]) == (10, None)


def test_the_same_steps_are_those_that_both_have_logged():
    speed = compared(log(0.1, 0.2), log(0.1, 0.2, 0.3), [start(0.1), *log(0.4, 0.5)], plateaus=False)
    assert (speed["steps"], speed["map_dice"], speed["vcl_dice"]) == (20, 0.2, 0.5)
    assert compared(log(0.1), log(0.1, every=7), [start(0.1), *log(0.4)], plateaus=False)["steps"] is None


def test_plateaus_are_reported_only_where_they_compare():
    logs = log(0.1, plateau=7), log(0.1), [start(0.1), *log(0.4, plateau=3)]
    for plateaus, steps in ((True, (7, 3)), (False, (None, None))):
        speed = compared(*logs, plateaus=plateaus)
        assert (speed["map_plateau_step"], speed["vcl_plateau_step"]) == steps


@pytest.mark.parametrize(
    ("vcl_stage", "compare"),
    [
        (replace(CONSTANT, steps=200, lr=1e-3), True),
        (replace(CONSTANT, plateau_window=200), False),
        (replace(CONSTANT, schedule="one_cycle", stop_at_plateau=False), False),
    ],
)
def test_plateaus_compare_under_constant_learning_rates_and_one_window(settings, vcl_stage, compare):
    assert plateaus_compare(replace(settings, map=CONSTANT, vcl=vcl_stage)) == compare
    assert not plateaus_compare(
        replace(settings, map=replace(CONSTANT, schedule="one_cycle", stop_at_plateau=False), vcl=vcl_stage)
    )


def test_a_control_is_trained_as_map_with_the_steps_of_vcl(settings):
    assert [network.name for network in controls(settings, NETWORKS)] == [f"{site} MAP control" for site in SITES]
    assert settings.stage(controls(settings, NETWORKS)[0].stage) == Stage(steps=12, lr=0.1, epochs=3)


def test_a_site_needs_a_control_where_both_its_networks_are_there_and_none_where_plateaus_compare(settings):
    assert [network.site for network in controls(settings, NETWORKS[:3])] == ["N"]
    constant = replace(settings, map=CONSTANT, vcl=CONSTANT)
    assert set(controls(constant, NETWORKS)) <= set(NETWORKS)
