"""Maps and masses of guidance, and their gradients, against softmax attention written out in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from agevlm.modeling_agevlm.guidance_agevlm import Visibility, _pieces, attend_with_mass, tap
from agevlm.training.losses import guidance_loss, guidance_loss_of_mass
from builders import tiny_model


HEADS, GROUPS, WIDTH, CELLS = 4, 2, 8, 6
SCALING = WIDTH**-0.5
MODULE = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, training=False, is_causal=False)
SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


def case(seed: int, batch: int = 3, tokens: int = 5, images: int = 2, dtype=torch.float32, phrases: int = 3):
    """Random queries, keys, values; which tokens each phrase selects, which see which image, the phrases' masks. With
    several phrases, some select nothing, tokens belong to several, and the last phrase repeats the first."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, HEADS, tokens, WIDTH, generator=g).to(dtype) * 2
    key, value = (torch.randn(batch, GROUPS, images * CELLS, WIDTH, generator=g).to(dtype) for _ in range(2))
    cells = torch.rand(batch, images, CELLS, generator=g) < 0.8
    cells[..., 0] = True
    visibility = Visibility(torch.rand(batch, tokens, images, generator=g) < 0.6, cells)
    selected = torch.rand(batch, phrases, tokens, generator=g) < 0.6
    selected &= (torch.rand(batch, phrases, 1, generator=g) < 0.8) | (phrases == 1)
    selected[:, -1] = selected[:, 0]
    mask = (torch.rand(batch, phrases, images * CELLS, generator=g) < 0.4) & cells.flatten(1)[:, None]
    return query, key, value, selected, visibility, mask


def visible(visibility: Visibility) -> torch.Tensor:
    """bool (B, T, V)"""
    return (visibility.image_BTN[..., None] & visibility.cells_BNL[:, None]).flatten(2)


def reference(query, key, value, selected, visibility):
    """Attended values (B, T, H, D) and maps (B, P, V) in float64, everything kept."""
    key, value = (x.double().repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    sees = visibility.text_BT
    scores = query.double() @ key.transpose(2, 3) * SCALING
    scores = scores.masked_fill(~(visible(visibility) | ~sees[..., None])[:, None], float("-inf"))
    weights = scores.softmax(-1)
    chosen = (selected & sees[:, None]).double()
    maps = torch.einsum("bhtv,bpt->bpv", weights, chosen) / (HEADS * chosen.sum(2, keepdim=True)).clamp(min=1)
    return (weights @ value).transpose(1, 2), maps


def attention_mask(visibility: Visibility) -> torch.Tensor:
    return (visible(visibility) | ~visibility.text_BT[..., None])[:, None]


def tapped(query, key, value, selected, visibility):
    query, key, maps = tap(query, key, selected, visibility, SCALING)
    attended, _ = SDPA(MODULE, query, key, value, attention_mask(visibility), scaling=SCALING, is_causal=False)
    return attended, maps


def gradients(function, inputs, weigh):
    """Outputs, and gradients of queries, keys and values, of a loss that uses both outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    weigh(*outputs).backward()
    return [*(x.detach() for x in outputs), *(x.grad for x in inputs)]


def guided_phrases(maps, mask):
    """bool (B * P,): those with attention in their mask; Eq. 3 is a number for the others, with no meaning."""
    return (maps * mask).sum(-1).flatten() > 0


def close(ours, expected, error):
    """Up to `error`, and the same share of the tensor's largest value."""
    for name, a, b in zip(("map", "dq", "dk", "dv"), ours[-4:], expected[-4:], strict=True):
        worst, scale = (x.abs().amax().item() for x in (a.double() - b.double(), b))
        assert worst <= error * (1 + scale), (name, worst, scale)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.sampled_from([1, 3, 8]))
def test_the_tap_equals_attention_with_all_weights_kept(seed, batch, tokens, images, phrases):
    query, key, value, selected, visibility, mask = case(seed, batch, tokens, images, phrases=phrases)
    probe = torch.randn(batch, tokens, HEADS, WIDTH, generator=torch.Generator().manual_seed(seed)).double()

    guided = guided_phrases(reference(query, key, value, selected, visibility)[1], mask)

    def weigh(attended, maps):
        seen = visibility.text_BT[..., None, None]  # what a token that sees nothing attends to is not defined
        loss = guidance_loss(maps.flatten(0, 1)[None], mask.flatten(0, 1))[guided]
        return (attended.double() * probe * seen).sum() + loss.double().sum() + (maps.double() ** 2).sum()

    ours = gradients(lambda q, k, v: tapped(q, k, v, selected, visibility), (query, key, value), weigh)
    expected = gradients(lambda q, k, v: reference(q, k, v, selected, visibility), (query, key, value), weigh)
    close(ours, expected, 1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 7),
    st.sampled_from(["sdpa", "eager"]),
    st.sampled_from([1, 3, 8, 9]),
)
def test_the_mass_is_the_map_inside_the_mask_and_leaves_the_attention_alone(seed, batch, tokens, kernel, phrases):
    query, key, value, selected, visibility, mask = case(seed, batch, tokens, phrases=phrases)
    probe = torch.randn(batch, tokens, HEADS, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    attention = SDPA if kernel == "sdpa" else eager_attention_forward
    hidden = attention_mask(visibility)
    if kernel == "eager":
        hidden = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(~hidden, torch.finfo(torch.float32).min)

    def with_mass(q, k, v):
        attended, _, mass = attend_with_mass(
            attention, MODULE, q, k, v, hidden, selected, mask, visibility, scaling=SCALING, dropout=0.0
        )
        return attended, mass

    def expected_mass(q, k, v):
        attended, maps = reference(q, k, v, selected, visibility)
        return attended, (maps * mask).sum(-1)

    guided = guided_phrases(reference(query, key, value, selected, visibility)[1], mask)

    def weigh(attended, mass):
        loss = guidance_loss_of_mass(mass.flatten()[None], mask.flatten(0, 1))[guided]
        return (attended.double() * probe * visibility.text_BT[..., None, None]).sum() + loss.double().sum()

    close(
        gradients(with_mass, (query, key, value), weigh),
        gradients(expected_mass, (query, key, value), weigh),
        1e-5,
    )


def test_long_queries_are_computed_in_pieces():
    query, key, value, _, visibility, _ = case(0, batch=1, tokens=300)
    selected = torch.ones(1, 3, 300, dtype=torch.bool)
    selected[0, 1] = selected[0, 0, 200:] = False
    _, maps = tapped(query, key, value, selected, visibility)
    _, expected = reference(query, key, value, selected, visibility)
    assert torch.allclose(maps.double(), expected, atol=1e-6)


def test_phrases_of_the_same_tokens_are_computed_once():
    """8 phrases of all the words of a text cost what one mask costs."""
    query, key, _, selected, visibility, _ = case(1, phrases=1)
    for phrases in (1, 8):
        chosen = selected.repeat(1, phrases, 1)
        pieces = list(_pieces(query, key, chosen, visibility.image_BTN, visibility.cells_BNL, SCALING))
        assert sum(len(tokens) for _, tokens, *_ in pieces) == selected.sum() > 0
        assert all(numbers == list(range(phrases)) for *_, ((numbers, _, _),) in pieces)


def test_the_tap_adds_to_no_gradient_that_others_hold():
    """A gradient that is one number expanded over a tensor, or no gradient at all, cannot be added to in place."""
    query, key, value, selected, visibility, _ = case(3)
    for use in (lambda q, k, maps: maps.square().sum(), lambda q, k, maps: maps.square().sum() + q.sum() + k.sum()):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        use(*tap(q, k, selected, visibility, SCALING)).backward()
        plain_q, plain_k = query.double().requires_grad_(), key.double().requires_grad_()
        use(plain_q, plain_k, reference(plain_q, plain_k, value, selected, visibility)[1]).backward()
        assert torch.allclose(q.grad.double(), plain_q.grad, atol=1e-5)
        assert torch.allclose(k.grad.double(), plain_k.grad, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_tap_works_under_checkpointing(reentrant):
    query, key, value, selected, visibility, _ = case(5)

    def weigh(attended, maps):
        return attended.square().sum() + maps.square().sum()

    plain = gradients(lambda q, k, v: tapped(q, k, v, selected, visibility), (query, key, value), weigh)
    saved = gradients(
        lambda q, k, v: checkpoint(tapped, q, k, v, selected, visibility, use_reentrant=reentrant),
        (query, key, value),
        weigh,
    )
    close(saved, plain, 1e-6)


def test_maps_are_float32_whatever_the_model_computes_in():
    query, key, value, selected, visibility, _ = case(7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, maps = tapped(query, key, value, selected, visibility)
    _, expected = reference(query, key, value, selected, visibility)
    assert maps.dtype == torch.float32
    assert torch.allclose(maps.double(), expected, atol=1e-5)


def test_nothing_of_size_heads_by_queries_by_keys_is_kept():
    """Bytes that the graph holds between forward and backward, with the tap and without."""
    query, key, value, _, visibility, _ = case(0, batch=2, tokens=64)
    selected = torch.ones(2, 1, 64, dtype=torch.bool)
    kept = {}
    for name in ("tap", "plain"):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        q, k, v = (x.clone().requires_grad_() for x in (query, key, value))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if name == "tap":
                q, k, _ = tap(q, k, selected, visibility, SCALING)
            nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALING, enable_gqa=True)
        kept[name] = sum(storages.values())
    masks = sum(x.nbytes for x in (selected, visibility.image_BTN, visibility.cells_BNL))
    weights = 2 * HEADS * 64 * 2 * CELLS * 4
    assert kept["tap"] <= kept["plain"] + masks + selected.nbytes < kept["plain"] + weights / 4


@pytest.mark.parametrize(
    ("with_mask", "phrases"),
    [
        pytest.param(with_mask, phrases, id=f"{'mass' if with_mask else 'tap'}-{phrases}", marks=marks)
        for with_mask, phrases, marks in (
            (False, 3, ()), (True, 1, ()), (True, 8, ()),
            *((*rare, pytest.mark.slow) for rare in ((False, 1), (False, 8), (True, 3))),
        )
    ],
)  # fmt: skip
def test_a_guided_forward_and_backward_compiles_into_one_graph(with_mask, phrases):
    model = tiny_model(text_config={"num_hidden_layers": 1}, cross_attention_layers=[1])
    inputs = {
        "input_ids": torch.tensor([[model.config.image_token_id, 21, 22, 23]]),
        "pixel_values": torch.randn(1, 1, 3, 96, 96),
        "cross_attention_mask": torch.ones(1, 4, 1, dtype=torch.bool),
        "guidance_query_mask": torch.tensor([[False, True, True, False]]),
    }
    if with_mask:
        inputs["guidance_mask"] = torch.arange(9)[None] < 4
    if phrases > 1:
        for name in {"guidance_query_mask", "guidance_mask"} & inputs.keys():
            inputs[name] = inputs[name][:, None].repeat(1, phrases, 1)
    field = "cross_attention_mass" if with_mask else "cross_attention_maps"

    def step(**inputs):
        output = model.model(**inputs, use_cache=False)
        return output.last_hidden_state, output[field]

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        hidden, measured = function(**inputs)
        (hidden.square().mean() + measured.square().sum()).backward()
        results.append([hidden, measured, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-5)


@pytest.mark.parametrize("with_mask", [False, True], ids=["tap", "mass"])
def test_phrases_give_what_each_gives_alone(model, with_mask):
    inputs = {
        "input_ids": torch.tensor(
            [[model.config.image_token_id, 21, 22, 23], [model.config.image_token_id, 24, 25, 26]]
        ),
        "pixel_values": torch.randn(2, 1, 3, 96, 96),
    }
    query = torch.rand(2, 8, 4) < 0.5
    masks = torch.rand(2, 8, 9) < 0.5
    field = "cross_attention_mass" if with_mask else "cross_attention_maps"

    def measured(chosen):
        asked = {"guidance_mask": masks[:, chosen]} if with_mask else {}
        with torch.no_grad():
            return model(**inputs, guidance_query_mask=query[:, chosen], **asked)[field]

    together = measured(slice(8))
    assert together.shape[:3] == (2, 2, 8)
    for number in range(8):
        torch.testing.assert_close(together[:, :, number], measured(number))


def test_a_mask_without_query_tokens_is_refused(model):
    with pytest.raises(ValueError, match="guidance_query_mask"):
        model(input_ids=torch.tensor([[5]]), guidance_mask=torch.ones(1, 9, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 9), (1, 2, 9), (2, 3, 9)])
def test_masks_of_another_number_than_the_phrases_are_refused(model, shape):
    query = torch.ones(1, 3, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(1, 3, 1\) \(rows, phrases, tokens\).*Give each phrase one mask"):
        model(input_ids=torch.tensor([[5]]), guidance_query_mask=query, guidance_mask=torch.ones(shape))


def test_the_model_returns_the_same_mass_as_its_maps(model):
    assert model.config.cross_attention_layers == tiny_model().config.cross_attention_layers
    inputs = {
        "input_ids": torch.tensor([[model.config.image_token_id, 21, 22, 23], [24, 25, 26, 27]]),
        "pixel_values": torch.randn(2, 1, 3, 96, 96),
        "image_mask": torch.tensor([[True], [False]]),
        "guidance_query_mask": torch.tensor([[False, True, True, False]] * 2),
    }
    mask = torch.arange(9)[None].expand(2, -1) < 4
    with torch.no_grad():
        maps = model(**inputs).cross_attention_maps
        output = model(**inputs, guidance_mask=mask)
    assert output.cross_attention_maps is None
    assert torch.allclose(output.cross_attention_mass, (maps * mask).sum(-1), atol=1e-6)
    assert output.cross_attention_mass[:, 1].eq(0).all()
