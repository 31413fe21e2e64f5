"""Published ConvNeXts become the tower's: by name and shape at full width, by value against timm and open_clip.

timm and open_clip are not needed to use the converter. Tests that take a model from them are skipped without them
(`pip install timm open_clip_torch`); the names they are checked for are written down in
`published_towers.py`, so that the others are not.
"""

from collections.abc import Mapping

import pytest
import torch
from published_towers import Shapes, random_weights, timm_shapes
from safetensors.torch import save_file
from torch.nn import functional
from transformers import ConvNextModel

from agevlm.conversion.convert_vision import expected_shapes, load_tower, plan_conversion
from agevlm.conversion.sources import Weights, locate
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration


LARGE = {"depths": [3, 3, 27, 3], "widths": [192, 384, 768, 1536]}
TINY = {"depths": [1, 2, 3, 1], "widths": [8, 16, 24, 32]}


def open_clip_shapes(depths: list[int], widths: list[int], embedding: int = 768) -> Shapes:
    """The same tower in an open_clip checkpoint, with its head and a text tower of one block."""
    last = widths[-1]
    trunk = {
        f"visual.trunk.{name}": shape
        for name, shape in timm_shapes(depths, widths).items()
        if not name.startswith("head.") or name.startswith("head.norm")
    }
    head = {"fc1.weight": (last, last), "fc1.bias": (last,), "fc2.weight": (embedding, last)}
    text = {
        "positional_embedding": (77, embedding),
        "text_projection": (embedding, embedding),
        "logit_scale": (),
        "token_embedding.weight": (49408, embedding),
        "ln_final.weight": (embedding,),
        "transformer.resblocks.0.mlp.c_fc.weight": (4 * embedding, embedding),
    }
    return trunk | {f"visual.head.mlp.{name}": shape for name, shape in head.items()} | text


def transformers_shapes(depths: list[int], widths: list[int]) -> Shapes:
    config = plan_conversion(timm_shapes(depths, widths)).config
    return expected_shapes(config) | {"layernorm.weight": (widths[-1],), "layernorm.bias": (widths[-1],)}


LAYOUTS = {"timm": timm_shapes, "open_clip": open_clip_shapes, "transformers": transformers_shapes}
LEFT_OUT = {
    "timm": {"pooled norm and head": 6},
    "open_clip": {"pooled norm and head": 5, "text tower": 6},
    "transformers": {"pooled norm and head": 2},
}


def reference_map(weights: Mapping[str, torch.Tensor], depths: list[int], picture: torch.Tensor) -> torch.Tensor:
    """The last map of a ConvNeXt (Liu et al. 2022, section 2) with timm's names, in plain torch."""

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        scale, shift = weights[f"{at}.weight"], weights[f"{at}.bias"]
        return functional.layer_norm(x.permute(0, 2, 3, 1), scale.shape, scale, shift, 1e-6).permute(0, 3, 1, 2)

    def linear(x: torch.Tensor, at: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{at}.weight"], weights[f"{at}.bias"])

    x = functional.conv2d(picture, weights["stem.0.weight"], weights["stem.0.bias"], stride=4)
    x = norm(x, "stem.1")
    for stage, depth in enumerate(depths):
        if stage:
            at = f"stages.{stage}.downsample"
            x = functional.conv2d(norm(x, f"{at}.0"), weights[f"{at}.1.weight"], weights[f"{at}.1.bias"], stride=2)
        for block in range(depth):
            at = f"stages.{stage}.blocks.{block}"
            kernel, bias = weights[f"{at}.conv_dw.weight"], weights[f"{at}.conv_dw.bias"]
            y = functional.conv2d(x, kernel, bias, padding=3, groups=x.shape[1])
            y = norm(y, f"{at}.norm").permute(0, 2, 3, 1)
            y = linear(functional.gelu(linear(y, f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
            x = x + (weights[f"{at}.gamma"] * y).permute(0, 3, 1, 2)
    return x


def converted(weights: Mapping[str, torch.Tensor], folder) -> ConvNextModel:
    """Through a file, as a user has it."""
    file = folder / "model.safetensors"
    save_file(dict(weights), file)
    weights = Weights(locate(str(file)))
    return load_tower(plan_conversion(weights.shapes), weights)


# ---- Names and shapes ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_fills_the_papers_tower_at_full_width(layout):
    shapes = LAYOUTS[layout](**LARGE)
    conversion = plan_conversion(shapes)
    assert (conversion.layout, conversion.left_out) == (layout, LEFT_OUT[layout])
    config = AgeVlmConfig.paper()
    for name in ("depths", "hidden_sizes", "num_stages", "patch_size", "hidden_act", "layer_norm_eps", "num_channels"):
        assert getattr(conversion.config, name) == getattr(config.vision_config, name), name
    with torch.device("meta"):
        tower = AgeVlmForConditionalGeneration(config).model.vision_tower.state_dict()
    assert {target: shapes[source] for target, source in conversion.sources.items()} == {
        name: tuple(tensor.shape) for name, tensor in tower.items()
    }
    assert len(tower) == 340
    assert sum(tensor.numel() for tensor in tower.values()) == 196_230_336 - 2 * 1536


def test_the_names_written_down_here_are_timms():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("convnext_large_mlp.clip_laion2b_ft_soup_320", pretrained=False)
    assert timm_shapes(**LARGE) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_names_written_down_here_are_open_clips():
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.create_model("convnext_large_d_320", pretrained=None, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    visual = {name: shape for name, shape in open_clip_shapes(**LARGE).items() if name.startswith("visual.")}
    assert {name: shape for name, shape in shapes.items() if name.startswith("visual.")} == visual
    conversion = plan_conversion(shapes)
    assert len(conversion.sources) == 340
    assert sum(conversion.left_out.values()) == len(shapes) - 340


# ---- Values ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_converted_tower_computes_the_published_one(tmp_path, layout):
    weights = random_weights(timm_shapes(**TINY))
    picture = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    expected = reference_map(weights, TINY["depths"], picture)
    timm_names = {target: source for target, source in plan_conversion(timm_shapes(**TINY)).sources.items()}
    shapes = LAYOUTS[layout](**TINY)
    published = random_weights(shapes, seed=2) | {
        source: weights[timm_names[target]] for target, source in plan_conversion(shapes).sources.items()
    }
    tower = converted(published, tmp_path)
    with torch.no_grad():
        actual = tower(picture).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def timm_tower(depths: list[int], widths: list[int]):
    """timm's ConvNeXt with the options of `convnext_large_mlp`, weights random."""
    convnext = pytest.importorskip("timm.models.convnext")
    model = convnext.ConvNeXt(depths=depths, dims=widths, head_hidden_size=widths[-1], num_classes=768).eval()
    model.load_state_dict(random_weights({name: tensor.shape for name, tensor in model.state_dict().items()}))
    return model


def test_the_converted_tower_is_timms_bit_for_bit(tmp_path):
    model = timm_tower(**TINY)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == timm_shapes(**TINY)
    tower = converted(model.state_dict(), tmp_path)
    picture = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = model.forward_features(picture), tower(picture).last_hidden_state
    assert expected.std() > 0.1
    assert torch.equal(actual, expected)


@pytest.mark.slow
def test_the_converted_tower_is_timms_bit_for_bit_at_full_width(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("convnext_large_mlp.clip_laion2b_ft_soup_320", pretrained=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.normal_(std=0.5)
    tower = converted(model.state_dict(), tmp_path)
    picture = torch.randn(1, 3, 768, 768)
    with torch.no_grad():
        expected, actual = model.forward_features(picture), tower(picture).last_hidden_state
    assert actual.shape == (1, 1536, 24, 24)
    assert expected.std() > 0.1
    assert torch.equal(actual, expected)


def test_the_converted_tower_is_open_clips_bit_for_bit(tmp_path):
    """The image tower of a CLIP with ConvNeXt-Tiny, the smallest one with LAION's block."""
    open_clip = pytest.importorskip("open_clip")
    vision = {
        "timm_model_name": "convnext_tiny",
        "timm_pool": "",
        "timm_proj": "mlp",
        "timm_drop_path": 0.0,
        "image_size": 64,
    }
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    shapes = {name: tensor.shape for name, tensor in model.visual.state_dict().items()}
    model.visual.load_state_dict(random_weights(shapes))
    tower = converted(model.state_dict(), tmp_path)
    picture = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = model.visual.trunk.forward_features(picture), tower(picture).last_hidden_state
    assert torch.isfinite(expected).all() and expected.std() > 0.1
    assert torch.equal(actual, expected)


def test_half_precision_is_read_into_float32(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(timm_shapes(**TINY)).items()}
    tower = converted(weights, tmp_path)
    assert tower.dtype == torch.float32
    assert torch.equal(tower.embeddings.patch_embeddings.weight, weights["stem.0.weight"].float())


# ---- What is refused ----


def refuse(changes: Mapping[str, tuple[int, ...] | None], message: str) -> None:
    """`changes` to timm's names and shapes (None: left out) make the conversion fail with `message`."""
    shapes = {**timm_shapes(**TINY), **changes}
    with pytest.raises(ValueError, match=message):
        plan_conversion({name: shape for name, shape in shapes.items() if shape is not None})


def test_weights_that_are_no_plain_convnext_are_refused_by_name():
    # ConvNeXt-V2's norm, and a norm that would change the map
    refuse({"stages.1.blocks.0.mlp.grn.weight": (64,)}, r"unexpected: stages\.1\.blocks\.0\.mlp\.grn\.weight")
    refuse({"norm_pre.weight": (32,)}, r"unexpected: norm_pre\.weight")
    # no LayerScale
    refuse({"stages.0.blocks.0.gamma": None}, r"missing: encoder\.stages\.0\.layers\.0\.layer_scale_parameter")
    # 1 x 1 convolutions in place of linear layers
    refuse(
        {"stages.0.blocks.0.mlp.fc1.weight": (32, 8, 1, 1)},
        r"of another shape: stages\.0\.blocks\.0\.mlp\.fc1\.weight \[32, 8, 1, 1\] instead of \[32, 8\]",
    )
    refuse({"stem.0.weight": (8, 4, 4, 4)}, r"stem\.0\.weight \[8, 4, 4, 4\] instead of \[8, 3, 4, 4\]")


def test_a_stage_that_is_missing_altogether_is_noticed():
    shapes = timm_shapes(**TINY)
    with pytest.raises(ValueError, match=r"hold \[1, 0, 3, 1\] blocks per stage"):
        plan_conversion({name: shape for name, shape in shapes.items() if not name.startswith("stages.1.")})
    with pytest.raises(ValueError, match="hold no blocks per stage"):
        plan_conversion({name: shape for name, shape in shapes.items() if name.startswith("stem.")})
    with pytest.raises(ValueError, match=r"missing: encoder\.stages\.2\.layers\.1\."):
        plan_conversion({name: shape for name, shape in shapes.items() if "stages.2.blocks.1." not in name})


def test_an_unknown_layout_names_what_it_holds_and_what_is_known():
    original = {"downsample_layers.0.0.weight": (8, 3, 4, 4), "norm.weight": (32,)}
    with pytest.raises(ValueError, match=r"downsample_layers\.0\.0\.weight, norm\.weight.*open_clip.*timm"):
        plan_conversion(original)
    with pytest.raises(ValueError, match="nothing at all"):
        plan_conversion({})


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        Weights(locate(str(file)))
