from itertools import islice

import numpy as np
import pytest
import torch

from benchmarks.low_rank_factors import SITES, WEIGHTS, data, errors, means
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from tests.made_posteriors import HEADER


def test_with_the_whole_covariance_one_round_gives_the_pooled_posterior():
    assert errors(0, WEIGHTS, 1.0)[0] < 1e-20


def test_diagonal_factors_diverge_without_damping_and_settle_on_the_pooled_mean_with_it():
    _, sites = data(0)
    pooled = np.linalg.solve(np.eye(WEIGHTS) + sum(p for p, _ in sites), sum(shift for _, shift in sites))
    assert errors(0, 0, 1.0)[-1] > 1
    *_, settled = islice(means(sites, 0, 1 / SITES), 600)
    np.testing.assert_allclose(settled, pooled, atol=1e-3 * np.abs(pooled).max())


@pytest.mark.parametrize("damping", [1.0, 1 / SITES])
def test_rank_0_is_the_factors_of_the_package(damping):
    def posterior(mean, precision):
        tensors = [{"w": torch.from_numpy(values).float()} for values in (mean, precision**-0.5)]
        return Posterior(*tensors, {**HEADER, "n_volumes": 1})

    _, sites = data(0)
    factors = Factors(posterior(np.zeros(WEIGHTS), np.ones(WEIGHTS)))
    for expected in islice(means(sites, 0, damping), 3):
        cavities = [factors.cavity(str(k)) for k in range(SITES)]
        for k, ((precision, shift), cavity) in enumerate(zip(sites, cavities, strict=True)):
            own = cavity.sigma["w"].double().numpy() ** -2
            mean = np.linalg.solve(np.diag(own) + precision, own * cavity.mu["w"].double().numpy() + shift)
            answer = posterior(mean, own + np.diag(precision))
            answer.metadata["prior_sha256"] = cavity.sha256
            factors.replace(str(k), answer, cavity=cavity, damping=damping)
        np.testing.assert_allclose(factors.posterior().mu["w"].numpy(), expected, rtol=1e-3, atol=1e-4)
