"""Runs on a network and on weights from the Hub."""

import shutil

import pytest
import torch
from fake_hub import serving
from transformers import AutoConfig, AutoModel

from pixel_level_contrastive_learning import evaluate, load_backbone, pretrain
from pixel_level_contrastive_learning.backbones.hub import hub_config


@pytest.mark.parametrize("weights", ["pretrained", "hf://me/net", None])
def test_a_run_needs_the_hub_only_to_start(
    tmp_path, settings, images, monkeypatch, weights
) -> None:
    torch.manual_seed(5)  # other weights than the run would draw
    net = AutoModel.from_config(
        AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    )
    with serving(tmp_path / "hub", monkeypatch) as hub:
        net.save_pretrained(hub / "me/net")
        options = settings(model="hf://me/net", weights=weights, lr=1e-6, final_lr=0.0, steps=4)
        result = pretrain(**options)
        shutil.rmtree(hub / "me")
        shutil.rmtree(tmp_path / "cache")
        hub_config.cache_clear()
        stem = "embedder.embedder.convolution.weight"
        learned, start = result.backbone.state_dict()[stem], net.state_dict()[stem]
        assert torch.allclose(learned, start, atol=1e-4) is (weights is not None)
        assert torch.equal(load_backbone(result.run_dir).state_dict()[stem], learned)
        (result.run_dir / "checkpoints/step-00000004.ckpt").unlink()
        (result.run_dir / "checkpoints/last.ckpt").unlink()
        monkeypatch.setenv("HOME", str(tmp_path))
        resumed = pretrain(out="~/run", data=images, resume=True).backbone
        assert torch.equal(resumed.state_dict()[stem], learned)
        rows = evaluate(result.run_dir, images=images).rows
    assert [row.name for row in rows] == ["random weights", str(result.run_dir)]
