"""Maps as colours and as likeness: what must hold of them, by hand and by slow loops."""

import pytest
import torch
from torch.nn.functional import normalize

from pixel_level_contrastive_learning.visualization import pca
from pixel_level_contrastive_learning.visualization.pca import (
    aligned_colours,
    centred,
    colours_picture,
    likeness,
    likeness_picture,
    pca_colours,
)


def orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size)).Q


# Colours.


def test_cells_of_three_kinds_get_three_colours() -> None:
    kinds = torch.randint(3, (2, 6, 8))
    features = 5 * torch.nn.functional.one_hot(kinds, 16).permute(0, 3, 1, 2).float()
    colours, _ = pca_colours(features + 0.01 * torch.randn_like(features))
    assert colours.shape == (2, 3, 6, 8)
    assert colours.min() >= 0
    assert colours.max() <= 1
    means = torch.stack([colours.permute(0, 2, 3, 1)[kinds == kind].mean(0) for kind in range(3)])
    within = max(colours.permute(0, 2, 3, 1)[kinds == kind].std(0).max() for kind in range(3))
    assert torch.pdist(means).min() > 0.5
    assert within < 0.1


def test_colours_do_not_hang_on_the_length_of_features() -> None:
    features = torch.randn(1, 8, 5, 5)
    scaled = features * torch.rand(1, 1, 5, 5).add(0.5)
    torch.testing.assert_close(pca_colours(features)[0], pca_colours(scaled)[0])


def test_red_is_the_direction_in_which_cells_differ_most() -> None:
    line = torch.linspace(-0.5, 0.5, 400)
    directions = orthogonal(6)[:3]
    shares = torch.stack((torch.ones(400), line, 0.05 * torch.randn(400)), dim=1)
    cells = shares @ directions
    _, basis = pca_colours(cells.mT.reshape(1, 6, 20, 20))
    first = normalize(basis.axes, dim=0)[:, 0]
    assert abs(first @ directions[1]) > 0.99


def test_a_basis_gives_the_same_colours_to_the_same_features() -> None:
    one, two = torch.randn(2, 3, 8, 6, 6)
    both, basis = pca_colours(torch.cat((one, two)))
    colours, same = pca_colours(two, basis)
    torch.testing.assert_close(colours, both[3:])
    assert same is basis


def test_collapsed_features_are_gray() -> None:
    features = torch.randn(1, 32, 1, 1) + 1e-4 * torch.randn(1, 32, 9, 9)
    colours, _ = pca_colours(features)
    assert (colours - 0.5).abs().max() < 0.01


def test_most_of_the_colours_are_used() -> None:
    colours, _ = pca_colours(torch.randn(4, 16, 12, 12))
    low, high = colours.flatten().quantile(torch.tensor((0.01, 0.99)))
    assert low < 0.1
    assert high > 0.9


def test_features_of_fewer_than_three_channels_leave_colours_gray() -> None:
    colours, _ = pca_colours(torch.randn(1, 2, 7, 7))
    assert (colours[:, 2] == 0.5).all()


def test_all_images_of_one_colour_do_no_harm() -> None:
    colours, _ = pca_colours(torch.zeros(2, 4, 3, 3))
    assert (colours == 0.5).all()


@pytest.mark.parametrize("turn", ["mirrored", "turned"])
def test_aligned_colours_are_those_before_where_only_the_axes_turned(turn) -> None:
    features = torch.randn(3, 12, 8, 8) * torch.tensor([3.0, 2, 1.5, *9 * [0.1]]).view(1, -1, 1, 1)
    before, _ = pca_colours(features)
    # The same features in other axes of the network: the same likeness, any colours.
    turned = orthogonal(12) if turn == "turned" else -torch.eye(12)
    later = torch.einsum("d c, n c h w -> n d h w", turned, features)
    aligned, _ = aligned_colours(later, before)
    assert (aligned - before).abs().mean() < 0.02


def test_aligned_colours_follow_another_order_of_components() -> None:
    strengths = torch.tensor([1.0, 0.9, 0.8, *5 * [0.01]]).view(1, -1, 1, 1)
    features = torch.randn(3, 8, 9, 9)
    before, _ = pca_colours(features * strengths)
    swapped = torch.tensor([0.8, 0.9, 1.0, *5 * [0.01]]).view(1, -1, 1, 1)
    unaligned, _ = pca_colours(features * swapped)
    aligned, _ = aligned_colours(features * swapped, before)
    assert (aligned - before).abs().mean() < 0.1 < (unaligned - before).abs().mean()


def test_a_collapse_is_not_painted_over_by_aligning() -> None:
    before, _ = pca_colours(torch.randn(1, 32, 9, 9))
    later = torch.randn(1, 32, 1, 1) + 1e-4 * torch.randn(1, 32, 9, 9)
    assert (aligned_colours(later, before)[0] - 0.5).abs().max() < 0.01


def test_wrong_maps_are_refused() -> None:
    features = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError) as error:
        pca_colours(features[0])
    assert str(error.value) == (
        "features is (4, 3, 3); it must be maps (n, c, h, w), such as the outputs of a layer"
    )
    _, basis = pca_colours(features)
    with pytest.raises(ValueError) as error:
        pca_colours(torch.randn(2, 5, 3, 3), basis)
    assert str(error.value) == (
        "basis has 4 channels, but the features have 5; use one that was found for this layer"
    )
    with pytest.raises(ValueError) as error:
        aligned_colours(features, torch.rand(2, 3, 4, 4))
    assert str(error.value) == (
        "previous has shape (2, 3, 4, 4); it must be (2, 3, 3, 3): the colours of the same images "
        "at the same layer"
    )


# Likeness.


def test_likeness_is_the_cosine_of_each_cell() -> None:
    one, two = torch.randn(5, 3, 4), torch.randn(5, 2, 6)
    cosines = likeness(one, (2, 1), two)
    vector = one[:, 2, 1]
    for row in range(2):
        for column in range(6):
            cell = two[:, row, column]
            expected = float(vector @ cell / (vector.norm() * cell.norm()))
            assert cosines[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_a_cell_is_like_itself() -> None:
    features = torch.randn(5, 3, 4)
    assert likeness(features, (0, 3))[0, 3].item() == pytest.approx(1)
    assert torch.equal(likeness(features, (-1, -1)), likeness(features, (2, 3)))


def test_wrong_cells_and_maps_are_refused() -> None:
    features = torch.randn(5, 3, 4)
    with pytest.raises(ValueError) as error:
        likeness(features, (3, 0))
    assert str(error.value) == "cell is (3, 0); it must be (row, column) on a map of 3x4 cells"
    with pytest.raises(ValueError) as error:
        likeness(features, (0, 0), torch.randn(6, 3, 4))
    assert str(error.value) == (
        "features are (5, 3, 4) and (6, 3, 4); they must be maps (c, h, w) of the same layer"
    )


def test_centred_maps_have_no_common_direction() -> None:
    one, two = torch.rand(6, 3, 4) + 1, torch.rand(6, 5, 2) + 1  # as behind a ReLU
    assert likeness(one, (0, 0)).min() > 0.8
    directions = centred(one, two)
    total = sum(direction.sum(dim=(1, 2)) for direction in directions)
    torch.testing.assert_close(total, torch.zeros(6), atol=1e-5, rtol=0)
    assert likeness(directions[0], (0, 0), directions[1]).min() < 0


# Pictures.


def test_the_colours_stand_below_their_images() -> None:
    images = torch.zeros(2, 3, 30, 60)
    images[1] = 1.0
    colours = torch.full((2, 3, 3, 6), 0.5)
    picture = colours_picture(images, colours, side=60)
    assert picture.size == (60 + 4 + 60, 30 + 4 + 30)
    assert picture.getpixel((10, 10)) == (0, 0, 0)
    assert picture.getpixel((62, 10)) == (255, 255, 255)  # the gap
    assert picture.getpixel((100, 50)) == (128, 128, 128)


def test_the_likeness_picture_is_bright_where_cells_are_alike() -> None:
    features = torch.zeros(2, 4, 4)
    features[0, :, :2] = 1
    features[1, :, 2:] = 1
    white = torch.ones(3, 64, 64)
    picture = likeness_picture([white, white], [features, features.flip(2)], (0, 0), side=64)
    assert picture.size == (64 + 8 + 64, 64)
    assert picture.getpixel((5, 60)) == (255, 255, 255)
    assert max(picture.getpixel((60, 60))) < 64
    assert max(picture.getpixel((77, 60))) < 64
    assert picture.getpixel((132, 60)) == (255, 255, 255)


def test_flat_colours_mean_what_they_are_said_to_mean() -> None:
    # Cells that differ by half of what is taken for flat fill half of the colours.
    along = torch.tensor([0.0, pca.MIN_REACH / 2]).repeat(50)
    angle = torch.stack((along.cos(), along.sin()))
    colours, _ = pca_colours(angle.reshape(1, 2, 10, 10))
    reach = (colours.amax() - colours.amin()).item()
    assert reach == pytest.approx(0.25, abs=0.01)
