"""The Pixel Propagation Module against the paper's loops."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from probe import kept_elements
from torch import Tensor, nn

from pixel_level_contrastive_learning import PPM, blocks

GAMMAS = [1, 1.5, 2, 4]
DEPTHS = [0, 1, 2]

depths = pytest.mark.parametrize("num_layers", DEPTHS)
gammas = pytest.mark.parametrize("gamma", GAMMAS)
dtypes = pytest.mark.parametrize("dtype", reference.TOLERANCE, ids=str)


def module(chan: int, num_layers: int = 1, gamma: float = 2) -> PPM:
    """A float64 module with the same weights at every call."""
    torch.manual_seed(0)
    return PPM(chan=chan, num_layers=num_layers, gamma=gamma).double()


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal float64 numbers that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def two_pixels(cosine: float) -> Tensor:
    """A ``(1, 2, 1, 2)`` map of two pixels that meet at an angle, of lengths 1 and 5."""
    sine = math.sqrt(1 - cosine**2)
    return torch.tensor([[[[1, 5 * cosine]], [[0, 5 * sine]]]], dtype=torch.float64)


# Conventions, by hand.


@pytest.mark.parametrize(("gamma", "weight"), [(1, 0.5), (2, 0.25), (4, 0.0625)])
def test_convention_a_pixel_adds_its_likeness_to_the_power_of_gamma(gamma, weight) -> None:
    x = two_pixels(0.5)
    spread = PPM(chan=2, num_layers=0, gamma=gamma)(x)
    one, two = x[0, :, 0, 0], x[0, :, 0, 1] / 5
    torch.testing.assert_close(spread[0, :, 0, 0], one + weight * two)
    torch.testing.assert_close(spread[0, :, 0, 1], weight * one + two)


@pytest.mark.parametrize("cosine", [0.0, -0.5, -1.0])
def test_convention_unlike_pixels_add_nothing(cosine) -> None:
    x = two_pixels(cosine)
    spread = PPM(chan=2, num_layers=0, gamma=2)(x)
    torch.testing.assert_close(spread, x / torch.tensor([1.0, 5.0]).double())


def test_convention_the_sum_runs_over_the_whole_map() -> None:
    x = torch.tensor([3.0, 4]).view(1, 2, 1, 1).expand(1, 2, 3, 5)
    spread = PPM(chan=2, num_layers=0)(x)
    torch.testing.assert_close(spread, 15 * x / 5)


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [
        (0, [nn.Identity]),
        (1, [nn.Conv2d]),
        (2, [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]),
    ],
)
def test_convention_the_transform_sees_one_pixel_at_a_time(num_layers, layers) -> None:
    ppm = PPM(chan=4, num_layers=num_layers)
    assert [name for name, _ in ppm.named_children()] == ["transform_net"]
    leaves = [layer for layer in ppm.transform_net.modules() if not list(layer.children())]
    assert [type(leaf) for leaf in leaves] == layers
    convolutions = [leaf for leaf in leaves if isinstance(leaf, nn.Conv2d)]
    assert all(conv.kernel_size == (1, 1) for conv in convolutions)
    assert all(conv.bias is not None for conv in convolutions)  # as in the authors' code


def test_convention_one_layer_and_gamma_two_are_the_defaults() -> None:
    ppm, x = PPM(chan=3).double(), noise(1, 3, 2, 3)
    assert isinstance(ppm.transform_net, nn.Conv2d)
    torch.testing.assert_close(ppm(x), reference.propagate(x, ppm.transform_net, 2))


# Against the slow loops.


@dtypes
@depths
@gammas
@given(
    chan=st.integers(1, 5),
    shape=st.tuples(st.integers(2, 3), st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**31),
)
def test_propagation_agrees_with_the_loops(dtype, num_layers, gamma, chan, shape, seed) -> None:
    b, h, w = shape
    ppm = module(chan, num_layers, gamma).to(dtype)
    x = noise(b, chan, h, w, seed=seed).to(dtype)
    spread = ppm(x)
    assert spread.shape == x.shape
    assert spread.dtype == dtype
    # The loops run in float64 on what the transform gave in its own precision.
    transformed = ppm.transform_net(x).double()
    expected = reference.propagate(x.double(), lambda _: transformed, gamma)
    tolerance = reference.TOLERANCE[dtype]
    torch.testing.assert_close(spread.double(), expected, rtol=tolerance, atol=tolerance)


@depths
@gammas
def test_gradients_agree_with_finite_differences(num_layers, gamma) -> None:
    ppm = module(3, num_layers, gamma)
    assert torch.autograd.gradcheck(ppm, noise(2, 3, 2, 3))


@depths
@pytest.mark.parametrize("entries", [blocks.ENTRIES, 2**17 - 1], ids=["large", "small"])
@pytest.mark.parametrize(
    "shape", [(5, 4, 24, 24), (2, 4, 36, 30)], ids=["many images", "many cells"]
)
def test_large_maps_agree_with_the_plain_form(num_layers, shape, entries, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "ENTRIES", entries)
    ppm = module(4, num_layers)
    x, pull = noise(*shape), noise(*shape, seed=1)
    inputs = [x, *ppm.parameters()]
    measured, expected = ppm(x), reference.plain_propagate(x, ppm.transform_net, 2)
    torch.testing.assert_close(measured, expected, rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad((y * pull).sum(), inputs) for y in (measured, expected))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


# What must not change, and what must never happen.


@depths
@gammas
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_maps_stay_finite(num_layers, gamma, value) -> None:
    ppm = module(4, num_layers, gamma).float()
    x = torch.full((2, 4, 3, 5), value, requires_grad=True)
    spread = ppm(x)
    spread.square().sum().backward()
    assert spread.isfinite().all()
    for tensor in (x, *ppm.parameters()):
        assert tensor.grad.isfinite().all()


@gammas
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_zero_pixels_do_not_explode(gamma, dtype) -> None:
    x = noise(2, 8, 2, 3).to(dtype).detach()
    x[:, :, 0, 0] = 0
    x.requires_grad_()
    PPM(chan=8, num_layers=0, gamma=gamma)(x).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() <= 10


def test_likeness_is_computed_in_float32_under_autocast() -> None:
    ppm, x = PPM(chan=32, num_layers=0), noise(2, 32, 4, 4).float().detach().requires_grad_()
    expected = ppm(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = ppm(x)
    torch.testing.assert_close(measured.float(), expected, rtol=1e-6, atol=1e-6)
    gradients = (torch.autograd.grad(y.float().square().sum(), x) for y in (measured, expected))
    torch.testing.assert_close(*[gradient for (gradient,) in gradients])


@depths
def test_no_matrix_of_all_pairs_is_kept_for_backward(num_layers, monkeypatch) -> None:
    b, n = 2, 24 * 24
    monkeypatch.setattr(blocks, "ENTRIES", n * n)  # an image at a time
    ppm, x = module(8, num_layers).float(), noise(b, 8, 24, 24).float()
    plain = kept_elements(lambda: reference.plain_propagate(x, ppm.transform_net, 2))
    assert plain >= b * n * n
    assert kept_elements(lambda: ppm(x)) < n * n


# Errors.


def test_arguments_go_by_name() -> None:
    with pytest.raises(TypeError):
        PPM(4)


@pytest.mark.parametrize("num_layers", [3, -1])
def test_a_depth_that_is_not_there_is_refused(num_layers) -> None:
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{num_layers})(?=.*0, 1, 2)"):
        PPM(chan=4, num_layers=num_layers)


def test_a_gamma_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)(?=.*0\.5)(?=.*at least 1)"):
        PPM(chan=4, gamma=0.5)
