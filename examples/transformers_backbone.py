"""Pretrain a network from transformers and save it for transformers."""

import torch
from transformers import AutoModel, Dinov2Config

from pixel_level_contrastive_learning import PixelCL

torch.manual_seed(0)
# A small one with random weights; for yours: AutoModel.from_pretrained("facebook/dinov2-small").
config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=112)
net = AutoModel.from_config(config)
learner = PixelCL(
    net,
    image_size=112,  # a multiple of the patch size, 14
    projection_size=64,
    projection_hidden_size=128,
)
print("pixel layer:", learner.online_encoder.pixel_hooks[0])
opt = torch.optim.AdamW(learner.parameters(), lr=1e-3)
for step in range(1, 6):
    images = torch.rand(4, 3, 160, 160)  # use yours: float (b, 3, height, width) in [0, 1]
    terms = learner(images, return_terms=True)
    opt.zero_grad()
    terms.loss.backward()
    opt.step()
    learner.update_moving_average()
    print(f"step {step}  loss {terms.loss.item():.3f}  pixel_cosine {terms.pixel_cosine:.3f}")
net.save_pretrained("improved-dinov2")  # AutoModel.from_pretrained("improved-dinov2")
