"""Parts of the model: they are disjoint where they should be, complete, and counted right."""

import pytest

from agevlm.training.freezing import PARTS, format_table, part_of, set_trainable, trainable_table
from builders import tiny_model


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_under(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


LLM = ("model.language_model.layers", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head")


@pytest.mark.parametrize(
    ("part", "prefixes"),
    [
        ("projector", ("model.multi_modal_projector.",)),
        ("cross_attention", ("model.language_model.cross_attention_layers.",)),
        ("vision_last_stage", ("model.vision_tower.encoder.stages.3.",)),
        ("vision_last_block", ("model.vision_tower.encoder.stages.3.layers.0.",)),
        ("vision_all", ("model.vision_tower.",)),
        ("language_model", LLM),
    ],
)
def test_a_part_is_what_its_name_says(part, prefixes):
    model = tiny_model()
    set_trainable(model, [part])
    assert trainable_names(model) == names_under(model, *prefixes) != set()


def test_self_attention_is_llamas_own_attention_and_its_input_norm():
    model = tiny_model()
    set_trainable(model, ["self_attention"])
    names = trainable_names(model)
    assert all(".layers." in name and (".self_attn." in name or ".input_layernorm." in name) for name in names)
    assert len(names) == 5 * model.config.text_config.num_hidden_layers


def test_the_disjoint_parts_cover_the_model_and_frozen_parts_are_taken_out():
    model = tiny_model()
    everything = ["projector", "cross_attention", "vision_all", "language_model"]
    set_trainable(model, everything)
    assert trainable_names(model) == {name for name, _ in model.named_parameters()}
    set_trainable(model, everything, frozen=["self_attention"])
    frozen = {name for name, _ in model.named_parameters()} - trainable_names(model)
    set_trainable(model, ["self_attention"])
    assert frozen == trainable_names(model)


def test_the_last_call_decides():
    model = tiny_model()
    set_trainable(model, ["language_model"])
    set_trainable(model, ["projector"])
    assert trainable_names(model) == names_under(model, "model.multi_modal_projector.")


def test_part_of_sees_through_wrappers():
    for prefix in ("", "module.", "base_model.model."):
        assert part_of(f"{prefix}model.vision_tower.encoder.stages.0.layers.0.dwconv.weight") == "vision"
        assert part_of(f"{prefix}model.multi_modal_projector.linear_1.weight") == "projector"
        name = f"{prefix}model.language_model.cross_attention_layers.0.mlp.up_proj.lora_A.default.weight"
        assert part_of(name) == "cross_attention"
        assert part_of(f"{prefix}lm_head.weight") == "language_model"


def test_wrong_parts_are_refused():
    with pytest.raises(ValueError, match=rf"Unknown part 'vision'.*{PARTS[0]}"):
        set_trainable(tiny_model(), ["vision"])
    with pytest.raises(ValueError, match="Nothing is left to train"):
        set_trainable(tiny_model(), ["self_attention"], frozen=["language_model"])


def test_the_table_counts_every_parameter_once():
    model = tiny_model()
    set_trainable(model, ["projector", "vision_last_stage"])
    *rows, total = trainable_table(model)
    assert total.module == "total"
    assert total.total == sum(row.total for row in rows) == model.num_parameters()
    assert total.trainable == sum(row.trainable for row in rows) == model.num_parameters(only_trainable=True)
    assert {row.module for row in rows if row.trainable} == {"projector", "vision stage 4"}
    assert all(row.trainable in (0, row.total) for row in rows)
    assert format_table([*rows, total]).row_count == len(rows) + 1
