"""Checkpoints by torch.distributed.checkpoint, of plain and converted networks, whole and sharded by FSDP2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from dwc_kernels import convert, kl_loss, mean_names, set_prior
from dwc_kernels.factorized import whole

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1))


def converted(sharded: bool) -> nn.Module:
    net = convert(plain())
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    return net


def state(net: nn.Module) -> dict[str, Any]:
    return {name: whole(t).detach().clone() for name, t in net.state_dict().items()}


def assert_means(net: nn.Module, weights: dict[str, Any]) -> None:
    ours = state(net)
    assert all(torch.equal(ours[f"{name}_mu"], t) for name, t in weights.items())


@pytest.mark.parametrize("strict", [False, True])
def test_a_plain_checkpoint_loads_as_means_by_set_model_state_dict(strict: bool) -> None:
    weights, net = state(plain()), converted(sharded=False)
    before = state(net)
    set_model_state_dict(net, dict(weights), options=StateDictOptions(strict=strict))
    assert_means(net, weights)
    assert all(torch.equal(t, before[name]) for name, t in state(net).items() if not name.endswith("_mu"))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("sharded", "full"), [(True, True), (True, False), (False, True)])
def test_a_plain_checkpoint_that_cannot_be_loaded_is_refused_with_the_remedy(
    sharded: bool, full: bool, strict: bool
) -> None:
    net, options = converted(sharded), StateDictOptions(full_state_dict=full, strict=strict)
    with pytest.raises(RuntimeError, match=r"0\.weight of a plain layer .*mean_names"):
        set_model_state_dict(net, state(plain()), options=options)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_remedy_loads_it(sharded: bool) -> None:
    weights, net = state(plain()), converted(sharded)
    names = mean_names(net)
    renamed: dict[str, Any] = {names[name]: t for name, t in weights.items()}
    set_model_state_dict(net, renamed, options=StateDictOptions(full_state_dict=True))
    assert_means(net, weights)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_plain_checkpoint_on_disk_loads_in_place_under_the_names_of_the_means(sharded: bool, tmp_path: Path) -> None:
    weights, net = state(plain()), converted(sharded)
    state_dict_saver.save(weights, checkpoint_id=tmp_path / "plain")
    parameters = net.state_dict()
    state_dict_loader.load(
        {name: parameters[mean] for name, mean in mean_names(net).items()}, checkpoint_id=tmp_path / "plain"
    )
    assert_means(net, weights)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_posterior_with_a_prior_of_tensors_survives_the_round_trip(sharded: bool, full: bool, tmp_path: Path) -> None:
    options = StateDictOptions(full_state_dict=full)
    net, other = converted(sharded), converted(sharded)
    set_prior(net, converted(sharded))
    state_dict_saver.save(get_model_state_dict(net), checkpoint_id=tmp_path / "posterior")
    set_model_state_dict(other, get_model_state_dict(net, options=options), options=options)
    assert all((t == state(net)[name]).all() for name, t in state(other).items())  # equal numbers become one
    assert whole(kl_loss(other)).item() == whole(kl_loss(net)).item()
    loaded: dict[str, Any] = {name: torch.zeros_like(t) for name, t in net.state_dict().items()}
    state_dict_loader.load(loaded, checkpoint_id=tmp_path / "posterior")
    set_model_state_dict(other, loaded)
    assert whole(kl_loss(other)).item() == whole(kl_loss(net)).item()
