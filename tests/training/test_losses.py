"""Eq. 3 against a naive float64 reference, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm.training.losses import (
    LOSSES,
    NORMALIZATIONS,
    guidance_loss,
    in_mask_mass,
    normalize_maps,
    pointing_accuracy,
)


def random_case(layers=3, rows=4, cells=10, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(layers, rows, cells, generator=generator, dtype=torch.float64).softmax(dim=-1).to(dtype)
    mask = torch.rand(rows, cells, generator=generator) < 0.4
    mask[:, 0] = True
    return maps, mask


def naive_loss(maps, mask, normalization):
    """Eq. 3 with loops over rows, layers and cells; float64 scalars, so that autograd gives its gradient."""
    losses = []
    for row in range(mask.shape[0]):
        of_layers = []
        for layer in range(maps.shape[0]):
            cells = [maps[layer, row, cell] for cell in range(maps.shape[2])]
            scale = sum(cells) if normalization == "sum" else max(cells)
            attention = [cell / scale for cell in cells]
            overlap = sum(p for p, inside in zip(attention, mask[row].tolist(), strict=True) if inside)
            total = sum(mask[row].tolist()) + sum(attention)
            of_layers.append(-torch.log(2 * overlap / total))
        losses.append(sum(of_layers) / len(of_layers))
    return torch.stack(losses)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_loss_and_gradient_equal_a_naive_float64_reference(normalization):
    maps, mask = random_case()
    exact = maps.double().requires_grad_()
    maps.requires_grad_()

    loss, reference = guidance_loss(maps, mask, normalization), naive_loss(exact, mask, normalization)
    torch.testing.assert_close(loss.double(), reference, atol=1e-6, rtol=1e-6)

    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    (loss * weights).sum().backward()
    (reference * weights.double()).sum().backward()
    torch.testing.assert_close(maps.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_equals_finite_differences(normalization):
    maps, mask = random_case(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda maps: guidance_loss(maps, mask, normalization), maps.requires_grad_())


@pytest.mark.parametrize(("loss", "normalization"), [("bce", "sum"), ("bce", "max"), ("kl", "sum")])
def test_other_losses_equal_torch_and_a_naive_reference_in_float64(loss, normalization):
    maps, mask = random_case(dtype=torch.float64)
    maps.requires_grad_()
    attention, target = normalize_maps(maps, normalization), mask.double().expand_as(maps)
    if loss == "bce":
        clamped = attention.clamp(1e-12, 1 - 1e-6)
        of_cells = torch.nn.functional.binary_cross_entropy(clamped, target, reduction="none")
        expected = of_cells.mean((0, 2))
    else:
        even = target / target.sum(-1, keepdim=True)
        expected = torch.nn.functional.kl_div(attention.log(), even, reduction="none").sum(-1).mean(0)
    found = guidance_loss(maps, mask, normalization, loss)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), maps, retain_graph=True)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_best_map_of_each_loss():
    """`kl` and `dice` with `max` are zero on an even spread over the mask; `bce` is lowest there among maps that add
    up to the mask's share."""
    _, mask = random_case(dtype=torch.float64)
    even = mask.double().expand(3, -1, -1) / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(guidance_loss(even, mask, loss="kl"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(guidance_loss(even, mask, "max"), torch.zeros(4, dtype=torch.float64))
    worse = even.roll(1, dims=-1)
    for loss in LOSSES:
        assert (guidance_loss(even, mask, loss=loss) < guidance_loss(worse, mask, loss=loss)).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 30))
def test_sum_normalized_loss_is_the_log_of_the_mass_inside_plus_a_constant(seed, layers, cells):
    maps, mask = random_case(layers, 3, cells, seed, torch.float64)
    mass = (maps * mask).sum(dim=-1)
    constant = torch.log((mask.sum(dim=-1) + 1) / 2)
    torch.testing.assert_close(guidance_loss(maps, mask, "sum"), -mass.log().mean(dim=0) + constant)
    torch.testing.assert_close(in_mask_mass(maps, mask), mass.mean(dim=0))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.sampled_from(NORMALIZATIONS))
def test_loss_ignores_the_scale_of_the_maps_and_the_order_of_the_cells(seed, scale, normalization):
    maps, mask = random_case(seed=seed, dtype=torch.float64)
    loss = guidance_loss(maps, mask, normalization)
    torch.testing.assert_close(guidance_loss(maps * scale, mask, normalization), loss)
    order = torch.randperm(maps.shape[-1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(guidance_loss(maps[..., order], mask[:, order], normalization), loss)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 0.5, 1.0]), min_size=4, max_size=4), min_size=1),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from([("dice", "sum"), ("dice", "max"), ("bce", "sum"), ("bce", "max"), ("kl", "sum")]),
)
def test_loss_and_gradient_are_finite_for_any_map_and_mask(cells, mask, kind):
    maps = torch.tensor([cells]).requires_grad_()
    mask = torch.tensor([mask] * len(cells))
    loss, normalization = kind
    loss = guidance_loss(maps, mask, normalization, loss)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(maps.grad).all()


def test_the_gradient_reaches_attention_that_has_almost_left_the_mask():
    """A softmax that puts 1e-9 inside the mask still gets the full pull: the gradient of the logit is -(1 - mass)."""
    logits = torch.tensor([[[20.7, 0.0]]], requires_grad=True)
    guidance_loss(logits.softmax(dim=-1), torch.tensor([[False, True]])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[1.0, -1.0]]]), atol=1e-2, rtol=0)


def test_a_perfect_map_has_no_loss_with_max_normalization_and_all_its_mass_inside():
    _, mask = random_case()
    maps = mask.float().expand(3, -1, -1) * 0.2
    torch.testing.assert_close(guidance_loss(maps, mask, "max"), torch.zeros(4))
    torch.testing.assert_close(in_mask_mass(maps, mask), torch.ones(4))


def test_pointing_accuracy_is_the_share_of_layers_that_peak_inside():
    maps = torch.tensor([[[0.1, 0.9, 0.0]], [[0.8, 0.1, 0.1]], [[0.0, 0.4, 0.6]], [[0.0, 0.6, 0.4]]])
    assert pointing_accuracy(maps, torch.tensor([[False, True, False]])).tolist() == [0.5]


def test_half_precision_maps_are_computed_in_float32():
    maps, mask = random_case()
    loss = guidance_loss(maps.bfloat16(), mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, guidance_loss(maps.bfloat16().float(), mask))


def test_normalized_maps_sum_or_peak_at_one_and_zeros_stay():
    maps, _ = random_case()
    maps[0, 0] = 0
    total, peak = normalize_maps(maps, "sum").sum(dim=-1), normalize_maps(maps, "max").amax(dim=-1)
    for value in (total, peak):
        assert value[0, 0] == 0
        torch.testing.assert_close(value.flatten()[1:], torch.ones(11))


def test_wrong_shapes_and_names_are_refused():
    maps, mask = random_case()
    with pytest.raises(ValueError, match="same processor"):
        guidance_loss(maps, mask[:, :-1])
    with pytest.raises(ValueError, match=r"cross-attention layers >= 1"):
        in_mask_mass(maps[:0], mask)
    with pytest.raises(ValueError, match="one of sum, max, got 'minmax'"):
        guidance_loss(maps, mask, "minmax")
    with pytest.raises(ValueError, match="one of dice, bce, kl, got 'iou'"):
        guidance_loss(maps, mask, loss="iou")
    with pytest.raises(ValueError, match="'kl' compares distributions"):
        guidance_loss(maps, mask, "max", "kl")


def test_the_literal_example_of_the_paper():
    """32 heads, 10 query tokens, 576 cells of uniform attention: mass |M| / 576 in every layer."""
    attention = torch.full((32, 10, 576), 1 / 576)
    mask = torch.zeros(1, 576)
    mask[0, :36] = 1
    loss = guidance_loss(attention.mean(dim=(0, 1)).expand(4, 1, -1), mask)
    assert loss.item() == pytest.approx(-math.log(2 * (36 / 576) / (36 + 1)), rel=1e-5)
