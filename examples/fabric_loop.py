"""PixelCL in a plain loop on Lightning Fabric, which handles devices, precision and processes."""

import torch
from lightning.fabric import Fabric
from torchvision import models

from pixel_level_contrastive_learning import PixelCL

fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")  # or "auto", and several
fabric.launch()
fabric.seed_everything(0, verbose=False)
resnet = models.resnet18(weights=None)
learner = PixelCL(resnet, image_size=64, projection_size=64, projection_hidden_size=128)
opt = torch.optim.AdamW(learner.parameters(), lr=1e-3)
wrapped, opt = fabric.setup(learner, opt)  # keep the unwrapped learner

for step in range(1, 6):
    images = torch.rand(4, 3, 96, 96, device=fabric.device)  # use your data loader: in [0, 1]
    terms = wrapped(images, return_terms=True)
    opt.zero_grad()
    fabric.backward(terms.loss)
    opt.step()
    learner.update_moving_average()
    fabric.print(f"step {step}  loss {terms.loss:.3f}  pixel_cosine {terms.pixel_cosine:.3f}")
if fabric.is_global_zero:
    torch.save(resnet.state_dict(), "improved-resnet.pt")  # plain torchvision weights
