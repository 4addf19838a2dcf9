"""The layers that are read by default, network by network: never class scores."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from pixel_level_contrastive_learning.backbones.factory import build_backbone, default_layers
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo

# Network, pixel layer, instance layer, and the side of its images where that is not 128.
LAYERS = """
timm/deit_tiny_distilled_patch16_224 norm norm
timm/efficientformer_l1 norm norm 224
timm/crossvit_tiny_240 norm.0 norm.0 240
timm/volo_d1_224 norm norm
timm/deit_tiny_patch16_224 norm fc_norm
timm/vit_tiny_patch16_224 norm fc_norm
timm/resnet18 layer4 global_pool
timm/resnext26ts final_conv head.global_pool
timm/convnext_atto norm_pre head.global_pool
timm/efficientnet_b0 bn2 global_pool
timm/mobilenetv3_small_050 blocks global_pool
timm/regnety_002 final_conv head.global_pool
timm/swin_tiny_patch4_window7_224 norm head.global_pool
timm/mobilevit_xxs final_conv head.global_pool
timm/levit_conv_128s stages.1 head.bn
timm/efficientformerv2_s0 norm norm
timm/poolformer_s12 stages head.global_pool
timm/pvt_v2_b0 stages stages
timm/coat_lite_tiny norm4 norm4
timm/convit_tiny norm norm
timm/pit_ti_distilled_224 transformers norm
timm/visformer_tiny norm global_pool
timm/edgenext_xx_small norm_pre head.global_pool
timm/fastvit_t8 final_conv head.global_pool
timm/repvit_m0_9 stages head.head.bn
timm/tiny_vit_5m_224 stages head.global_pool
timm/ghostnet_050 blocks global_pool
timm/lcnet_035 blocks global_pool
timm/mixer_s32_224 norm norm
timm/resmlp_12_224 norm norm
timm/xcit_nano_12_p16_224 norm norm
timm/cait_xxs24_224 norm norm
timm/test_vit norm fc_norm
timm/hrnet_w18_small final_layer global_pool
timm/densenet121 features global_pool
timm/inception_next_atto stages head.global_pool
timm/maxvit_nano_rw_256 norm head.global_pool
timm/dla34 level5 global_pool
timm/darknet53 stages head.global_pool
torchvision/resnet18 layer4 avgpool
torchvision/squeezenet1_1 features features
torchvision/mobilenet_v2 features features
torchvision/shufflenet_v2_x0_5 conv5 conv5
torchvision/mnasnet0_5 layers layers
torchvision/vit_b_32 encoder encoder
torchvision/swin_t permute avgpool
torchvision/alexnet avgpool classifier.1
torchvision/convnext_tiny features avgpool
torchvision/regnet_x_400mf trunk_output avgpool
torchvision/efficientnet_b0 features avgpool
torchvision/googlenet inception5b avgpool
torchvision/densenet121 features features
"""


@pytest.mark.filterwarnings("ignore")  # of what networks are built with
@pytest.mark.parametrize("line", LAYERS.strip().splitlines(), ids=lambda line: line.split()[0])
def test_what_feeds_the_head_is_read(line) -> None:
    model, pixel, instance, *side = line.split()
    size = (int(side[0]) if side else 128,) * 2
    net = build_backbone(model, image_size=size)
    assert default_layers(FeatureInfo(net, 3, size)) == (pixel, instance)


TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "intermediate_size": 64,
    "image_size": 112,
    "patch_size": 16,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": 128}
PYRAMID = STAGES | {"num_attention_heads": [1, 1, 2, 2], "image_size": 128}
QUERIES = {
    "backbone_config": STAGES | {"model_type": "resnet", "embedding_size": 8},
    "d_model": 32,
    "num_queries": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
# Networks of transformers, made small: pixel layer, instance layer, what builds them.
TRANSFORMERS = {
    "resnet": ("encoder", "pooler", STAGES | {"embedding_size": 8}),
    "regnet": ("encoder", "pooler", STAGES | {"embedding_size": 8, "groups_width": 8}),
    "bit": ("norm", "pooler", STAGES | {"embedding_size": 8, "num_groups": 4}),
    "convnext": ("encoder", "layernorm", STAGES),
    "convnextv2": ("encoder", "layernorm", STAGES),
    "dinov3_convnext": ("layer_norm", "layer_norm", STAGES),
    "poolformer": ("encoder", "encoder", STAGES),
    "focalnet": ("layernorm", "pooler", STAGES | {"embed_dim": 8, "image_size": 128}),
    "efficientnet": ("encoder", "pooler", {"width_coefficient": 0.25, "hidden_dim": 320}),
    "mobilenet_v1": ("layer.25", "pooler", {"depth_multiplier": 0.25}),
    "mobilenet_v2": ("conv_1x1", "pooler", {"depth_multiplier": 0.35}),
    "mobilevit": ("conv_1x1_exp", "conv_1x1_exp", {"hidden_sizes": [16, 16, 16]}),
    "pvt": ("encoder", "encoder", PYRAMID),
    "pvt_v2": ("encoder", "encoder", PYRAMID),
    "segformer": ("stages.3", "stages.3", PYRAMID),
    "glpn": ("encoder", "encoder", PYRAMID),
    "swin": ("layernorm", "pooler", WINDOWS | {"window_size": 4}),
    "swinv2": ("layernorm", "pooler", WINDOWS | {"window_size": 4}),
    "hiera": ("encoder", "pooler", WINDOWS | {"image_size": [128, 128]}),
    "vit": ("layernorm", "layernorm", TOKENS),
    "vit_msn": ("layernorm", "layernorm", TOKENS),
    "deit": ("layernorm", "layernorm", TOKENS),
    "beit": ("layernorm", "pooler", TOKENS),
    "data2vec-vision": ("layernorm", "layernorm", TOKENS),
    "ijepa": ("layernorm", "layernorm", TOKENS),
    "dinov2": ("layernorm", "layernorm", TOKENS | {"patch_size": 14}),
    "dinov2_with_registers": ("layernorm", "layernorm", TOKENS),
    "dinov3_vit": ("norm", "norm", TOKENS),
    "clip_vision_model": ("encoder", "post_layernorm", TOKENS),
    "siglip_vision_model": ("post_layernorm", "head", TOKENS),
    "yolos": (*["embeddings.patch_embeddings"] * 2, TOKENS | {"image_size": [128, 128]}),
    "detr": ("encoder", "encoder", QUERIES),
    "vitdet": ("encoder", "encoder", TOKENS | {"pretrain_image_size": 112}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_what_transformers_calls_the_last_hidden_state_is_read(family) -> None:
    """The pooled vector, too, but of no pooler with a dense layer: few checkpoints have one.

    Tokens of a detector that lie in no place are not: those behind the cells of YOLOS, and queries.
    """
    pixel, instance, settings = TRANSFORMERS[family]
    net = AutoModel.from_config(AutoConfig.for_model(family, **settings))
    side = 112 if settings.get("image_size") == 112 else 128
    assert default_layers(FeatureInfo(net, 3, (side, side))) == (pixel, instance)


class TwoHeads(nn.Module):
    """Pooled features, scores of two heads, and scores for each cell that are pooled at the end."""

    num_classes = 40

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 16, 8, 8)
        self.one, self.two = nn.Linear(16, 40), nn.Linear(16, 40)
        self.cells, self.pool = nn.Conv2d(16, 40, 1), nn.AdaptiveAvgPool2d(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.body(images)
        vector = x.mean((2, 3))
        pooled = self.pool(self.cells(x)).flatten(1)
        return self.one(vector) + self.two(vector) + pooled


def test_widening_scores_are_no_features_nor_is_what_pools_them() -> None:
    net = TwoHeads()
    info = FeatureInfo(net, 3, (64, 64))
    assert default_layers(info) == ("body", "body")
    scores = {layer.name for layer in info.layers if layer.is_scores}
    assert scores == {"one", "two", "cells", "pool"}
    net.num_classes = 10  # of other layers
    assert default_layers(FeatureInfo(net, 3, (64, 64)))[1] == "pool"
