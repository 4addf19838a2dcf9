"""What `auto` comes to, and the schedules, against the authors' formulas."""

from dataclasses import replace
from math import cos, pi

import pytest
from timm.optim import get_optimizer_info, list_optimizers

from pixel_level_contrastive_learning.trainer.auto import (
    Info,
    RunPlan,
    Schedule,
    cache_bytes,
    default_epochs,
    resolve,
    view_size,
)
from pixel_level_contrastive_learning.trainer.config import RECIPES, PretrainConfig
from pixel_level_contrastive_learning.trainer.config_io import settings_of, to_config

LAPTOP = Info(
    images=1000,
    typical_size=(480, 640),
    channels=3,
    value_bytes=1,
    free_memory=8 * 2**30,
    device="cpu",
    native_bfloat16=False,
    processes=1,
    cores=2,
    batch_norm=True,
    given_weights=False,
    pixel_layer="layer4",
    instance_layer="avgpool",
)
GIVEN = {"given_weights": True}
IMAGENET = replace(
    LAPTOP,
    images=1_281_167,
    typical_size=(375, 500),
    device="cuda",
    native_bfloat16=True,
    processes=8,
    cores=12,
)


def planned(info: Info = LAPTOP, **settings: object) -> RunPlan:
    return resolve(PretrainConfig(**settings), info)


@pytest.mark.parametrize(
    ("size", "side"),
    [((480, 640), 224), ((224, 9000), 224), ((200, 300), 192), ((64, 40), 64), ((1, 10000), 64)],
)
def test_views_are_as_large_as_small_images_allow(size, side) -> None:
    assert view_size(PretrainConfig(), size) == (side, side)


def test_views_are_as_large_as_patches_allow() -> None:
    assert view_size(PretrainConfig(), (200, 300), (14, 16)) == (182, 192)
    assert view_size(PretrainConfig(image_size=64), (200, 300), (14, 14)) == (64, 64)  # refused
    plan = planned(replace(LAPTOP, typical_size=(200, 300), patch=(14, 16)))
    assert plan.view_size == plan.settings.image_size == (182, 192)
    plan = planned(replace(LAPTOP, typical_size=(100, 100), patch=(14, 14)))
    assert (plan.view_size, plan.settings.image_size) == ((84, 84), 84)


@pytest.mark.parametrize(
    ("images", "passes"),
    [(10, 1000), (1000, 300), (3000, 100), (1_281_167, 99), (12_800_000, 10), (10**9, 1)],
)
def test_few_images_are_seen_more_often(images, passes) -> None:
    assert default_epochs(images) == passes


def test_the_settings_written_down_leave_auto_to_the_system_alone() -> None:
    plan = planned()
    names = {name for name, value in vars(plan.settings).items() if value == "auto"}
    assert names == {"accumulate", "workers", "devices", "accelerator", "strategy", "cache"}
    assert (plan.batch_size, plan.precision, plan.view_size) == (32, "float32", (224, 224))
    assert (plan.settings.image_size, plan.settings.pixel_layer) == (224, "layer4")
    assert {"lr", "epochs", "blur_sigma"} <= set(plan.chosen)
    assert not {"model", "accumulate"} & set(plan.chosen)
    assert resolve(plan.settings, LAPTOP) == replace(plan, chosen=())


@pytest.mark.parametrize(
    ("info", "settings", "path", "comes_to"),
    [
        # Blur is a share of the view.
        ({}, {"image_size": 224}, "photometry.1.sigma", (0.1, 2.0)),
        ({}, {"image_size": (112, 448)}, "photometry.1.sigma", (0.05, 1.0)),
        ({}, {"image_size": 112, "blur_sigma": (0.3, 0.4)}, "photometry.1.sigma", (0.3, 0.4)),
        # Checkpoints are an epoch apart, or far apart on a GPU, where a step may take little.
        ({"images": 320}, {}, "checkpoint_every", 100),
        ({"images": 12800}, {}, "checkpoint_every", 400),
        ({"images": 10**6}, {}, "checkpoint_every", 1000),
        ({"images": 320, "device": "cuda"}, {}, "checkpoint_every", 1000),
        # Probes come ten times in a run, or never.
        ({}, {"steps": 1000}, "probe_every", 0),
        ({}, {"steps": 1000, "probe": "masks"}, "probe_every", 93),  # three epochs of 31 steps
        ({"processes": 2}, {"probe": "m", "strategy": "fsdp", "batch_size": 8}, "probe_every", 0),
        # bfloat16 is used where it is native, and names of Lightning are understood.
        ({"native_bfloat16": True}, {}, "precision", "bfloat16"),
        ({"native_bfloat16": True}, {"image_size": 32}, "precision", "bfloat16"),
        ({"native_bfloat16": True}, {"image_size": (16, 64)}, "precision", "float32"),
        ({"native_bfloat16": True, "device": "cuda"}, {"image_size": 8}, "precision", "bfloat16"),
        ({"native_bfloat16": True}, {"precision": "32-true"}, "precision", "float32"),
        ({}, {"precision": "bf16"}, "precision", "bfloat16"),
        # The learning rate grows with the batch: in proportion, or with the square root.
        ({}, {"optimizer": "sgd", "lr": 1.0, "batch_size": 64}, "schedule.peak_lr", 0.25),
        ({}, {"optimizer": "sgd", "lr": 1.0, "batch_size": 1024}, "schedule.peak_lr", 4.0),
        ({}, {"optimizer": "adamw", "lr": 1.0, "batch_size": 64}, "schedule.peak_lr", 0.5),
        ({}, {"optimizer": "adamw", "lr": 1.0, "batch_size": 1024}, "schedule.peak_lr", 2.0),
        # Adam's is smaller without batch norm and from start weights; no other's is.
        ({}, {"optimizer": "adam"}, "settings.lr", 2e-3),
        ({"batch_norm": False}, {"optimizer": "adam"}, "settings.lr", 1e-3),
        (GIVEN, {"optimizer": "adamw"}, "settings.lr", 1e-3),
        (GIVEN, {"optimizer": "adamw", "lr": 0.3}, "settings.lr", 0.3),
        ({"batch_norm": False}, {"optimizer": "lars"}, "settings.lr", 1.0),
        (GIVEN, {"optimizer": "sgd"}, "settings.lr", 0.1),
        ({}, {"optimizer": "rprop", "lr": 0.1}, "settings.lr", 0.1),
        # A batch is no larger than the images, and divides among processes.
        ({"images": 20}, {}, "batch_size", 16),
        ({"processes": 3}, {}, "batch_size", 33),
        ({}, {"batch_size": 1, "instance_weight": 0.0}, "batch_size", 1),
    ],
)
def test_what_settings_come_to(info, settings, path, comes_to) -> None:
    value: object = planned(replace(LAPTOP, **info), **settings)
    for name in path.split("."):
        value = value[int(name)] if name.isdecimal() else getattr(value, name)
    assert value == comes_to


@pytest.mark.parametrize(
    ("processes", "settings", "message"),
    [
        (1, {"optimizer": "rprop"}, "which has no default learning rate; set lr"),
        (1, {"lr": 0.1, "batch_size": 64, "final_lr": 0.06}, "0.06, above the peak .* 0.05"),
        (3, {"batch_size": 10}, "give a multiple of 3, such as 12"),
        (2, {"batch_size": 2}, "batch norm needs more than one image; give 4 or"),
    ],
)
def test_what_comes_to_nothing_is_refused(processes, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        planned(replace(LAPTOP, processes=processes), **settings)


def test_the_learning_rate_of_sgd_and_lars_alone_grows_in_proportion() -> None:
    classes = {name: str(get_optimizer_info(name).opt_class) for name in list_optimizers()}
    assert {"fusedadamw", "nmuon", "csgdw", "nlars"} <= set(classes)
    for name, class_name in classes.items():
        peak = planned(optimizer=name, lr=1.0, batch_size=1024).schedule.peak_lr
        assert peak == (4.0 if "SGD" in class_name or "Lars" in class_name else 2.0), name


def test_pictures_take_little_of_any_run() -> None:
    def every(steps: int, batch: int, processes: int = 1) -> int:
        info = replace(LAPTOP, processes=processes)
        return planned(info, steps=steps, batch_size=batch).picture_every

    assert every(10_000, 24) == 1000
    for batch, processes in ((8, 1), (24, 1), (24, 3), (256, 1)):
        for steps in (1000, 2000):
            # Pictures are 128 views forward, a step of an image six forward passes and two more.
            assert 128 / (8 * batch / processes) < 0.02 * every(steps, batch, processes)
    assert every(1000, 8) == 134


def test_a_run_counts_whole_batches_and_a_tenth_is_warm_up() -> None:
    schedule = planned(epochs=10, batch_size=30).schedule
    assert (schedule.steps_per_epoch, schedule.steps, schedule.warmup_steps) == (33, 330, 33)
    schedule = planned(replace(LAPTOP, images=7), steps=40, batch_size=30).schedule
    assert (schedule.steps_per_epoch, schedule.steps, schedule.warmup_steps) == (1, 40, 4)


def test_workers_leave_cores_to_a_cpu_that_trains() -> None:
    assert planned().workers == 1
    assert planned(replace(LAPTOP, cores=16)).workers == 4
    assert planned(replace(LAPTOP, device="cuda", cores=64)).workers == 16
    assert planned(workers=0).workers == 0


def authors_learning_rate(step: int, epochs: int, per_epoch: int, batch: int) -> float:
    """As in the authors' scripts: warm-up of 5 epochs from a hundredth, then a cosine to 1e-6."""
    base, warmup = 1.0 * batch / 256, 5 * per_epoch
    if step <= warmup:
        return base / 100 * ((100 - 1) * step / warmup + 1)
    share = (step - warmup) / ((epochs - 5) * per_epoch)
    return 1e-6 + (base - 1e-6) * (1 + cos(pi * share)) / 2


def authors_momentum(k: int, total: int) -> float:
    return 1 - (1 - 0.99) * (cos(pi * k / total) + 1) / 2


@pytest.mark.parametrize(("recipe", "epochs"), [("pixpro-100ep", 100), ("pixpro-400ep", 400)])
def test_recipe_is_the_authors_at_every_step(recipe, epochs) -> None:
    schedule = resolve(to_config(settings_of({"recipe": recipe})), IMAGENET).schedule
    steps = schedule.steps
    assert (schedule.steps_per_epoch, steps) == (1251, 1251 * epochs)
    for step in range(0, steps, 97 if epochs == 100 else 397):
        expected = authors_learning_rate(step, epochs, 1251, 1024)
        assert schedule.lr(step) == pytest.approx(expected, rel=1e-9)
        assert schedule.momentum(step) == pytest.approx(
            authors_momentum(step + 1, steps), rel=1e-12
        )
    assert schedule.lr(0) == pytest.approx(0.04)
    assert schedule.lr(5 * 1251) == 4.0
    assert schedule.momentum(steps - 1) == 1.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_the_authors_figures(recipe) -> None:
    config = to_config(settings_of({"recipe": recipe}))
    assert (config.batch_size, config.image_size) == (1024, 224)
    assert (config.optimizer, config.weight_decay, config.lr) == ("lars", 1e-5, 1.0)
    assert (config.crop_area, config.prob_hflip) == ((0.08, 1.0), 0.5)
    assert config.aspect_ratio == (0.75, pytest.approx(1.3333333))
    assert (config.jitter, config.prob_jitter) == ((0.4, 0.4, 0.2, 0.1), 0.8)
    assert (config.prob_gray, config.prob_blur, config.blur_sigma) == (0.2, (1.0, 0.1), (0.1, 2.0))
    assert config.prob_solarise == (0.0, 0.2)
    assert (config.distance_thres, config.ppm_gamma, config.ppm_num_layers) == (0.7, 2.0, 1)
    assert (config.loss, config.instance_weight, config.zero_init_residual) == ("pixpro", 0.0, True)
    assert (config.projection_size, config.projection_hidden_size) == (256, 4096)


def test_a_recipes_learning_rate_grows_with_the_batch_in_proportion() -> None:
    config = to_config(settings_of({"recipe": "pixpro-100ep", "batch_size": 64}))
    assert resolve(config, IMAGENET).schedule.peak_lr == pytest.approx(0.25)


def test_warm_up_of_no_steps_begins_at_the_peak() -> None:
    assert Schedule(10, 1, 0, 2.0, 0.0, 0.99).lr(0) == 2.0


def test_warm_up_rises_by_equal_steps_from_a_hundredth() -> None:
    schedule = Schedule(20, 1, 4, 1.0, 0.0, 0.99)
    rates = [schedule.lr(step) for step in range(5)]
    assert rates == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1.0])
    assert schedule.lr(12) == pytest.approx(0.5)  # half way down the cosine


MIB = 2**20


@pytest.mark.parametrize(
    ("cache", "change", "passes", "mebibytes"),
    [
        ("auto", {}, 10, 1143),  # 1000 images of 480 x 640 x 3, and three tenths
        ("auto", {"value_bytes": 4}, 10, 0),  # more than a quarter of 8 GiB
        ("ram", {"value_bytes": 4}, 10, 4096),
        ("auto", {}, 1, 0),
        ("ram", {}, 1, 1143),
        ("off", {}, 10, 0),
        ("auto", {"channels": 1}, 10, 381),
    ],
)
def test_decoded_images_are_kept_where_they_fit(cache, change, passes, mebibytes) -> None:
    info = replace(LAPTOP, **change)
    assert round(cache_bytes(cache, info, passes=passes) / MIB) == mebibytes
