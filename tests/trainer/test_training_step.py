"""The schedules, and the recipes that set them, against the authors' formulas."""

from math import cos, pi

import pytest

from pixel_level_contrastive_learning.trainer.auto import Facts, clock_of, decided, peak_lr
from pixel_level_contrastive_learning.trainer.config import RECIPES
from pixel_level_contrastive_learning.trainer.config_io import configured, settings_of
from pixel_level_contrastive_learning.trainer.training_step import LearningRate, TargetMomentum

IMAGENET = Facts(
    images=1_281_167,
    typical_size=(375, 500),
    channels=3,
    device="cuda",
    native_bfloat16=True,
    processes=8,
    cores=12,
)


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
    config = decided(configured(settings_of({"recipe": recipe})), IMAGENET)
    clock = clock_of(config, IMAGENET.images)
    assert (clock.steps_per_epoch, clock.steps) == (1251, 1251 * epochs)
    rate = LearningRate(peak_lr(config), clock.steps, clock.warmup, config.final_lr)
    momentum = TargetMomentum(config.target_momentum, clock.steps)
    for step in range(0, clock.steps, 97 if epochs == 100 else 397):
        expected = authors_learning_rate(step, epochs, 1251, 1024)
        assert rate(step) == pytest.approx(expected, rel=1e-9)
        assert momentum(step) == pytest.approx(authors_momentum(step + 1, clock.steps), rel=1e-12)
    assert rate(0) == pytest.approx(0.04)
    assert rate(5 * 1251) == 4.0
    assert momentum(clock.steps - 1) == 1.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_the_authors_figures(recipe) -> None:
    config = configured(settings_of({"recipe": recipe}))
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
    config = configured(settings_of({"recipe": "pixpro-100ep", "batch_size": 64}))
    assert peak_lr(decided(config, IMAGENET)) == pytest.approx(0.25)


def test_warm_up_of_no_steps_begins_at_the_peak() -> None:
    assert LearningRate(2.0, 10, 0, 0.0)(0) == 2.0


def test_warm_up_rises_by_equal_steps_from_a_hundredth() -> None:
    rate = LearningRate(1.0, 20, 4, 0.0)
    assert [rate(s) for s in range(5)] == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1.0])
    assert rate(12) == pytest.approx(0.5)  # half way down the cosine
