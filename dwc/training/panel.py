"""One slice of a held-out scan, segmented after each epoch, as a picture to follow a training by."""

import math

import numpy as np
import torch

from dwc.colours import class_colours
from dwc.data.dataset import SubVolumes
from dwc.data.head import Region, head_box
from dwc.meshnet import MeshNet
from dwc.prediction import block_logits

__all__ = ["Panel"]

_LEAST_HEIGHT = 256  # pixels; smaller slices are enlarged by a whole factor
_OVER = 0.7  # share of a class's colour over the scan
_WHITE = 0.5  # share of the largest entropy, ln(number of classes)


class Panel:
    """The axial slice with the most labelled voxels of the first held-out scan, cropped to the head.

    It draws no noise, so that training does not depend on whether it is shown.
    """

    def __init__(self, held_out: SubVolumes) -> None:
        voxels, truth = held_out.volume(0)
        assert truth is not None  # training refuses scans without labels
        labelled = truth if truth.any() else voxels
        place = int(np.count_nonzero(labelled, axis=(0, 2)).argmax())
        left, _, anterior = head_box(voxels)
        self.block: Region = (left, slice(place, place + 1), anterior)
        self.image = held_out.scaling(0)(voxels)
        self.grey, self.truth = _rgb(voxels[left, place, anterior] / 255), truth[left, place, anterior]
        self.colours = class_colours(held_out.label_map.n_classes)

    @torch.inference_mode()
    def draw(self, network: MeshNet, device: torch.device, precision: str) -> np.ndarray:
        """Scan, truth, prediction and entropy side by side: uint8 [height, width, 3].

        The network is at its means. Anterior is up, the patient's left on the right; entropy is white from half of its
        largest value on.
        """
        image = torch.from_numpy(self.image)[None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = block_logits(network, image, self.block, network.convolutions())
        probability = logits[:, 0].softmax(dim=-1).cpu()
        entropy = torch.special.entr(probability).sum(dim=-1).numpy() / math.log(len(self.colours))
        predicted = probability.argmax(dim=-1).numpy()
        parts = [self.grey, self._painted(self.truth), self._painted(predicted), _rgb(entropy / _WHITE)]
        picture = np.concatenate(parts).swapaxes(0, 1)[::-1]  # [left, anterior] to [row from the top, column]
        factor = -(-_LEAST_HEIGHT // len(picture))
        return (255 * picture.clip(0, 1)).round().astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)

    def _painted(self, classes: np.ndarray) -> np.ndarray:
        painted = (1 - _OVER) * self.grey + _OVER * self.colours[classes]
        return np.where(classes[..., None] > 0, painted, self.grey)


def _rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)
