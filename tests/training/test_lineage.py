"""Fingerprints notice what matters and nothing else."""

import json

import pytest
from PIL import ImageOps
from training_worker import make_arguments, make_rows

from agevlm.training.lineage import (
    data_fingerprint,
    identity_hash,
    masks_of,
    model_fingerprint,
    parent_lineage,
    read_lineage,
    training_identity,
    write_lineage,
)
from builders import tiny_model


def test_equal_rows_have_equal_fingerprints_and_every_change_shows(tmp_path):
    rows = make_rows("gitg")
    base = data_fingerprint(rows)
    assert (base["rows"], base["guided_rows"]) == (4, 2)
    rows.to_parquet(tmp_path / "rows.parquet")
    assert data_fingerprint(type(rows).from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))) == base

    items = list(make_rows("gitg"))
    answer = dict(items[2], messages=[items[2]["messages"][0], {"role": "assistant", "content": "No"}])
    query = dict(items[0], guidance={**items[0]["guidance"], "query": "red apple"})
    unguided = dict(items[0], guidance=None)
    inverted = ImageOps.invert(items[0]["guidance"]["mask"].convert("L"))
    other_mask = dict(items[0], guidance={**items[0]["guidance"], "mask": inverted})
    variants = [
        [items[1], items[0], *items[2:]],
        [*items[:2], answer, items[3]],
        [query, *items[1:]],
        [other_mask, *items[1:]],
        [unguided, *items[1:]],
        items[:3],
    ]
    seen = {base["fingerprint"]}
    for variant in variants:
        seen.add(data_fingerprint(type(rows).from_list(variant, features=rows.features))["fingerprint"])
    assert len(seen) == 1 + len(variants)


def test_rows_without_any_guidance_are_counted(tmp_path):
    assert data_fingerprint(make_rows("iit"))["guided_rows"] == 0


def test_what_masks_are_of():
    assert [masks_of(make_rows(kinds)) for kinds in ("itg", "it3", "it")] == ["texts", "phrases", None]


def test_weights_are_hashed_by_content(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert model_fingerprint(model) == model_fingerprint(type(model).from_pretrained(tmp_path))
    assert model_fingerprint(model) != model_fingerprint(tiny_model(seed=1))


def test_switches_belong_to_the_identity_of_runs_that_turn_them_on(tmp_path):
    plain = training_identity(make_arguments(tmp_path))
    for name, value in (("loss_type", "dft"), ("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0)):
        assert training_identity(make_arguments(tmp_path, **{name: value})) == {**plain, name: value}
        assert name not in plain


def test_the_identity_is_the_batch_however_it_is_divided(tmp_path):
    one = training_identity(make_arguments(tmp_path, per_device_train_batch_size=8))
    many = make_arguments(
        tmp_path / "other", per_device_train_batch_size=1, gradient_accumulation_steps=8, logging_steps=7, save_steps=3
    )
    assert one == training_identity(many)
    assert identity_hash(one) == identity_hash(json.loads(json.dumps(one)))
    assert identity_hash(one) != identity_hash(training_identity(make_arguments(tmp_path, seed=1)))


def test_what_a_parent_states_is_no_text_of_our_card(tmp_path):
    write_lineage(tmp_path, {"base_models": ["org/llama", "a](https://evil.example)", "x\n# Evil", 7, "gpt2"]})
    (tmp_path / "agevlm_push.json").write_text(json.dumps({"status": "pushed", "repo": "x | y", "commit": "a" * 40}))
    found = parent_lineage(tmp_path)
    assert found["base_models"] == ["org/llama", "gpt2"]
    assert found["parent"] == {"init_from": tmp_path.name, "revision": None, "repo": None}
    (tmp_path / "agevlm_push.json").write_text("{")
    with pytest.raises(ValueError, match=r"agevlm_push\.json is no valid JSON"):
        parent_lineage(tmp_path)


def test_a_damaged_lineage_file_is_named(tmp_path):
    assert read_lineage(tmp_path) is None
    write_lineage(tmp_path, {"stage": 1})
    assert read_lineage(tmp_path) == {"stage": 1}
    (tmp_path / "agevlm_stage.json").write_text('{"stage": ')
    with pytest.raises(ValueError, match=r"agevlm_stage\.json is no valid JSON"):
        read_lineage(tmp_path)
