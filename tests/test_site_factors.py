"""Rounds on the same scans: one round is Eq. 17, rounds settle on the pooled posterior, sites come and go exactly."""

from random import Random

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwc.base.errors import InputError
from dwc.base.files import canonical_json, load_tensors, save_tensors
from dwc.consolidation import consolidate
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from tests.made_posteriors import HEADER, TENSORS, a_prior, a_site

seeds = st.integers(0, 2**20)
NAMES = ("N", "B", "W", "X")


def same(left: Posterior, right: Posterior) -> bool:
    pairs = ((left.mu, right.mu), (left.sigma, right.sigma))
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def posterior_of(precision, shift, prior: Posterior) -> Posterior:
    """A site's answer with these natural parameters, trained from `prior`."""
    mu = {name: (shift[name] / precision[name]).float() for name in TENSORS}
    sigma = {name: torch.minimum(precision[name].rsqrt().float(), prior.sigma[name]) for name in TENSORS}
    return Posterior(mu, sigma, {**HEADER, "n_volumes": 2, "prior_sha256": prior.sha256})


def conjugate_answer(prior: Posterior, data: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Posterior:
    """The exact posterior of Gaussian weights that were observed with Gaussian noise: data as precision and shift."""
    precision = {name: prior.sigma[name].double() ** -2 + data[name][0] for name in TENSORS}
    shift = {name: prior.mu[name].double() * prior.sigma[name].double() ** -2 + data[name][1] for name in TENSORS}
    return posterior_of(precision, shift, prior)


def observations(seed: int, site: int, scale: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1000 * seed + site)
    found = {}
    for name, shape in TENSORS.items():
        precision = torch.rand(shape, generator=generator, dtype=torch.float64) / scale**2
        mean = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        found[name] = precision, precision * mean
    return found


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n_sites=st.integers(1, 6), scale=st.sampled_from([1e-4, 1e-3, 1.0]))
def test_one_round_of_empty_factors_is_equation_17_to_the_bit(seed, n_sites, scale):
    prior = a_prior(seed, scale)
    sites = [a_site(prior, seed + s) for s in range(n_sites)]
    factors = Factors(prior)
    for number, site in enumerate(sites):
        assert factors.cavity(f"site {number}") is prior or number > 0
        factors.replace(f"site {number}", site, cavity=prior)
    assert same(factors.posterior(), consolidate(prior, sites))


@settings(max_examples=15, deadline=None)
@given(
    seed=seeds,
    damping=st.floats(0.2, 1.0),
    rounds=st.lists(st.lists(st.sampled_from(range(4)), min_size=1, max_size=4, unique=True), min_size=1, max_size=6),
    scale=st.sampled_from([1e-3, 1.0]),
)
def test_in_a_conjugate_model_rounds_settle_on_the_pooled_posterior(seed, damping, rounds, scale):
    prior = a_prior(seed, scale)
    data = [observations(seed, site, scale) for site in range(4)]
    factors = Factors(prior)
    everyone = [range(4)] * round(25 / damping)
    for answering in [*rounds, *everyone]:  # first with sites missing at random, in any order
        cavities = {site: factors.cavity(NAMES[site]) for site in answering}
        for site, cavity in cavities.items():
            answer = conjugate_answer(cavity, data[site])
            factors.replace(NAMES[site], answer, cavity=cavity, damping=damping)
    settled = factors.posterior()
    for name in TENSORS:
        precision = prior.sigma[name].double() ** -2 + sum(part[name][0] for part in data)
        shift = prior.mu[name].double() * prior.sigma[name].double() ** -2 + sum(part[name][1] for part in data)
        mean, sigma = shift / precision, precision.rsqrt()
        rounding = 8 * 2.0**-24 * mean.abs()  # every answer and cavity is fp32
        assert ((settled.mu[name] - mean).abs() <= rounding + 1e-5 * sigma).all()
        assert (settled.sigma[name] / sigma - 1).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(seed=seeds, damping=st.floats(0.05, 1.0), order=st.permutations(NAMES))
def test_no_round_takes_precision_below_the_priors_and_removing_all_sites_gives_the_prior_back(seed, damping, order):
    prior = a_prior(seed, 1e-3)
    factors = Factors(prior)
    for number in range(2):
        for name in order:
            cavity = factors.cavity(name)
            factors.replace(name, a_site(cavity, seed + number), cavity=cavity, damping=damping)
            for tensor in TENSORS:
                assert (factors.posterior().sigma[tensor] <= prior.sigma[tensor]).all()
                assert (factors.cavity(name).sigma[tensor] <= prior.sigma[tensor]).all()
    for name in order:
        factors.remove(name)
    assert factors.posterior() is prior


def test_removing_a_site_leaves_what_the_others_contributed_however_confident_it_was():
    prior = a_prior(0, 1e-3)
    others = [a_site(prior, 1), a_site(prior, 2)]
    loud = a_site(prior, 3)
    sigma = {name: 1e-6 * loud.sigma[name] for name in TENSORS}
    loud = Posterior(loud.mu, sigma, loud.metadata)
    factors = Factors(prior)
    factors.replace("loud", loud, cavity=prior)
    for name, site in zip(NAMES, others, strict=False):
        factors.replace(name, site, cavity=prior)
    factors.remove("loud")
    assert same(factors.posterior(), consolidate(prior, others))


def test_a_late_answer_replaces_its_factor_by_the_cavity_it_was_trained_from():
    prior = a_prior(0, 1e-3)
    factors = Factors(prior)
    late = a_site(prior, 1)
    factors.replace("N", a_site(prior, 2), cavity=prior)
    factors.replace("B", late, cavity=prior)
    assert same(factors.posterior(), consolidate(prior, [a_site(prior, 2), late]))


def test_an_answer_to_another_cavity_is_refused_and_nothing_changes():
    prior = a_prior(0, 1e-3)
    factors = Factors(prior)
    factors.replace("N", a_site(prior, 1), cavity=prior)
    before = factors.posterior()
    with pytest.raises(InputError, match="was trained from prior"):
        factors.replace("B", a_site(prior, 2))  # the cavity of B is the network with N's factor
    with pytest.raises(InputError, match="`damping` 0"):
        factors.replace("B", a_site(before, 2), damping=0)
    assert same(factors.posterior(), before)


def test_factors_come_back_from_their_file_to_the_bit(tmp_path):
    prior = a_prior(0, 1e-3)
    factors = Factors(prior)
    for number, name in enumerate(NAMES):
        factors.replace(name, a_site(prior, number), cavity=prior, damping=0.3)
    factors.save(tmp_path / "factors.safetensors")
    again = Factors.load(tmp_path / "factors.safetensors", prior)
    assert again.sites == factors.sites
    assert again.posterior().sha256 == factors.posterior().sha256
    assert again.cavity("N").sha256 == factors.cavity("N").sha256


def test_a_file_of_another_prior_or_another_kind_is_refused(tmp_path):
    prior, other = a_prior(0, 1e-3), a_prior(1, 1e-3)
    factors = Factors(prior)
    factors.replace("N", a_site(prior, 1))
    factors.save(tmp_path / "factors.safetensors")
    prior.save(tmp_path / "prior.safetensors")
    with pytest.raises(InputError, match="belong to prior"):
        Factors.load(tmp_path / "factors.safetensors", other)
    with pytest.raises(InputError, match="holds no factors"):
        Factors.load(tmp_path / "prior.safetensors", prior)


@pytest.fixture
def state(tmp_path):
    """A prior, a state file of two sites, its tensors and its header."""
    prior = a_prior(0, 1e-3)
    factors = Factors(prior)
    for number, name in enumerate(NAMES[:2]):
        factors.replace(name, a_site(prior, number), cavity=prior, damping=0.5)
    path = tmp_path / "state.safetensors"
    factors.save(path)
    return prior, path, *load_tensors(path)


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "a/b", ".a", "", "two\nlines", "\x1b[2J", "x" * 300])
def test_a_name_that_would_be_no_file_is_refused_from_a_caller_and_from_a_state(state, name):
    prior, path, tensors, header = state
    with pytest.raises(InputError, match="is no name of a site"):
        Factors(prior).replace(name, a_site(prior, 1))
    renamed = {key.replace("N/", f"{name}/", 1): values for key, values in tensors.items()}
    sites = {name if site == "N" else site: about for site, about in header["sites"].items()}
    save_tensors(path, renamed, {**header, "sites": sites})
    with pytest.raises(InputError, match="is no name of a site") as refusal:
        Factors.load(path, prior)
    assert str(refusal.value).startswith(str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, 1e200, -1.0, -1e-300])
@pytest.mark.parametrize("part", ["0", "0_error", "1", "1_error"])
def test_a_state_with_forged_numbers_is_refused_or_makes_a_network(state, part, value):
    prior, path, tensors, header = state
    tensors["N/layers.0.bias/" + part][0] = value
    save_tensors(path, tensors, header)
    try:
        factors = Factors.load(path, prior)
    except InputError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(f"{path}: ")
        return
    assert -1e200 < value < 1e200
    for network in (factors.posterior(), factors.cavity("N"), factors.cavity("B")):
        assert (network.validate().sigma["layers.0.bias"] <= prior.sigma["layers.0.bias"]).all()


def test_precision_taken_away_is_named_by_site_and_tensor(state):
    prior, path, tensors, header = state
    tensors["B/layers.0.bias/1"].neg_()
    save_tensors(path, tensors, header)
    with pytest.raises(InputError, match=r"the factor of B takes precision away in 4 weights of layers\.0\.bias"):
        Factors.load(path, prior)


CHANGES = {
    "a site": lambda tensors, header: header["sites"].pop("N"),
    "a tensor": lambda tensors, header: tensors.pop("N/layers.0.bias/1"),
    "another tensor": lambda tensors, header: tensors.update(x=torch.zeros(3)),
    "a huge tensor": lambda tensors, header: tensors.update({"N/layers.0.bias/1": torch.zeros(10**6).double()}),
    "another type": lambda tensors, header: tensors.update({"N/layers.0.bias/1": torch.zeros(4)}),
    "digest of a site": lambda tensors, header: header["sites"]["N"].update(sha256=["a"]),
    "long digest": lambda tensors, header: header["sites"]["N"].update(sha256="a" * 10**5),
    "one digest twice": lambda tensors, header: header["sites"].update(B=header["sites"]["N"]),
    "volumes": lambda tensors, header: header["sites"]["N"].update(n_volumes=-1),
    "many volumes": lambda tensors, header: header["sites"]["N"].update(n_volumes=2**70),
    "true volumes": lambda tensors, header: header["sites"]["N"].update(n_volumes=True),
    "sites": lambda tensors, header: header.update(sites=[]),
    "nothing of a site": lambda tensors, header: header["sites"].update(N=None),
    "version": lambda tensors, header: header.update(factors_version=[2]),
    "prior": lambda tensors, header: header.update(prior_sha256={"a": "\x1b"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_was_written_by_something_else_is_one_line_that_names_it(state, change):
    prior, path, tensors, header = state
    CHANGES[change](tensors, header)
    save_tensors(path, tensors, header)
    with pytest.raises(InputError) as refusal:
        Factors.load(path, prior)
    assert str(refusal.value).startswith(f"{path}: ")
    assert len(str(refusal.value)) < 1000


def test_a_state_without_its_digest_is_refused(state):
    prior, path, tensors, header = state
    path.write_bytes(safetensors.torch.save(tensors, {"dwc": canonical_json(header)}))
    with pytest.raises(InputError, match="the digest of its content is gone"):
        Factors.load(path, prior)


def test_a_thousand_mutated_states_are_refused_or_hold_what_they_held(state):
    prior, path, _, _ = state
    original, random = path.read_bytes(), Random(0)
    network = Factors.load(path, prior).posterior().sha256
    refusals = []
    for _ in range(1000):
        content = bytearray(original)
        for _ in range(random.randint(1, 4)):
            place = random.randrange(len(content))
            match random.randrange(4):
                case 0:
                    content[place] ^= 1 << random.randrange(8)
                case 1:
                    content[place : place + random.randint(1, 64)] = random.randbytes(random.randint(1, 64))
                case 2:
                    del content[place : place + random.randint(1, 64)]
                case _:
                    del content[max(place, 1) :]
        path.write_bytes(content)
        try:
            assert Factors.load(path, prior).posterior().sha256 == network
        except InputError as error:
            refusals.append(str(error))
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)
    assert len(refusals) > 990


def test_a_weakened_factor_is_that_power_of_it():
    prior = a_prior(0, 1e-3)
    factors = Factors(prior)
    factors.replace("N", a_site(prior, 1), cavity=prior, power=0.25)
    assert same(factors.posterior(), consolidate(prior, [a_site(prior, 1)], temper=0.25))
    with pytest.raises(InputError, match="`power` 0"):
        factors.replace("N", a_site(prior, 1), cavity=prior, power=0)
