"""The program that tests start with torchrun: `dwc train` with a signal in one rank, or facts about the ranks.

torchrun ... tests/rank_program.py mishap STEP SIGNAL RANK ARGUMENTS_OF_DWC_TRAIN
torchrun ... tests/rank_program.py facts FILE BATCH_SIZE DRAWS ARGUMENTS_OF_DWC_TRAIN
"""

import hashlib
import os
import signal
import sys

import pytest
import torch
from torch import Tensor

from dwc import cli
from dwc.base import ranks
from dwc.base.files import save_tensors
from dwc.base.seeds import seed_of
from dwc.commands.arguments import new_parser, parse
from dwc.meshnet import MeshNet
from dwc.training import loop, step
from dwc.training.objective import Objective
from dwc.training.settings import TrainSettings


def mishap(step: str, name: str, rank: str, *arguments: str) -> int:
    """Train; one rank gets a signal just before a step."""
    original = loop._Run._step

    def strike(run, *batch):
        if run.state.step == int(step) and ranks.rank() == int(rank):
            os.kill(os.getpid(), signal.Signals[name])
        return original(run, *batch)

    loop._Run._step = strike
    return cli.main(["train", *arguments])


def seeds_of_the_steps(settings: TrainSettings) -> list[int]:
    """Train, and return the seed of each step's noise."""
    seeds, original = [], step.logits_of

    def note(*arguments, **options):
        seeds.append(torch.initial_seed())
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "logits_of", note)
        loop.train_network(settings)
    return seeds


def gradients(batch_size: int, n_draws: int) -> Tensor:
    """Gradients of the negative ELBO, without noise first, then with each draw's: [1 + n_draws, parameters].

    The batch repeats one small volume and N is 1, so that only the noise makes the gradient vary and the KL carries
    weight. Ranks share the batch.
    """
    torch.manual_seed(3)
    network = MeshNet(4, width=2, dilations=(1,), activation_checkpointing=True)
    replica = ranks.replicate(network)
    images, labels = torch.randn(1, 1, 8, 8, 8), torch.randint(4, (1, 8, 8, 8))
    n = len(ranks.share(range(batch_size)))
    images, labels = images.expand(n, -1, -1, -1, -1), labels.expand(n, -1, -1, -1)
    rows = []
    for draw in range(1 + n_draws):
        torch.manual_seed(seed_of(0, draw, ranks.rank()))
        network.zero_grad()
        logits = replica(images, sample=draw > 0)
        share = n * ranks.world_size() / batch_size
        loss, _ = Objective(1, 512)(logits, labels, network.kl_loss(), share=share)
        loss.backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    return torch.stack(rows)


def facts(path: str, batch_size: str, n_draws: str, *arguments: str) -> int:
    """Write the ranks' exchanged values, the gradients, and the seeds of a short training run to a file."""
    with ranks.joined():
        rows = gradients(int(batch_size), int(n_draws))
        seen = {
            "ranks": ranks.gather(ranks.rank()),
            "means": list(map(str, ranks.mean([float(ranks.rank()), float("nan")]))),
            "digests": ranks.gather(hashlib.sha256(rows.numpy().tobytes()).hexdigest()),
            "seeds": ranks.gather(seeds_of_the_steps(settings_of(arguments))),
        }
        if ranks.is_main():
            save_tensors(path, {"gradients": rows}, seen)
    return 0


def settings_of(arguments: tuple[str, ...]) -> TrainSettings:
    """The settings from arguments of `dwc train`."""
    parser = new_parser("train", "")
    parser.add_class_arguments(TrainSettings)
    return TrainSettings(**parse(parser, arguments).as_dict())


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    sys.exit({"mishap": mishap, "facts": facts}[what](*words))
