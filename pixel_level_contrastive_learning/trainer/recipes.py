"""Recipes: settings that belong together, by name. Imports no torch.

The authors' figures are those of their release. Two departures remain: timm's LARS divides by the
sum of the norms of gradient and decay, theirs by the norm of their sum; and our instance branch,
which their scripts leave off, pools before its projector.
"""

from __future__ import annotations

from types import MappingProxyType

PIXPRO: dict[str, object] = {
    "model": "torchvision/resnet50",
    "zero_init_residual": True,
    "image_size": 224,
    "batch_size": 1024,
    "optimizer": "lars",
    "lr": 1.0,
    "final_lr": 1e-6,
    "warmup_epochs": 5.0,
    "weight_decay": 1e-5,
    "target_momentum": 0.99,
    "crop_area": (0.08, 1.0),
    "aspect_ratio": (3 / 4, 4 / 3),
    "prob_hflip": 0.5,
    "prob_vflip": 0.0,
    "max_rotation": 0.0,
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "prob_jitter": 0.8,
    "prob_gray": 0.2,
    "prob_blur": (1.0, 0.1),
    "blur_sigma": (0.1, 2.0),
    "prob_solarise": (0.0, 0.2),
    "projection_size": 256,
    "projection_hidden_size": 4096,  # the release; the paper says 2048
    "ppm_num_layers": 1,
    "ppm_gamma": 2.0,
    "distance_thres": 0.7,
    "loss": "pixpro",
    "alpha": 1.0,
    "instance_weight": 0.0,  # off in the released scripts
    "clip_grad": 0.0,
}

RECIPES: MappingProxyType[str, dict[str, object]] = MappingProxyType(
    {"pixpro-100ep": PIXPRO | {"epochs": 100}, "pixpro-400ep": PIXPRO | {"epochs": 400}}
)
"""Settings by the recipe's name; what a recipe does not name keeps its default."""
