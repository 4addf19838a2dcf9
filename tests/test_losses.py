"""What the pixel and the instance losses measure, and what they never do."""

import math
import re
from collections.abc import Callable

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from probe import kept_elements
from torch import Tensor

from pixel_level_contrastive_learning import blocks, losses
from pixel_level_contrastive_learning.geometry import Positives, PositiveTable, positive_mask
from pixel_level_contrastive_learning.losses import (
    instance_loss,
    pixcontrast_loss,
    pixpro,
    pixpro_loss,
    unit,
)

PixelLoss = Callable[..., Tensor]

EYE = torch.eye(2)[None]
"""Two orthogonal pixels of one image, ``(1, 2, 2)``."""


def pixcontrast(online: Tensor, target: Tensor, positives: Positives | Tensor) -> Tensor:
    """PixContrast at the temperature of the authors."""
    return pixcontrast_loss(online, target, positives, 0.3)


def slow_pixcontrast(online: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The loops of PixContrast at the same temperature."""
    return reference.pixcontrast_loss(online, target, mask, 0.3)


def plain_pixcontrast(online: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The plain form of PixContrast at the same temperature."""
    return reference.plain_pixcontrast_loss(online, target, mask, 0.3)


def instances(online: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The instance loss of pixels ``(b, d, n)`` as if each were an image; the mask has no say."""
    return instance_loss(*(pixels.mT.flatten(0, 1) for pixels in (online, target)))


both_losses = pytest.mark.parametrize("loss", [pixpro_loss, pixcontrast])
all_losses = pytest.mark.parametrize("loss", [pixpro_loss, pixcontrast, instances])
halves_and_full = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str
)
loss_and_loops = pytest.mark.parametrize(
    ("loss", "loops"),
    [(pixpro_loss, reference.pixpro_loss), (pixcontrast, slow_pixcontrast)],
)
loss_and_plain = pytest.mark.parametrize(
    ("loss", "plain"),
    [(pixpro_loss, reference.plain_pixpro_loss), (pixcontrast, plain_pixcontrast)],
)
dtypes = pytest.mark.parametrize("dtype", reference.TOLERANCE, ids=str)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def scattered(*shape: int, share: float, seed: int = 0) -> Tensor:
    """A bool mask of which about ``share`` is True."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def two_crops(grid_one: tuple[int, int], grid_two: tuple[int, int], images: int = 2) -> tuple:
    """The arguments of ``Positives`` for overlapping crops of images, each turned differently."""
    one = [reference.view_map((300, 400), 0.7, x=0.2 * k) for k in range(images)]
    two = [reference.view_map((300, 400), 0.6, mirrored=True, degrees=9 * k) for k in range(images)]
    return torch.stack(one), torch.stack(two), grid_one, grid_two, 0.7


@st.composite
def features(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Online and target features, float64, and which of their pixels match."""
    b, d = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    n_one, n_two = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**31))
    share = draw(st.sampled_from([0.05, 0.3, 1.0]))
    online = noise(b, d, n_one, seed=seed, dtype=torch.float64)
    target = noise(b, d, n_two, seed=seed + 1, dtype=torch.float64)
    return online, target, scattered(b, n_one, n_two, share=share, seed=seed)


# Conventions, by hand.


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[1, 0], [0, 1]], 0),
        ([[0, 1], [1, 0]], 2),
        ([[1, 1], [1, 1]], 1),
        ([[1, 1], [0, 1]], 2 - 2 * 2 / 3),
        ([[0, 0], [0, 0]], 0),
    ],
    ids=["alike", "orthogonal", "half of each", "mean over pairs, not pixels", "no pairs"],
)
def test_convention_pixpro_is_two_minus_twice_the_mean_cosine(mask, expected) -> None:
    loss = pixpro_loss(EYE, EYE, torch.tensor([mask]).bool())
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_convention_opposite_pixels_cost_four() -> None:
    assert pixpro_loss(EYE, -EYE, torch.eye(2).bool()[None]).item() == pytest.approx(4)
    assert instance_loss(EYE[0], -EYE[0]).item() == pytest.approx(4)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[1, 0], [0, 1]], lambda t: math.log(1 + math.exp(-1 / t))),
        ([[0, 1], [1, 0]], lambda t: math.log(1 + math.exp(1 / t))),
        ([[1, 1], [1, 1]], lambda t: 0.0),
        ([[1, 1], [1, 0]], lambda t: math.log(1 + math.exp(1 / t)) / 2),
        ([[1, 0], [0, 0]], lambda t: math.log(1 + math.exp(-1 / t))),
        ([[0, 0], [0, 0]], lambda t: 0.0),
    ],
    ids=["alike", "orthogonal", "all", "mean of logs", "only pixels with a match", "no pairs"],
)
def test_convention_pixcontrast_is_the_papers_second_equation(mask, expected, temperature) -> None:
    loss = pixcontrast_loss(EYE, EYE, torch.tensor([mask]).bool(), temperature)
    assert loss.item() == pytest.approx(expected(temperature), abs=1e-6)


def test_convention_instance_loss_is_the_mean_over_the_batch() -> None:
    prediction = torch.tensor([[3.0, 4], [1, 0], [0, 2]])
    target = torch.tensor([[6.0, 8], [0, 5], [0, -1]])
    assert instance_loss(prediction, target).item() == pytest.approx((0 + 2 + 4) / 3)


# Against the slow loops.


@dtypes
@loss_and_loops
@given(drawn=features())
def test_pixel_losses_agree_with_the_loops(dtype, loss, loops, drawn) -> None:
    online, target, mask = drawn
    online, target = online.to(dtype), target.to(dtype)
    measured = loss(online, target, mask)
    tolerance = reference.TOLERANCE[dtype]
    assert measured.dtype == dtype
    assert measured.shape == ()
    expected = loops(online.double(), target.double(), mask)
    torch.testing.assert_close(measured.double(), expected, rtol=tolerance, atol=tolerance)


@loss_and_loops
@given(drawn=features())
def test_gradients_of_pixel_losses_agree_with_the_loops(loss, loops, drawn) -> None:
    *inputs, mask = drawn
    measured = torch.autograd.grad(loss(*inputs, mask), inputs)
    expected = torch.autograd.grad(loops(*inputs, mask), inputs)
    for one, two in zip(measured, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@dtypes
@given(temperature=st.floats(0.05, 5))
def test_pixcontrast_agrees_with_the_loops_at_any_temperature(dtype, temperature) -> None:
    online, target = noise(2, 3, 4, dtype=dtype), noise(2, 3, 5, seed=1, dtype=dtype)
    mask = scattered(2, 4, 5, share=0.4)
    measured = pixcontrast_loss(online, target, mask, temperature)
    tolerance = reference.TOLERANCE[dtype]
    expected = reference.pixcontrast_loss(online.double(), target.double(), mask, temperature)
    torch.testing.assert_close(measured.double(), expected, rtol=tolerance, atol=tolerance)


@dtypes
@given(b=st.integers(1, 5), d=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_instance_loss_agrees_with_the_loops(dtype, b, d, seed) -> None:
    vectors = noise(b, d, seed=seed, dtype=dtype), noise(b, d, seed=seed + 1, dtype=dtype)
    measured = instance_loss(*vectors)
    tolerance = reference.TOLERANCE[dtype]
    assert measured.dtype == dtype
    assert measured.shape == ()
    expected = reference.instance_loss(*(vector.double() for vector in vectors))
    torch.testing.assert_close(measured.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_low_temperature_does_not_overflow() -> None:
    # exp(1 / 0.001) is beyond float32; the log of the sum is not.
    loss = pixcontrast_loss(EYE, EYE, ~torch.eye(2).bool()[None], 0.001)
    assert loss.item() == pytest.approx(1000)


@loss_and_plain
@pytest.mark.parametrize("entries", [blocks.ENTRIES, 2**17 - 1], ids=["large", "small"])
@pytest.mark.parametrize("table", [False, True], ids=["by rule", "as table"])
@pytest.mark.parametrize(
    ("images", "grid_one", "grid_two"),
    [(5, (24, 24), (20, 30)), (2, (36, 30), (33, 32))],
    ids=["many images", "many cells"],
)
def test_large_maps_agree_with_the_plain_form(
    loss, plain, images, grid_one, grid_two, table, entries, monkeypatch
) -> None:
    monkeypatch.setattr(blocks, "ENTRIES", entries)
    views = two_crops(grid_one, grid_two, images)
    mask = positive_mask(*views)
    _, n_one, n_two = mask.shape
    inputs = (
        noise(images, 8, n_one, dtype=torch.float64),
        noise(images, 8, n_two, seed=1, dtype=torch.float64),
    )
    measured, expected = loss(*inputs, mask if table else Positives(*views)), plain(*inputs, mask)
    torch.testing.assert_close(measured, expected, rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad(result, inputs) for result in (measured, expected))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@all_losses
def test_gradients_agree_with_finite_differences(loss) -> None:
    inputs = noise(2, 3, 4, dtype=torch.float64), noise(2, 3, 4, seed=1, dtype=torch.float64)
    mask = scattered(2, 4, 4, share=0.4)
    assert torch.autograd.gradcheck(lambda *tensors: loss(*tensors, mask), inputs)


def test_pixpro_pulls_as_the_authors_code_does() -> None:
    def authors_loss(online: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Per image ``sum(cos * mask) / (count + 1e-6)``, the mean over the batch, times -2."""
        cosines = torch.bmm(reference.unit(online, 1).mT, reference.unit(target, 1))
        per_image = (cosines * mask).sum(-1).sum(-1) / (mask.sum(-1).sum(-1) + 1e-6)
        return -2 * per_image.mean()

    views = two_crops((7, 7), (5, 9), images=3)
    mask, positives = positive_mask(*views), Positives(*views)
    online_one, target_one = noise(3, 16, 49), noise(3, 16, 49, seed=1)
    online_two, target_two = noise(3, 16, 45, seed=2), noise(3, 16, 45, seed=3)
    total = pixpro_loss(online_one, target_two, positives)
    total = total + pixpro_loss(online_two, target_one, positives.mT)
    authors_total = authors_loss(online_one, target_two, mask)
    authors_total = authors_total + authors_loss(online_two, target_one, mask.mT)
    online = online_one, online_two
    gradients = (torch.autograd.grad(result, online) for result in (total, authors_total))
    for measured, expected in zip(*gradients, strict=True):
        scale = expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-5 * scale)


# What must not change, and what must never happen.


@both_losses
def test_without_pairs_the_loss_is_zero_and_still_connected(loss) -> None:
    inputs = noise(2, 4, 5), noise(2, 4, 6, seed=1)
    result = loss(*inputs, torch.zeros(2, 5, 6, dtype=torch.bool))
    assert result.item() == 0
    result.backward()
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@all_losses
def test_a_good_prediction_costs_less_than_a_bad_one(loss) -> None:
    target, mask = noise(2, 8, 6), torch.eye(6).bool().expand(2, 6, 6)
    good = target + 0.1 * noise(2, 8, 6, seed=1)
    bad = target + 3 * noise(2, 8, 6, seed=1)
    assert loss(good, target, mask) < loss(bad, target, mask) < loss(-target, target, mask)


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_never_leads_out_of_zero_to_four(sign) -> None:
    for seed in range(300):
        x = noise(1, 2 + seed % 7, 3, seed=seed)
        mask = torch.eye(3).bool()[None]
        assert 0 <= pixpro_loss(sign * x, x, mask) <= 4
        assert 0 <= instance_loss(sign * x.mT[0], x.mT[0]) <= 4
        assert pixcontrast_loss(sign * x, x, torch.ones_like(mask), 0.3) >= 0


@all_losses
def test_only_directions_matter(loss) -> None:
    online, target = noise(2, 4, 6), noise(2, 4, 6, seed=1)
    mask = scattered(2, 6, 6, share=0.5)
    longer, shorter = torch.logspace(-2, 4, 6), torch.logspace(3, -3, 6)
    torch.testing.assert_close(
        loss(longer * online, shorter * target, mask), loss(online, target, mask)
    )


@all_losses
@halves_and_full
@pytest.mark.parametrize("zeros", ["a few pixels", "every pixel"])
def test_zero_vectors_neither_break_nor_explode(loss, dtype, zeros) -> None:
    online, target = noise(2, 8, 6, dtype=dtype), noise(2, 8, 6, seed=1, dtype=dtype)
    with torch.no_grad():
        for first, tensor in enumerate((online, target)):
            tensor[..., slice(first, first + 2) if zeros == "a few pixels" else slice(None)] = 0
    result = loss(online, target, scattered(2, 6, 6, share=0.6))
    result.backward()
    assert result.isfinite()
    for tensor in (online, target):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() <= 10


def test_a_zero_vector_is_orthogonal_to_everything() -> None:
    nothing = torch.zeros_like(EYE)
    assert pixpro_loss(nothing, EYE, torch.eye(2).bool()[None]) == 2
    assert instance_loss(nothing[0], EYE[0]) == 2


@all_losses
@halves_and_full
def test_losses_are_computed_in_float32_under_autocast(loss, dtype) -> None:
    online, target = noise(2, 32, 9, dtype=dtype), noise(2, 32, 9, seed=1, dtype=dtype)
    mask = scattered(2, 9, 9, share=0.3)
    inputs = online.detach().float().requires_grad_(), target.detach().float().requires_grad_()
    expected = loss(*inputs, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = loss(online, target, mask)
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-6)
    measured.backward()
    expected.backward()
    for half, full in zip((online, target), inputs, strict=True):
        torch.testing.assert_close(half.grad, full.grad.to(dtype))


@loss_and_plain
def test_no_matrix_of_all_pairs_is_kept_for_backward(loss, plain, monkeypatch) -> None:
    b, n = 2, 24 * 24
    monkeypatch.setattr(blocks, "ENTRIES", n * n)  # an image at a time
    online, target = noise(b, 8, n), noise(b, 8, n, seed=1)
    views = two_crops((24, 24), (24, 24))
    assert kept_elements(lambda: plain(online, target, positive_mask(*views))) >= b * n * n
    assert kept_elements(lambda: loss(online, target, Positives(*views))) < n * n


@all_losses
def test_the_default_dtype_has_no_say(loss) -> None:
    online, target = noise(2, 4, 6), noise(2, 4, 6, seed=1)
    mask = scattered(2, 6, 6, share=0.5)
    expected = loss(online, target, mask)
    torch.set_default_dtype(torch.float64)
    try:
        assert loss(online, target, mask).dtype == expected.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@both_losses
@pytest.mark.parametrize("with_cosine", [True, False])
def test_the_mean_cosine_of_each_image_comes_without_gradient(loss, with_cosine) -> None:
    online, target = noise(3, 4, 6), noise(3, 4, 5, seed=1)
    mask = scattered(3, 6, 5, share=0.4)
    mask[1] = False
    if loss is pixpro_loss:
        found = pixpro(online, target, PositiveTable(mask))
    else:
        found = losses.pixcontrast(
            online, target, PositiveTable(mask), 0.3, with_cosine=with_cosine
        )
    cosines = (reference.unit(online, 1).mT @ reference.unit(target, 1) * mask).sum(dim=(1, 2))
    known = with_cosine or loss is pixpro_loss
    torch.testing.assert_close(found.cosine, cosines / mask.sum(dim=(1, 2)).clamp_min(1) * known)
    assert not found.cosine.requires_grad
    assert found.loss == loss(online, target, mask)


def test_a_vector_shorter_than_epsilon_is_scaled_by_it_and_gets_no_gradient() -> None:
    vectors = torch.tensor([[3e-7, 4e-7], [3e-5, 4e-5]], requires_grad=True)
    scaled = unit(vectors)
    torch.testing.assert_close(scaled, torch.tensor([[0.3, 0.4], [0.6, 0.8]]))
    scaled[:, 0].sum().backward()
    # Across, the slope is that of the angle: 1 / length * (1 - 0.6 ** 2, -0.6 * 0.8).
    torch.testing.assert_close(vectors.grad, torch.tensor([[0, 0], [0.64, -0.48]]) / 5e-5)


# Errors.


@pytest.mark.parametrize("temperature", [0, -0.3])
def test_a_temperature_must_be_above_zero(temperature) -> None:
    with pytest.raises(ValueError, match=str(temperature)):
        pixcontrast_loss(EYE, EYE, torch.eye(2).bool()[None], temperature)


@both_losses
@pytest.mark.parametrize(
    ("target", "pairs"),
    [
        *(((2, 4, 6), torch.ones(n).bool()) for n in ((2, 5, 7), (2, 6, 5), (3, 5, 6), (5, 6))),
        ((2, 4, 6), Positives(*two_crops((2, 3), (4, 2)))),
        *((shape, torch.ones(2, 5, 6).bool()) for shape in ((2, 3, 6), (1, 4, 6), (4, 6))),
    ],
)
def test_pixels_and_pairs_that_do_not_fit_are_refused(loss, target, pairs) -> None:
    shapes = f"pixels (2, 4, 5) and {target} and pairs {tuple(pairs.shape)}"
    with pytest.raises(ValueError, match=re.escape(shapes)):
        loss(torch.randn(2, 4, 5), torch.randn(target), pairs)


def test_instances_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2, 4") as refusal:
        instance_loss(torch.randn(2, 4), torch.randn(1, 4))
    assert "1, 4" in str(refusal.value)
