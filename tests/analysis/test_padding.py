"""Attention on padding: known shares, ways of squaring, every kind of model."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PilImage

from agevlm.analysis import padding
from agevlm.analysis.cli import padding as main
from agevlm.analysis.padding import mean_color, measure_padding, measure_picture, squared
from agevlm.analysis.pairs import Pair
from agevlm.analysis.resume import Parts
from builders import mask, picture, save_tiny
from vlms import EVERY, force, llava, ours


QUESTION = "Is there a red apple?"
WIDE = Pair("wide", picture(120, 40), QUESTION, mask(120, 40, box=(40, 0, 80, 40)))


def test_squared():
    image = picture(60, 20)
    pad, stretch, crop = (squared(image, variant, (1, 2, 3)) for variant in ("pad", "stretch", "crop"))
    assert pad.size == stretch.size == crop.size == (60, 60)
    assert pad.getpixel((30, 10)) == pad.getpixel((30, 45)) == (1, 2, 3)
    np.testing.assert_array_equal(np.asarray(pad)[20:40], np.asarray(image))
    np.testing.assert_array_equal(np.asarray(crop), np.asarray(image.crop((20, 0, 40, 20)).resize((60, 60), 3)))
    assert squared(mask(60, 20, box=(0, 0, 20, 20)), "crop").getbbox() is None
    assert squared(PilImage.new("1", (20, 60), 1), "pad").getbbox() == (20, 0, 40, 60)
    with pytest.raises(ValueError, match="variant is 'squash'"):
        squared(image, "squash")


@pytest.mark.parametrize("token", [0, 4])
def test_known_shares(token):
    """A 3 : 1 picture fills the middle row of 3 x 3 cells; two thirds are padding. All attention on a padded cell is
    an enrichment of 1.5, on a shown one of 0."""
    subject = llava(do_pad=True)
    encoded = subject.encode([WIDE.image], [QUESTION])
    force(subject, int(encoded.image_BT[0].nonzero()[token, 0]))
    summary = measure_padding(subject, [WIDE], progress=False)["variants"]
    for variant, entry in summary.items():
        assert entry["area"] == pytest.approx(6 / 9)
        assert entry["share"] == pytest.approx(1 if token == 0 else 0, abs=1e-4), variant
        assert entry["enrichment"] == pytest.approx(1.5 if token == 0 else 0, abs=1e-3)
    inside = {variant: entry["in_mask"]["share"] for variant, entry in summary.items()}
    # The masked middle third is the middle cell, the middle column, everything.
    expected = {"own": token == 4, "pad": token == 4, "stretch": token == 4, "crop": True}
    assert inside == pytest.approx({variant: float(hit) for variant, hit in expected.items()}, abs=1e-4)


def test_ours_gives_nothing_to_what_is_masked():
    subject = ours()
    record = measure_picture(subject, WIDE)
    assert record["own"]["area"] == pytest.approx(6 / 9)
    np.testing.assert_allclose(record["own"]["share"], 0, atol=1e-7)
    assert (record["pad"]["share"] > 0.3).all()  # nobody told it


def test_padding_beforehand_is_what_a_padding_processor_does():
    subject = llava(do_pad=True)
    record = measure_picture(subject, WIDE)
    np.testing.assert_allclose(record["own"]["share"], record["pad"]["share"], atol=1e-5)
    assert mean_color(subject) == (122, 116, 104)


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_model(name):
    subject = EVERY[name]()
    summary = measure_padding(subject, [WIDE, Pair("square", picture(), QUESTION)], progress=False)
    assert summary["pictures"] == summary["without_padding"] == 1
    assert [layer["layer"] for layer in summary["variants"]["pad"]["layers"]] == summary["layers"]
    assert len(summary["layers"]) == 2
    for entry in summary["variants"].values():
        assert 0 <= entry["share"] <= 1 and 0 < entry["in_mask"]["share"] <= 1
    assert 0.5 <= summary["variants"]["pad"]["area"] < 0.8
    assert summary["variants"]["pad"]["area"] == summary["variants"]["stretch"]["area"]


def test_square_pictures_are_refused():
    with pytest.raises(ValueError, match="none of 1 pictures leaves a cell empty"):
        measure_padding(ours(), [Pair("square", picture(), QUESTION)], progress=False)


def test_an_interrupted_run_goes_on_past_a_picture_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(padding, "CHUNK", 2)
    subject, others = ours(), [Pair("tall", picture(40, 120), QUESTION), Pair("square", picture(), QUESTION)]
    pairs = [WIDE, Pair("gone", tmp_path / "gone.png", QUESTION), *others]
    whole = measure_padding(subject, pairs, progress=False)
    assert (whole["pictures"], whole["without_padding"]) == (2, 1)
    assert [row["id"] for row in whole["left_out"]] == ["gone"]
    with pytest.raises(ValueError, match=r"row gone: .*gone\.png"):
        measure_padding(subject, pairs, strict=True, progress=False)

    def parts():
        return Parts(tmp_path, "padding", subject.model, pairs)

    calls, once = [], padding.measure_picture

    def measure(limit):
        def counted(subject, pair):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(pair.id)
            return once(subject, pair)

        monkeypatch.setattr(padding, "measure_picture", counted)

    measure(1)
    with pytest.raises(KeyboardInterrupt):
        measure_padding(subject, pairs, parts=parts(), progress=False)
    measure(2)
    assert measure_padding(subject, pairs, parts=parts(), progress=False) == whole
    assert calls == ["wide", "tall"]
    parts().finish()
    assert not [*tmp_path.iterdir()]


def test_command_line(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    rows = [
        {"id": str(i), "image": picture(120 + 30 * i, 40 + 10 * i, seed=i), "question": QUESTION} for i in range(3)
    ]
    features = Features({"id": Value("string"), "image": Image(), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    main([str(tmp_path / "model"), str(tmp_path / "rows.parquet"), "--output", str(tmp_path / "out")])
    assert "model: 3 pictures, 0 without padding, 0 bad row(s) left out" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"padding.json", "padding.png"}
    summary = json.loads((tmp_path / "out" / "padding.json").read_text(encoding="utf-8"))
    assert summary["variants"]["own"]["share"] == 0 and "in_mask" not in summary["variants"]["own"]
