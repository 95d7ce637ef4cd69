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

_LEAST_SIZE = 256  # pixels of a picture's height; smaller slices are enlarged by a whole factor
_OVER = 0.7  # share of a class's colour over the scan


class Panel:
    """The axial slice with the most labelled voxels of the first held-out scan.

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
        self.grey, self.truth = voxels[:, place] / 255, truth[:, place]
        self.colours = class_colours(held_out.label_map.n_classes)

    @torch.inference_mode()
    def draw(self, network: MeshNet, device: torch.device, precision: str) -> np.ndarray:
        """Scan, truth, prediction and entropy side by side: uint8 [height, width, 3].

        The network is at its means. Anterior is up, the patient's left on the right; entropy is white at its largest
        value, ln(number of classes).
        """
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            image = torch.from_numpy(self.image)[None].to(device)
            logits = block_logits(network, image, self.block, network.convolutions())
        probability = logits.softmax(dim=-1)
        predicted, entropy = np.zeros_like(self.truth), np.zeros(self.truth.shape, np.float32)
        left, _, anterior = self.block
        predicted[left, anterior] = probability.argmax(dim=-1).to(torch.uint8)[:, 0].cpu().numpy()
        entropy[left, anterior] = torch.special.entr(probability).sum(dim=-1)[:, 0].cpu().numpy()
        share = entropy / math.log(len(self.colours))
        parts = [_rgb(self.grey), self._painted(self.truth), self._painted(predicted), _rgb(share)]
        picture = np.concatenate([_upright(part) for part in parts], axis=1)
        return (255 * picture.clip(0, 1)).round().astype(np.uint8)

    def _painted(self, classes: np.ndarray) -> np.ndarray:
        grey = _rgb(self.grey)
        return np.where(classes[..., None] > 0, (1 - _OVER) * grey + _OVER * self.colours[classes], grey)


def _rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def _upright(slice_: np.ndarray) -> np.ndarray:
    """A slice [left, anterior, 3] as a picture [row from the top, column, 3]."""
    factor = -(-_LEAST_SIZE // len(slice_))
    return slice_.swapaxes(0, 1)[::-1].repeat(factor, axis=0).repeat(factor, axis=1)
