"""What `auto` comes to."""

from dataclasses import replace

import pytest

from pixel_level_contrastive_learning.trainer.auto import (
    Facts,
    base_lr,
    clock_of,
    decided,
    epochs,
    peak_lr,
    view_side,
    workers,
)
from pixel_level_contrastive_learning.trainer.config import PretrainConfig

LAPTOP = Facts(
    images=1000,
    typical_size=(480, 640),
    channels=3,
    device="cpu",
    native_bfloat16=False,
    processes=1,
    cores=2,
)


@pytest.mark.parametrize(
    ("size", "side"),
    [((480, 640), 224), ((224, 9000), 224), ((200, 300), 192), ((64, 40), 64), ((1, 10000), 64)],
)
def test_view_side_is_what_small_images_allow(size, side) -> None:
    assert view_side(size) == side


@pytest.mark.parametrize(
    ("images", "passes"),
    [(10, 1000), (1000, 300), (3000, 100), (1_281_167, 99), (12_800_000, 10), (10**9, 1)],
)
def test_few_images_are_seen_more_often(images, passes) -> None:
    assert epochs(images) == passes


def test_everything_is_decided() -> None:
    config = decided(PretrainConfig(), LAPTOP)
    left = {name for name, value in vars(config).items() if value == "auto"}
    by_network = {"lr", "pixel_layer", "instance_layer"}
    assert left == by_network | {"accumulate", "workers", "devices", "accelerator", "strategy"}
    assert (config.batch_size, config.precision, config.image_size) == (32, "float32", 224)


def test_blur_is_a_share_of_the_view() -> None:
    def blur(**given: object) -> tuple[float, float]:
        return decided(PretrainConfig(**given), LAPTOP).blur_sigma

    assert blur(image_size=224) == (0.1, 2.0)
    assert blur(image_size=(112, 448)) == (0.05, 1.0)
    assert blur(image_size=112, blur_sigma=(0.3, 0.4)) == (0.3, 0.4)


def test_deciding_twice_changes_nothing() -> None:
    config = decided(PretrainConfig(), LAPTOP)
    assert decided(config, LAPTOP) == config


def test_checkpoints_are_an_epoch_apart_or_far_apart_on_a_gpu() -> None:
    def every(images: int, **facts: str) -> object:
        return decided(PretrainConfig(), replace(LAPTOP, images=images, **facts)).checkpoint_every

    assert [every(images) for images in (320, 12800, 10**6)] == [100, 400, 1000]
    assert every(320, device="cuda") == 1000  # where a step may take a twentieth of a second


def test_looks_at_the_network_take_little_of_any_run() -> None:
    def every(steps: int, batch: int, **facts: int) -> object:
        given = PretrainConfig(steps=steps, batch_size=batch)
        return decided(given, replace(LAPTOP, **facts)).picture_every

    assert every(10_000, 24) == 1000
    for batch, processes in ((8, 1), (24, 1), (24, 3), (256, 1)):
        each = batch // processes
        for steps in (1000, 2000):
            between = every(steps, batch, processes=processes)
            # A look is 128 views forward, a step of each image six forward passes and two more.
            assert 128 / (8 * each) < 0.02 * between
    assert every(1000, 8) == 134


def test_bfloat16_is_taken_where_it_is_native_and_names_of_lightning_are_understood() -> None:
    native = replace(LAPTOP, native_bfloat16=True)
    assert decided(PretrainConfig(), native).precision == "bfloat16"
    assert decided(PretrainConfig(precision="32-true"), native).precision == "float32"
    assert decided(PretrainConfig(precision="bf16"), LAPTOP).precision == "bfloat16"


def test_learning_rate_grows_with_the_batch() -> None:
    def peak(optimizer: str, batch: int) -> float:
        return peak_lr(
            decided(PretrainConfig(optimizer=optimizer, lr=1.0, batch_size=batch), LAPTOP)
        )

    assert [peak("sgd", b) for b in (64, 256, 1024)] == [0.25, 1.0, 4.0]
    assert [peak("adamw", b) for b in (64, 256, 1024)] == [0.5, 1.0, 2.0]


def test_adam_is_given_less_where_no_batch_norm_bears_it() -> None:
    for name in ("adamw", "adam"):
        assert 0 < base_lr(name, batch_norm=False) < base_lr(name)
    assert base_lr("lars", batch_norm=False) == base_lr("lars")


def test_an_optimiser_without_known_learning_rate_asks_for_one() -> None:
    with pytest.raises(ValueError, match="for which no learning rate is known"):
        base_lr("rprop")


def test_a_batch_is_no_larger_than_the_images_and_divides_among_processes() -> None:
    assert decided(PretrainConfig(), replace(LAPTOP, images=20)).batch_size == 16
    assert decided(PretrainConfig(), replace(LAPTOP, processes=3)).batch_size == 33
    with pytest.raises(ValueError, match="give a multiple of 3, such as 12"):
        decided(PretrainConfig(batch_size=10), replace(LAPTOP, processes=3))


def test_clock_counts_whole_batches_and_a_tenth_is_warm_up() -> None:
    clock = clock_of(decided(PretrainConfig(epochs=10, batch_size=30), LAPTOP), 1000)
    assert (clock.steps_per_epoch, clock.steps, clock.warmup) == (33, 330, 33)
    few = replace(LAPTOP, images=7)
    clock = clock_of(decided(PretrainConfig(steps=40, batch_size=30), few), 7)
    assert (clock.steps_per_epoch, clock.steps, clock.warmup) == (1, 40, 4)


def test_workers_leave_cores_to_a_cpu_that_trains() -> None:
    config = PretrainConfig()
    assert workers(config, LAPTOP) == 1
    assert workers(config, replace(LAPTOP, cores=16)) == 4
    assert workers(config, replace(LAPTOP, device="cuda", cores=64)) == 16
    assert workers(PretrainConfig(workers=0), LAPTOP) == 0
