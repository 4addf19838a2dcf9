"""Pretrain your own network on images with five channels."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from pixel_level_contrastive_learning import PixelCL


class SatelliteNet(nn.Module):
    """A small network for five bands, with a classifier that pretraining does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in pairwise((5, 32, 64, 128))
            )
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


torch.manual_seed(0)
net = SatelliteNet()
learner = PixelCL(
    net,
    image_size=64,
    channels=5,
    hidden_layer_pixel="stages.2",  # any layer by name: the 8x8 feature map of the last stage
    hidden_layer_instance="stages.2",  # a map is averaged for the instance loss
    projection_size=64,
    projection_hidden_size=128,
    prob_rand_vflip=0.5,  # images taken from above have no right way up
    max_rotation=180,
    mean=[0.2] * 5,  # measure these on your images, scaled to [0, 1]
    std=[0.2] * 5,
)
opt = torch.optim.AdamW(learner.parameters(), lr=1e-3)
ramp = torch.linspace(0, 1, 96).expand(5, 96, 96)
for _ in range(5):
    shifts = torch.rand(4, 5, 1, 1)
    images = (ramp + shifts).remainder(1)  # use yours: float (b, 5, height, width) in [0, 1]
    terms = learner(images, return_terms=True)
    opt.zero_grad()
    terms.loss.backward()
    opt.step()
    learner.update_moving_average()
    print(f"loss {terms.loss.item():.3f}  pixel_cosine {terms.pixel_cosine:.3f}")
print("never trained:", ", ".join(learner.unreached_parameters()))
torch.save(net.state_dict(), "satellite-net.pt")
