"""Make a MONAI U-Net Bayesian and train it: `python examples/train_converted_unet.py`."""

import argparse

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from scans import made_scans

from dwc_kernels import conversion_report, convert, kl_loss, parameter_groups, seed_noise

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
steps = parser.parse_args().steps

torch.manual_seed(0)
images, labels = made_scans(8)
net = UNet(3, in_channels=1, out_channels=3, channels=(8, 16, 32), strides=(2, 2), norm="batch")
convert(net, prior_sigma=0.1)  # every convolution, up and down; a pretrained U-Net would keep its weights as means
left = [entry for entry in conversion_report(net) if not entry.converted]
print(
    f"variational but for {sum(entry.parameters for entry in left)} parameters of {', '.join({e.kind for e in left})}"
)

optimizer = torch.optim.Adam(parameter_groups(net, lr=1e-2, weight_decay=1e-4))  # sigma is never decayed
n_voxels = labels.numel()  # in the training set: the KL divergence counts once for all of them
seed_noise(net, 0)
for step in range(steps):
    batch = torch.randperm(len(images))[:4]
    nll = F.cross_entropy(net(images[batch]), labels[batch])
    loss = nll + kl_loss(net) / n_voxels
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0 or step == steps - 1:
        print(f"step {step}: {nll:.3f} nats a voxel, KL {kl_loss(net):.0f} nats")

test_images, test_labels = made_scans(4, seed=1)
net.eval()  # the mean of the weights
with torch.no_grad():
    accuracy = (net(test_images).argmax(1) == test_labels).float().mean()
print(f"voxels right on new scans: {accuracy:.1%}")
