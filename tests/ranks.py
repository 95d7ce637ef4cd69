"""What the tests of many processes start by torchrun: `dwc train` with a mishap in it, or gradients on record.

torchrun ... tests/ranks.py mishap STEP SIGNAL RANK ARGUMENTS_OF_DWC_TRAIN
torchrun ... tests/ranks.py gradients FILE ARGUMENTS_OF_DWC_TRAIN
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dwc import cli, distributed, training
from dwc.files import save_tensors
from dwc.meshnet import MeshNet
from dwc.objective import Objective


def mishap(step: str, name: str, rank: str, *arguments: str) -> int:
    """Train; one rank gets a signal just before a step."""
    original = training._Run._step

    def strike(run, *batch):
        if run.state.step == int(step) and distributed.rank() == int(rank):
            os.kill(os.getpid(), signal.Signals[name])
        return original(run, *batch)

    training._Run._step = strike
    return cli.main(["train", *arguments])


def recorded_gradients(work: Callable[[], object]) -> Tensor:
    """The gradient that each step of Adam is given, [steps, parameters]."""
    gradients, original = [], torch.optim.Adam.step

    def record(optimizer, *arguments):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return original(optimizer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", record)
        work()
    return torch.stack(gradients)


def gradient_at_the_means() -> Tensor:
    """Of the negative ELBO of three small volumes, a heavy KL in it, shared by the ranks; without noise."""
    torch.manual_seed(3)
    network = MeshNet(4, width=2, dilations=(1,))
    images, labels = torch.randn(3, 1, 8, 8, 8), torch.randint(4, (3, 8, 8, 8))
    mine = distributed.share(range(3))
    logits = distributed.replicate(network)(images[mine], sample=False)
    share = len(mine) * distributed.world_size() / 3
    loss, _ = Objective(1, 512)(logits, labels[mine], network.kl_loss(), share=share)
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def gradients(path: str, *arguments: str) -> int:
    """Train and write down the gradients, those at the means, and whether the ranks' are the same bits."""
    with distributed.ranks():
        steps = recorded_gradients(lambda: cli.main(["train", *arguments]))
        digests = distributed.gather(hashlib.sha256(steps.numpy().tobytes()).hexdigest())
        at_the_means = gradient_at_the_means()
        seen = distributed.gather(distributed.rank())
        averages = distributed.mean([float(distributed.rank()), float("nan")])
        if distributed.is_main():
            facts = {"digests": digests, "seen": seen, "averages": list(map(str, averages))}
            save_tensors(path, {"steps": steps, "at_the_means": at_the_means}, facts)
    return 0


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    sys.exit({"mishap": mishap, "gradients": gradients}[what](*words))
