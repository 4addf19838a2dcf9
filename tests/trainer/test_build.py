"""From settings to parts: the weights a run starts from, and how it begins."""

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from run_folders import config, equal, log, losses
from torchvision.models import resnet18

from pixel_level_contrastive_learning import PixelCL, pretrain
from pixel_level_contrastive_learning.backbones.custom import handing_over
from pixel_level_contrastive_learning.backbones.factory import build_backbone, zero_last_norms
from pixel_level_contrastive_learning.data.cache import DecodedCache
from pixel_level_contrastive_learning.data.sources import open_source, split_held_out
from pixel_level_contrastive_learning.data.statistics import measure
from pixel_level_contrastive_learning.trainer import system
from pixel_level_contrastive_learning.trainer.auto import resolve
from pixel_level_contrastive_learning.trainer.build import (
    TrainingData,
    build_card,
    build_learner,
    build_net,
    find_info,
    kept_decoded,
    open_data,
)
from pixel_level_contrastive_learning.trainer.config import PretrainConfig
from pixel_level_contrastive_learning.trainer.system import Devices


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, "random"),
        ({"zero_init_residual": True}, "zero-init residual"),
        ({"weights": "pretrained"}, "pretrained"),
        ({"weights": "pretrained", "zero_init_residual": True}, "pretrained"),
        ({"model": resnet18(), "zero_init_residual": True}, "as handed over"),
    ],
)
def test_a_card_says_what_a_run_started_from(settings, start) -> None:
    source = open_source([torch.rand(3, 8, 8)] * 4)
    data = TrainingData(source, source, measure(source))
    with handing_over(settings.get("model")) as model_name:
        model = {"model": model_name or "torchvision/resnet18", "image_size": 64}
        config = PretrainConfig(**settings | model)
        net = build_net(config, (64, 64), 3, load=False)
        learner = build_learner(config, net, (64, 64), 3)
        plan = resolve(config, find_info(config, data, Devices("cpu", 1, 1), learner))
        assert build_card(plan, data.statistics).start == start


def test_a_network_handed_over_keeps_its_weights_and_is_trained_in_train_mode() -> None:
    model = resnet18().eval()
    with handing_over(model) as model_name:
        config = PretrainConfig(model=model_name, zero_init_residual=True)
        net = build_net(config, (64, 64), 3, load=True)
    assert equal(net.state_dict(), model.state_dict())
    assert all(module.training for module in net.modules())
    assert not model.training


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("model", "norm", "count"), [("18", "bn2", 8), ("50", "bn3", 16)])
def test_blocks_begin_as_identities_where_asked(library, model, norm, count) -> None:
    def shut(**settings: object) -> list[str]:
        config = PretrainConfig(model=f"{library}/resnet{model}", **settings)
        net = build_net(config, (64, 64), 3, load=True)
        return [name for name, p in net.named_parameters() if "weight" in name and not p.any()]

    assert shut() == []
    names = shut(zero_init_residual=True)
    assert len(names) == count
    assert all(name.endswith(f".{norm}.weight") for name in names)


def test_a_network_without_residual_norms_has_none_to_shut() -> None:
    assert not zero_last_norms(build_backbone("timm/convnext_atto"))


@pytest.mark.parametrize(
    ("model", "norms"), [("torchvision/resnet18", True), ("timm/convnext_atto", False)]
)
def test_the_network_decides_layers_and_whether_it_has_batch_norm(model, norms) -> None:
    learner = PixelCL(build_backbone(model), image_size=64, projection_hidden_size=16)
    data = open_data([torch.zeros(3, 8, 8)] * 4, PretrainConfig(), None)
    info = find_info(PretrainConfig(), data, Devices("cpu", 1, 1), learner)
    assert info.batch_norm is norms
    assert info.pixel_layer == learner.online_encoder.pixel_layer


@pytest.mark.parametrize(("by_srun", "cores"), [(True, 16), (False, 2)])
def test_a_process_of_srun_has_cores_of_its_own(monkeypatch, by_srun, cores) -> None:
    monkeypatch.setattr(system, "cores", lambda: 16)
    monkeypatch.setattr(SLURMEnvironment, "detect", lambda: by_srun)
    assert system.cores_per_process(Devices("cpu", 8, 4)) == cores


def test_a_run_decodes_its_images_once_and_learns_the_same(tmp_path, settings, images) -> None:
    options = settings(steps=9, probe=None)
    uncached = pretrain(**options | {"out": str(tmp_path / "plain"), "cache": "off"})
    cached = pretrain(**options | {"cache": "ram"})
    assert losses(uncached.run_dir) == losses(cached.run_dir)
    assert "of decoded images stay in memory" in log(cached.run_dir)
    assert "of decoded images stay in memory" not in log(uncached.run_dir)


def test_images_in_memory_are_not_kept_twice(images, settings, run) -> None:
    files, items = open_source(str(images)), open_source([torch.rand(3, 20, 20)])
    plan = SimpleNamespace(cache_bytes=1000, workers=0)
    (on_disk, _), (in_memory, _) = (split_held_out(source) for source in (files, items))
    assert isinstance(kept_decoded(on_disk, plan), DecodedCache)
    assert kept_decoded(in_memory, plan) is in_memory
    plan.cache_bytes = 0
    assert kept_decoded(on_disk, plan) is on_disk
    options = settings(steps=3, cache="ram")
    del options["data"]
    pretrain([torch.rand(3, 40, 40)] * 8, **options)
    assert "of decoded images stay in memory" not in log(run)


def test_views_are_cut_to_the_patches_of_the_network(tmp_path, run, settings) -> None:
    (tmp_path / "patches.py").write_text(
        "from torch import nn\n\n\n"
        "def net(image_size=None):\n"
        "    assert image_size in ((64, 64), (56, 56))\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 14, 14), nn.BatchNorm2d(8), nn.ReLU())\n"
    )
    options = settings(model=f"{tmp_path / 'patches.py'}:net", image_size="auto", steps=1)
    pretrain(**options)
    assert config(run)["image_size"] == 56
    assert config(run)["chosen"]["image_size"] == 56
    with pytest.raises(ValueError, match=r"patches of 14x14 pixels, .* give 56x56 or 70x70"):
        pretrain(**options | {"image_size": 64, "overwrite": True})
