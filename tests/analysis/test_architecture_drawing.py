"""The drawing of the architecture: its blocks follow the configuration, its squares follow the recipes."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from agevlm import cli
from agevlm.analysis.architecture import TRAINS, draw, save
from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.training.stages import stage1_align, stage2_adapt_vision, stage3_ground, stage4_instruct


ROOT = Path(__file__).resolve().parents[2]
RECIPES = dict(
    enumerate((stage1_align.recipe, stage2_adapt_vision.recipe, stage3_ground.recipe, stage4_instruct.recipe), 1)
)


def tiny(**kwargs) -> AgeVlmConfig:
    return AgeVlmConfig.tiny(vocab_size=64, image_token_id=5, **kwargs)


def drawn(path: Path, kinds: str) -> list[str]:
    """Names of the blocks of some kinds in an SVG, lowest first."""
    bottoms = {}
    for group in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}g"):
        if re.fullmatch(rf"({kinds})-\d+", group.get("id", "")):
            outline = re.findall(r"-?[\d.]+ (-?[\d.]+)(?= \n|\s|$)", group[0].get("d"))
            bottoms[group.get("id")] = max(map(float, outline))  # SVG counts downwards
    assert len(set(bottoms.values())) == len(bottoms)
    return sorted(bottoms, key=bottoms.__getitem__, reverse=True)


@pytest.mark.parametrize(
    "config",
    [
        AgeVlmConfig.paper(),
        tiny(),
        tiny(cross_attention_layers=[0, 1, 5]),
        tiny(cross_attention_layers=[4], vision_config={"depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2}),
    ],
)
def test_blocks_stand_where_the_configuration_puts_them(config, tmp_path):
    save(draw(config, image_size=224), tmp_path / "a.svg")
    count = config.text_config.num_hidden_layers + len(config.cross_attention_layers)
    kinds = ["cross" if index in config.cross_attention_layers else "llama" for index in range(count)]
    assert drawn(tmp_path / "a.svg", "cross|llama") == [f"{kind}-{index}" for index, kind in enumerate(kinds)]
    assert drawn(tmp_path / "a.svg", "vision") == [f"vision-{n}" for n in range(len(config.vision_config.depths))]


def test_a_block_inside_a_layer_has_its_self_attention_below_and_its_mlp_above(tmp_path):
    save(
        draw(tiny(cross_attention_position="after_self_attention", cross_attention_layers=[1, 5])), tmp_path / "a.svg"
    )
    names = ["llama-0", "cross-1", "mlp-0", "llama-2", "llama-3", "llama-4", "cross-5", "mlp-4"]
    assert drawn(tmp_path / "a.svg", "cross|llama|mlp") == names


def test_the_same_configuration_gives_the_same_bytes(tmp_path):
    for name in "ab":
        save(draw(tiny()), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_published_drawing_is_of_the_paper():
    blocks = drawn(ROOT / "docs/images/architecture.svg", "cross|llama")
    assert [name for name in blocks if "cross" in name] == ["cross-2", "cross-7", "cross-12", "cross-17"]
    assert len(blocks) == 20


def test_squares_follow_the_recipes():
    owners = {
        "tower": {"vision_all"},
        "last-stage": {"vision_all", "vision_last_stage"},
        "projector": {"projector"},
        "cross": {"cross_attention"},
        "llama": {"language_model"},
    }
    for part, names in owners.items():
        assert TRAINS[part] == tuple(stage for stage, recipe in RECIPES.items() if names & {*recipe().trains}), part
    guided = {
        variant: tuple(s for s, recipe in RECIPES.items() if recipe(variant=variant).training["guidance_weight"] > 0)
        for variant in ("agevlm", "agevlm-lm")
    }
    assert guided == {"agevlm": TRAINS["guidance-loss"], "agevlm-lm": (*TRAINS["guidance-loss"], 4)}
    assert TRAINS["lm-loss"] == tuple(RECIPES)


def test_the_verb_draws_a_checkpoint(tmp_path, capsys):
    cli.dispatch(
        ["analyze", "architecture", str(ROOT / "checkpoints/agevlm-tiny"), "--output", str(tmp_path / "a.svg")]
    )
    assert [name for name in drawn(tmp_path / "a.svg", "cross|llama") if "cross" in name] == ["cross-1", "cross-4"]
    assert "a.svg" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--output a\.png: the drawing is an SVG"):
        cli.dispatch(["analyze", "architecture", "--output", "a.png"])
