import json

import pytest
import safetensors.torch
import torch
from torch import nn

from dwc.base.errors import InputError
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc_kernels import FFGConv3d


@pytest.fixture
def network():
    torch.manual_seed(0)
    return MeshNet(n_classes=3, width=4, dilations=(1, 2))


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_saved_posterior_loads_with_the_same_content_and_digest(network, tmp_path):
    posterior = Posterior.from_model(network, n_volumes=7, label_map={"name": "coarse", "sha256": "ab"})
    posterior.save(tmp_path / "p.safetensors")
    loaded = Posterior.load(tmp_path / "p.safetensors")
    assert same(loaded.mu, posterior.mu)
    assert same(loaded.sigma, posterior.sigma)
    assert loaded.metadata == posterior.metadata
    assert loaded.metadata["architecture"] == network.architecture
    assert loaded.sha256 == posterior.sha256
    assert loaded.name == str(tmp_path / "p.safetensors")


def test_tensors_are_named_by_parameter_with_mu_and_sigma(network, tmp_path):
    Posterior.from_model(network).save(tmp_path / "p.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "p.safetensors")
    assert {"layers.0.weight.mu", "layers.0.weight.sigma", "layers.2.bias.sigma"} < tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_digest_sees_every_weight_and_the_header_but_not_the_order():
    mu, sigma = {"a": torch.ones(2), "b": torch.zeros(3)}, {"a": torch.ones(2), "b": torch.ones(3)}
    digest = Posterior(mu, sigma, {"n_volumes": 1, "label_map": None}).sha256
    assert Posterior(dict(reversed(mu.items())), sigma, {"label_map": None, "n_volumes": 1}).sha256 == digest
    assert Posterior(mu, sigma, {"n_volumes": 2, "label_map": None}).sha256 != digest
    changed = sigma | {"b": torch.tensor([1, 1, 1 + 2.0**-23])}
    assert Posterior(mu, changed, {"n_volumes": 1, "label_map": None}).sha256 != digest
    assert Posterior(sigma, mu, {"n_volumes": 1, "label_map": None}).sha256 != digest


def test_the_means_are_the_effective_ones_under_weight_normalization(network):
    with torch.no_grad():
        network.layers[1].parametrizations.weight_mu.original0.mul_(3)
    posterior = Posterior.from_model(network)
    assert torch.equal(posterior.mu["layers.1.weight"], network.layers[1].weight_mu)
    other = MeshNet(n_classes=3, width=4, dilations=(1, 2), weight_norm=False)
    posterior.to_model(other)
    image = torch.randn(1, 1, 6, 6, 6)
    torch.testing.assert_close(other(image, sample=False), network(image, sample=False))


def test_a_network_made_from_a_posterior_gives_that_posterior_back(network):
    posterior = Posterior.from_model(network)
    again = Posterior.from_model(MeshNet.from_posterior(posterior))
    torch.testing.assert_close(again.mu, posterior.mu, rtol=3e-7, atol=0)
    torch.testing.assert_close(again.sigma, posterior.sigma, rtol=1e-6, atol=0)  # an ulp of rho is 5e-7 of sigma
    assert again.metadata == posterior.metadata


@pytest.mark.parametrize("weight_norm", [True, False])
def test_training_a_network_made_from_a_posterior_leaves_the_posterior_alone(network, weight_norm):
    posterior = Posterior.from_model(network)
    digest = posterior.sha256
    other = MeshNet(n_classes=3, width=4, dilations=(1, 2), weight_norm=weight_norm)
    posterior.to_model(other)
    posterior.set_prior_of(other)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.add_(1)
        for parameter in network.parameters():
            parameter.add_(1)
    assert posterior.sha256 == digest


def test_a_map_network_has_no_sigmas_and_lends_its_means_to_a_bayesian_one(network, tmp_path):
    plain = MeshNet(n_classes=3, width=4, dilations=(1, 2), bayesian=False)
    posterior = Posterior.from_model(plain)
    posterior.save(tmp_path / "map.safetensors")
    posterior = Posterior.load(tmp_path / "map.safetensors")
    assert not posterior.is_bayesian
    posterior.to_model(network)
    result = Posterior.from_model(network)
    torch.testing.assert_close(result.mu, posterior.mu, rtol=3e-7, atol=0)  # weight normalization rounds
    torch.testing.assert_close(result.sigma["layers.0.weight"], torch.full((4, 1, 3, 3, 3), 1e-3))


def test_a_posterior_set_as_its_own_networks_prior_leaves_no_kl(network):
    before = network.kl_loss()
    Posterior.from_model(network).set_prior_of(network)
    assert before > 1000
    assert network.kl_loss().abs() < 1e-3
    assert torch.equal(network.layers[0].prior_weight_mu, network.layers[0].weight_mu)


def test_a_single_layer_is_a_network_too():
    layer = FFGConv3d(1, 2, 3, bias=False)
    assert Posterior.from_model(layer).mu.keys() == {"weight"}


def test_what_the_file_would_lose_is_refused():
    with pytest.raises(ValueError, match=r"1\.weight would be lost"):
        Posterior.from_model(nn.Sequential(FFGConv3d(1, 2, 3), nn.BatchNorm3d(2)))
    with pytest.raises(ValueError, match=r"1\.(weight|bias) is not an FFGConv3d"):
        Posterior.from_model(nn.Sequential(FFGConv3d(1, 2, 3), nn.Conv3d(2, 2, 3)))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"width": 5}, r"has shape \[4, 1, 3, 3, 3\]"), ({"dilations": (1,)}, "exists only in the file")],
)
def test_another_architecture_is_refused_by_name(network, options, words):
    other = MeshNet(**{"n_classes": 3, "width": 4, "dilations": (1, 2), **options})
    with pytest.raises(InputError, match=words):
        Posterior.from_model(network).to_model(other)


def test_a_map_network_is_refused_as_a_prior(network):
    plain = Posterior.from_model(MeshNet(n_classes=3, width=4, dilations=(1, 2), bayesian=False))
    with pytest.raises(InputError, match="MAP network cannot be a prior"):
        plain.set_prior_of(network)


def test_an_all_zero_filter_is_refused_by_a_weight_normalized_network(network):
    posterior = Posterior.from_model(network)
    posterior.mu["layers.1.weight"][2] = 0
    with pytest.raises(InputError, match=r"layers\.1\.weight has an all-zero filter"):
        posterior.to_model(network)


def _broken(**changes):
    def write(path):
        mu, sigma = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(3)}
        tensors = {f"{name}.mu": value for name, value in mu.items()}
        tensors |= {f"{name}.sigma": value for name, value in sigma.items()}
        tensors |= {name.replace("_", "."): value for name, value in changes.items() if name != "header"}
        tensors = {name: value for name, value in tensors.items() if value is not None}
        header = changes.get("header", '{"format_version": 1}')
        safetensors.torch.save_file(tensors, path, {"dwc": header} if header else None)

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "truncated or not a safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 a pickle in a zip, say"), "truncated or not a safetensors file"),
        (lambda path: path.mkdir(), "is a folder; give the .safetensors file in it"),
        (_broken(header=None), "has no dwc header"),
        (_broken(header="{"), "has no dwc header"),
        (_broken(header="[1]"), "not a JSON object"),
        (_broken(header="{}"), "format version None"),
        (_broken(header='{"format_version": 1, "label_map": "fifty"}'), "its header's label_map is not a JSON object"),
        (_broken(header='{"checkpoint_version": 1}'), "is a checkpoint, not a posterior; give its run's posterior"),
        (_broken(header='{"format_version": 99}'), "format version 99.*reads 1"),
        (_broken(a_mu=torch.tensor([0, torch.nan])), r"a\.mu holds non-finite values"),
        (_broken(b_sigma=torch.full((3,), torch.inf)), r"b\.sigma holds non-finite values"),
        (_broken(b_sigma=torch.tensor([1.0, 0, 0])), r"b\.sigma has 2 non-positive values"),
        (_broken(b_sigma=-torch.ones(3)), r"b\.sigma has 3 non-positive values"),
        (_broken(b_sigma=torch.ones(4)), r"b\.sigma has shape \[4\], its mean \[3\]"),
        (_broken(b_sigma=None), "b has only one of mu and sigma"),
        (_broken(a_mu=torch.ones(2).double()), r"a\.mu is torch\.float64, not float32"),
        (_broken(c_extra=torch.ones(2)), r"unexpected tensor c\.extra"),
        (_broken(a_mu=None, b_mu=None, a_sigma=None, b_sigma=None), "holds no tensors"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, write, words):
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(InputError, match=rf"bad\.safetensors: .*{words}") as caught:
        Posterior.load(path)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # the remedy


def test_a_file_cut_anywhere_is_refused(network, tmp_path):
    path = tmp_path / "cut.safetensors"
    Posterior.from_model(network).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 50)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.safetensors: truncated"):
            Posterior.load(path)


def test_a_diverged_network_is_not_saved(network, tmp_path):
    posterior = Posterior.from_model(network)
    posterior.mu["layers.0.bias"][0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.0\.bias\.mu holds non-finite"):
        posterior.save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def in_format_1(posterior: Posterior, path) -> None:
    """The file as the previous version wrote it, without a digest."""
    tensors = {f"{name}.mu": mu for name, mu in posterior.mu.items()}
    tensors |= {f"{name}.sigma": sigma for name, sigma in posterior.sigma.items()}
    header = {**posterior.metadata, "format_version": 1}
    safetensors.torch.save_file(tensors, path, {"dwc": json.dumps(header)})


def test_a_file_of_format_1_loads_keeps_its_digest_when_saved_and_is_sealed_then(network, tmp_path):
    posterior = Posterior.from_model(network, n_volumes=7)
    in_format_1(posterior, tmp_path / "old.safetensors")
    old = Posterior.load(tmp_path / "old.safetensors")
    assert same(old.mu, posterior.mu)
    assert old.metadata["format_version"] == 1
    old.save(tmp_path / "again.safetensors")
    assert Posterior.load(tmp_path / "again.safetensors").sha256 == old.sha256
    content = bytearray((tmp_path / "again.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "again.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="was altered after it was written"):
        Posterior.load(tmp_path / "again.safetensors")


def test_a_new_file_without_its_digest_is_refused(network, tmp_path):
    path = tmp_path / "p.safetensors"
    posterior = Posterior.from_model(network)
    in_format_1(posterior, path)
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"dwc": json.dumps(posterior.metadata)})
    with pytest.raises(InputError, match=r"was altered .the digest of its content is gone"):
        Posterior.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prior_sha256": ["ab"]}, "prior_sha256 is not text"),
        ({"prior_sha256": {"a": 1}}, "prior_sha256 is not text"),
        ({"n_volumes": True}, "n_volumes 'True' is not a count"),
        ({"n_volumes": 2**53 - 1}, "n_volumes '9007199254740991' is not a count"),
        ({"n_volumes": 1.0}, "n_volumes '1.0' is not a count"),
        ({"training": "text"}, "training is not a JSON object"),
        ({"training": {"note": "x" * 1001}}, "a text of 1001 characters"),
        ({"training": {str(n): "x" * 900 for n in range(80)}}, "bytes, more than 65536"),
        ({"other": [[[[[[[[[[1]]]]]]]]]]}, "nested more than 8 deep"),
        ({"x" * 2000: 1}, "a text of 2000 characters"),
        ({"sites": [{"sha256": "a", "n_volumes": 1}, {"sha256": 7, "n_volumes": 1}]}, "list of sites cannot be read"),
        ({"sites": [{"sha256": "a", "n_volumes": 1}] * 2}, "list of sites cannot be read"),
        ({"sites": [{"sha256": "a", "n_volumes": 1, "who": "x"}]}, "list of sites cannot be read"),
        ({"sites": [{"sha256": "a", "n_volumes": 1, "temper": 1e10}]}, "gives a site power 10000000000.0"),
        ({"sites": [{"sha256": "a", "n_volumes": 3}], "n_volumes": 4}, "n_volumes 4 is not the sum over its sites"),
    ],
)
def test_a_header_that_is_out_of_bounds_is_neither_saved_nor_loaded(network, tmp_path, change, words):
    posterior = Posterior.from_model(network, **change)
    with pytest.raises(InputError, match=f"^posterior: .*{words}"):
        posterior.save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []
    in_format_1(posterior, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match=rf"p\.safetensors: .*{words}"):
        Posterior.load(tmp_path / "p.safetensors")


def test_an_empty_tensor_and_one_of_many_dimensions_are_refused(network, tmp_path):
    with pytest.raises(InputError, match=r"a\.mu is empty"):
        Posterior({"a": torch.ones(0)}, {}).save(tmp_path / "p.safetensors")
    safetensors.torch.save_file({"a.mu": torch.ones([1] * 20)}, tmp_path / "p.safetensors", {"dwc": "{}"})
    with pytest.raises(InputError, match=r"holds a tensor that cannot be read .more than 16 dimensions"):
        Posterior.load(tmp_path / "p.safetensors")


def test_means_that_fp32_rounds_by_more_than_a_tenth_of_their_sigma_are_counted():
    mu = {"fine": torch.ones(3), "coarse": torch.tensor([1.0, 1e-3, 1.0])}
    sigma = {"fine": torch.full((3,), 1e-5), "coarse": torch.full((3,), 1e-8)}
    assert Posterior(mu, sigma).coarse() == {"coarse": 2}
