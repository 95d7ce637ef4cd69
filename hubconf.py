"""For torch.hub: `torch.hub.load(FOLDER, "meshnet", source="local", posterior="posterior.safetensors")`."""

from torch import nn

dependencies = ["torch", "numpy", "scipy", "nibabel", "safetensors", "pydantic"]


def meshnet(posterior: str, label_map: str | None = None) -> nn.Module:
    """The network in a posterior file or run folder, as `dwc.load_network` gives it."""
    from dwc import load_network

    return load_network(posterior, label_map)
