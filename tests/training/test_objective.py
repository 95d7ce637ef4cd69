import math

import pytest
import torch
from torch.distributions import Normal
from torch.nn.functional import cross_entropy, softplus

from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.training.objective import Objective, negative_log_prior
from dwc_kernels import SigmaProjection

N, M, SIDE = 7, 3, 4
V = SIDE**3


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(M, 1, SIDE, SIDE, SIDE), torch.randint(0, 5, (M, SIDE, SIDE, SIDE))


def test_the_loss_is_the_elbo_of_equations_6_and_7_over_minus_n_v(batch):
    images, labels = batch
    network = MeshNet(n_classes=5, width=3, dilations=(1, 2))
    logits = network(images)
    log_likelihood = -cross_entropy(logits.double(), labels, reduction="sum")  # sum over m and over voxels
    elbo = N / M * log_likelihood - network.kl_loss().double()
    objective = Objective(n_sub_volumes=N, voxels_per_sub_volume=V)
    loss, nll = objective(logits, labels, network.kl_loss())
    assert objective.scale == N * V
    torch.testing.assert_close(loss.double(), -elbo / (N * V))
    torch.testing.assert_close(nll.double(), -log_likelihood / (M * V))


def test_its_gradient_is_the_elbos_too(batch):
    images, labels = batch
    network = MeshNet(n_classes=5, width=3, dilations=(1,)).double()
    logits = network(images.double(), sample=False)
    parameters = list(network.parameters())
    loss, _ = Objective(N, V)(logits, labels, network.kl_loss())
    ours = torch.autograd.grad(loss, parameters, retain_graph=True)
    elbo = -N / M * cross_entropy(logits, labels, reduction="sum") - network.kl_loss()
    for left, right in zip(ours, torch.autograd.grad(elbo, parameters), strict=True):
        torch.testing.assert_close(left, -right / (N * V), rtol=1e-4, atol=1e-8)  # the loss is fp32


def test_the_map_loss_is_equation_2_up_to_a_constant(batch):
    images, labels = batch
    network = MeshNet(n_classes=5, width=3, dilations=(1, 2), bayesian=False)
    weights = Posterior.from_model(network).mu.values()
    log_prior = sum(Normal(0.0, 1.0).log_prob(weight.double()).sum() for weight in weights)
    constant = sum(weight.numel() for weight in weights) * math.log(2 * math.pi) / 2
    logits = network(images)
    log_posterior = -cross_entropy(logits.double(), labels, reduction="sum") + log_prior  # the batch is the data: N = M
    loss, _ = Objective(M, V)(logits, labels, negative_log_prior(network))
    torch.testing.assert_close(loss.double() * M * V, -log_posterior - constant)


def test_the_expected_minibatch_loss_is_the_full_loss(batch):
    """N / M in Eq. 7: the mean over all single-example batches is the loss of the whole set."""
    images, labels = batch
    network = MeshNet(n_classes=5, width=3, dilations=(1,), bayesian=False)
    objective, penalty = Objective(M, V), negative_log_prior(network)
    single = [objective(network(images[m : m + 1]), labels[m : m + 1], penalty)[0] for m in range(M)]
    torch.testing.assert_close(torch.stack(single).mean(), objective(network(images), labels, penalty)[0])


def test_sub_volumes_of_another_size_than_the_scale_counts_are_refused(batch):
    images, labels = batch
    network = MeshNet(n_classes=5, width=3, dilations=(1,))
    with pytest.raises(ValueError, match="64 voxels per sub-volume, not 63"):
        Objective(N, V - 1)(network(images), labels, network.kl_loss())


def test_fine_tuning_gives_the_likelihood_the_weight_of_its_n(batch):
    images, labels = batch
    network = MeshNet(n_classes=5, width=3, dilations=(1,))
    logits, kl = network(images), network.kl_loss()
    many, one = Objective(512 * 956, V)(logits, labels, kl), Objective(512, V)(logits, labels, kl)
    torch.testing.assert_close(one[1], many[1])
    torch.testing.assert_close((one[0] - one[1]) / (many[0] - many[1]), torch.tensor(956.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 0.1, 1.0, 30.0])
def test_after_the_projection_no_sigma_exceeds_its_priors_by_an_ulp(scale):
    torch.manual_seed(0)
    network = MeshNet(n_classes=5, width=7, dilations=(1, 2))
    prior = Posterior.from_model(network)
    for name, sigma in prior.sigma.items():
        prior.sigma[name] = scale * (1 + torch.rand_like(sigma))
    prior.set_prior_of(network)
    project = SigmaProjection(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("rho"):
                parameter.add_(100)
    project()
    after = Posterior.from_model(network)
    for name, sigma_0 in prior.sigma.items():
        assert (after.sigma[name] <= sigma_0).all()
        torch.testing.assert_close(after.sigma[name], sigma_0, rtol=4e-6, atol=0)


def test_the_projection_leaves_smaller_sigmas_and_plain_networks_alone():
    network = MeshNet(n_classes=5, width=3, dilations=(1,))
    before = Posterior.from_model(network)
    SigmaProjection(network)()
    assert Posterior.from_model(network).sha256 == before.sha256
    SigmaProjection(MeshNet(5, 3, (1,), bayesian=False))()


def test_the_projection_holds_for_every_rho_below_its_limit():
    """softplus in fp32 need not be monotone in the last bit; the limit allows for that."""
    from dwc_kernels.network import _rho_limit

    for sigma_0 in (1e-6, 1e-3, 0.5, 1.0, 19.0):
        limit = _rho_limit(torch.tensor(sigma_0))
        below = limit - torch.linspace(0, 1e-4, 5001) * limit.abs()
        for pieces in (below, below[:3], below[1:]):  # vectorized and scalar code paths
            assert (softplus(pieces) <= sigma_0).all()
