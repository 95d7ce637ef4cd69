"""Settings of a study with networks of two steps on 32^3 volumes."""

from typing import Any

from dwc.study.settings import Stage, StudySettings


def tiny_settings(**changes: Any) -> StudySettings:
    stage = Stage(steps=2)
    values: dict[str, Any] = dict(
        origin="H", sites=("N", "B", "W"), unseen=("A",), n_train=1, n_test=1, label_map="coarse", grid_size=32,
        voxel_size=6.0, width=2, dilations=(1,), batch_size=1, map=stage, vi=stage, vcl=stage, finetune=stage,
        validation_sub_volumes=32, n_samples=1, device="cpu",
    )  # fmt: skip
    return StudySettings(**(values | changes))
