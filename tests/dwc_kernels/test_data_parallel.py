"""A converted network in DistributedDataParallel: two processes, each with half of the batch and noise of its own."""

import copy
import gc
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dwc_kernels import convert, kl_loss, seed_noise

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


def step(net: nn.Module) -> torch.Tensor:
    """Outputs on the same input everywhere, after the gradients of a loss with the KL divergence."""
    seed_noise(net, 5)
    output = net(torch.ones(2, 1, 6, 6, 6))
    (output.square().mean() + 1e-3 * kl_loss(net)).backward()
    return output.detach()


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters() if p.grad is not None}


def train_a_step(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 1)), sigma_init=0.1)
    alone = copy.deepcopy(net)
    found = {"output": step(parallel := DistributedDataParallel(net)), "output alone": step(alone)}
    found |= {f"{name} averaged": gradient for name, gradient in gradients(parallel).items()}
    found |= {f"{name} alone": gradient for name, gradient in gradients(alone).items()}
    contiguous = {name: tensor.contiguous() for name, tensor in found.items()}
    safetensors.torch.save_file(contiguous, folder / f"{rank}.safetensors")
    dist.barrier()  # nobody leaves while another still needs it
    del parallel
    gc.collect()  # the replica ends before the group that its threads use
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort while an interpreter ends


def test_ranks_draw_noise_of_their_own_and_step_by_the_mean_of_their_gradients(tmp_path):
    torch.multiprocessing.spawn(train_a_step, (tmp_path,), nprocs=2)
    first, second = (safetensors.torch.load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert not torch.allclose(first["output"], second["output"])
    assert torch.equal(first["output"], first["output alone"])
    names = [name.removesuffix(" averaged") for name in first if name.endswith(" averaged")]
    assert len(names) == 8
    for name in names:
        averaged = first[f"{name} averaged"]
        assert torch.equal(averaged, second[f"{name} averaged"])
        torch.testing.assert_close(averaged, (first[f"{name} alone"] + second[f"{name} alone"]) / 2)
