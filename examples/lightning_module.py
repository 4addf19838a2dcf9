"""PixelCL inside a LightningModule: Lightning's Trainer runs the loop."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import models

from pixel_level_contrastive_learning import PixelCL


class Pretraining(LightningModule):
    """Pretrains a backbone; ``self.learner.net`` is that same backbone."""

    def __init__(self, net: torch.nn.Module, image_size: int, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.learner = PixelCL(net, image_size, projection_size=64, projection_hidden_size=128)
        # Several devices: DDP waits for every gradient, and a classifier gets none.
        for name in self.learner.unreached_parameters():
            self.learner.get_parameter(name).requires_grad_(False)

    def training_step(self, images: Tensor) -> Tensor:
        terms = self.learner(images, return_terms=True)
        self.log("pixel_cosine", terms.pixel_cosine)  # the figure to watch
        return terms.loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.learner.update_moving_average()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learned = (parameter for parameter in self.learner.parameters() if parameter.requires_grad)
        return torch.optim.AdamW(learned, lr=self.lr)


torch.manual_seed(0)
resnet = models.resnet18(weights=None)
images = DataLoader(torch.rand(16, 3, 96, 96), batch_size=4)  # use yours: in [0, 1]
trainer = Trainer(
    max_epochs=1,
    accelerator="cpu",  # or "auto"
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Pretraining(resnet, image_size=64), images)
print(f"step {trainer.global_step}  pixel_cosine {trainer.callback_metrics['pixel_cosine']:.3f}")
resnet.requires_grad_(True)
torch.save(resnet.state_dict(), "improved-resnet.pt")  # plain torchvision weights
