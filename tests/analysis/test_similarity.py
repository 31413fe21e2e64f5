"""Similarity on cases with a known answer, and on every kind of model."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from agevlm.analysis import similarity
from agevlm.analysis.cli import similarity as main
from agevlm.analysis.pairs import Pair, load_pairs
from agevlm.analysis.resume import Parts
from agevlm.analysis.similarity import (
    HIDDEN,
    QUERY_KEY,
    centred,
    measure_similarity,
    reduce_heads,
    reduce_tokens,
    score_batch,
    score_pairs,
    stacked,
    write_similarity,
)
from agevlm.analysis.subjects import Subject
from agevlm.stats import derangement, separation
from builders import picture, save_tiny, tiny_model
from vlms import EVERY, llava, ours


TEXTS = ["a red apple", "two blue cars on the left", "the green tree of a house", "a yellow image", "no cars"]
PAIRS = [Pair(str(i), picture(60 + 8 * i, 60, seed=i), text) for i, text in enumerate(TEXTS)]


def test_identical_states_score_one_and_random_ones_nothing():
    states = torch.randn(1, 64).expand(5, 64)
    assert all(value == pytest.approx(1, abs=1e-5) for value in reduce_tokens(states, states[:3]).values())
    torch.manual_seed(0)
    image, text = torch.randn(500, 4096), torch.randn(200, 4096)
    scores = reduce_tokens(image, text)
    assert abs(scores["centroid"]) < 0.05 and abs(scores["pairwise"]) < 0.01
    assert scores["max"] == pytest.approx((2 * np.log(500) / 4096) ** 0.5, rel=0.2)  # the largest of 500 normals
    heads = reduce_heads(states[None].expand(4, -1, -1), states[None].expand(2, -1, -1), 0.5)
    assert heads["qk_cosine"] == pytest.approx(1, abs=1e-5)
    assert heads["qk_logit"] == pytest.approx(0.5 * float(states[0] @ states[0]), rel=1e-4)
    opposite = reduce_tokens(states, -states)
    assert all(value == pytest.approx(-1, abs=1e-5) for value in opposite.values())


def test_reductions_are_what_their_names_say():
    torch.manual_seed(0)
    image, text = torch.randn(6, 8), torch.randn(4, 8)
    table = torch.stack([torch.cosine_similarity(image, word[None]) for word in text])
    scores = reduce_tokens(image, text)
    torch.testing.assert_close(scores["pairwise"], table.mean())
    torch.testing.assert_close(scores["max"], table.max(1).values.mean())
    query, key = torch.randn(4, 3, 8), torch.randn(2, 5, 8)
    logits = query @ key.repeat_interleave(2, 0).transpose(1, 2) * 0.3
    torch.testing.assert_close(reduce_heads(query, key, 0.3)["qk_logit"], logits.mean())


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_model(name):
    subject = EVERY[name]()
    summary, arrays = measure_similarity(subject, PAIRS, seeds=(0, 1), batch_size=2, progress=False)
    layers = 3 if subject.concatenates else 6
    assert summary["headline"]["layer"] == (2 if subject.concatenates else 4)
    assert {name: len(entries) for name, entries in summary["measures"].items()} == (
        dict.fromkeys(HIDDEN, layers) | dict.fromkeys(QUERY_KEY, 2)
    )
    assert list(arrays.pop("ids")) == [pair.id for pair in PAIRS]
    assert {key.split("/")[0] for key in arrays} == {"matched", "mismatched-0", "mismatched-1"}
    for key, values in arrays.items():
        assert values.shape == (2 if "qk" in key else layers, len(PAIRS)) and np.isfinite(values).all()
        assert "logit" in key or np.abs(values).max() <= 1 + 1e-5
    # Batches, and the rows beside a row, change nothing.
    (alone,) = score_batch(subject, subject.encode([PAIRS[1].image], [TEXTS[1]]))
    for measure in ("centroid", "max", *QUERY_KEY):
        np.testing.assert_allclose(arrays[f"matched/{measure}"][:, 1], alone[measure], atol=2e-4)


def test_states_are_those_of_the_model():
    """LLaVA: recomputed from its own hidden states, and from its first layer's projections by hand."""
    subject = llava()
    encoded = subject.encode([PAIRS[0].image], [TEXTS[0]])
    (scores,) = score_batch(subject, encoded)
    with torch.no_grad():
        states = subject.model.model(**encoded.inputs, output_hidden_states=True).hidden_states
        layer = subject.decoder.layers[0]
        normed = layer.input_layernorm(states[0][0])
        query, key = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
    words, cells = encoded.text_BT[0], encoded.image_BT[0]
    assert subject.processor.tokenizer.decode(encoded.inputs["input_ids"][0][words]).strip() == TEXTS[0]
    assert cells.sum() == 9
    for index, layer_states in enumerate(states):
        expected = torch.cosine_similarity(layer_states[0, cells].mean(0), layer_states[0, words].mean(0), dim=0)
        assert scores["centroid"][index] == pytest.approx(float(expected), abs=1e-5)
    query = query[words].unflatten(-1, (4, 8)).mean(0)
    key = key[cells].unflatten(-1, (2, 8)).mean(0).repeat_interleave(2, 0)
    assert scores["qk_cosine"][0] == pytest.approx(float(torch.cosine_similarity(query, key).mean()), abs=1e-5)


def test_ours_compares_the_projected_picture_with_the_stream():
    """The picture's side is one and the same in every layer; padded cells are not part of it."""
    subject = ours()
    encoded = subject.encode([picture(100, 30)], [TEXTS[0]])
    (scores,) = score_batch(subject, encoded)
    assert scores["image_means"].shape == (1, 32) and scores["text_means"].shape == (6, 32)
    with torch.no_grad():
        states = subject.model.model(**encoded.inputs).image_outputs.pooler_output[0, 0]
    visible = encoded.inputs["visual_token_mask"][0, 0].bool()
    assert 0 < visible.sum() < 9
    np.testing.assert_allclose(scores["image_means"][0], states[visible].mean(0).numpy(), atol=1e-6)


def test_a_common_part_hides_what_centring_shows():
    """States that share a large offset: every cosine is near 1, and only centring tells the pairs apart."""
    generator = np.random.default_rng(0)
    shared, own = 50 * generator.normal(size=64), generator.normal(size=(1, 30, 64))
    other = own[:, derangement(30, 0)]

    runs = [{"image_means": own + shared, "text_means": text + shared} for text in (own, other)]
    matched, mismatched = centred(runs)
    assert matched.min() > 0.99 and np.abs(mismatched.mean()) < 0.1
    image, text = runs[1].values()
    plain = (image * text).sum(-1) / (np.linalg.norm(image, axis=-1) * np.linalg.norm(text, axis=-1))
    assert plain.min() > 0.99


def test_a_model_that_copies_the_picture_into_the_text_is_told_apart():
    """A stand-in for perfect alignment: the same scores, with text states equal to the image's where they match."""
    torch.manual_seed(0)
    images = torch.randn(40, 9, 32)
    partner = derangement(40, 0)
    matched = [float(reduce_tokens(image, image)["centroid"]) for image in images]
    mismatched = [float(reduce_tokens(images[i], images[partner[i]])["centroid"]) for i in range(40)]
    assert separation(np.array(matched), [np.array(mismatched)])["auroc"] == 1


def test_batches_do_not_matter():
    subject = ours()
    one, all_ = (stacked(score_pairs(subject, PAIRS, TEXTS, size, "", progress=False)) for size in (1, 5))
    for name in set(HIDDEN) - {"centred"}:
        np.testing.assert_allclose(one[name], all_[name], atol=1e-5)


def _write_rows(path, rows):
    features = {"id": Value("string"), "image": Image(), "question": Value("string"), "mask": Image()}
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)


def test_pairs_from_a_file(tmp_path):
    rows = [
        {"id": "a", "image": picture(), "question": "Is it red?\nYes or no", "mask": None},
        {"id": "b", "image": picture(seed=1), "question": "Is it red?", "mask": None},
        {"id": "c", "image": {"bytes": b"broken", "path": None}, "question": "Broken?", "mask": None},
        {"id": "d", "image": picture(seed=2), "question": "Is it blue?", "mask": None},
    ]
    _write_rows(tmp_path / "rows.parquet", rows)
    pairs, left_out = load_pairs(tmp_path / "rows.parquet", 10, distinct=True)
    assert [(pair.id, pair.text) for pair in pairs] == [("a", "Is it red?"), ("d", "Is it blue?")]
    assert left_out.repeated == 1
    (broken,) = left_out.bad
    assert broken["id"] == "c" and "row c, field image: the picture cannot be decoded" in broken["reason"]
    assert [pair.id for pair in load_pairs(tmp_path / "rows.parquet", 10)[0]] == ["a", "b", "d"]
    with pytest.raises(ValueError, match="row c, field image: the picture cannot be decoded"):
        load_pairs(tmp_path / "rows.parquet", 10, strict=True)
    with pytest.raises(ValueError, match="no text in title"):
        load_pairs(tmp_path / "rows.parquet", 10, "title", strict=True)
    with pytest.raises(ValueError, match=r"0 usable pair.*4 bad row.*the first: row a: no text in title"):
        load_pairs(tmp_path / "rows.parquet", 10, "title")
    with pytest.raises(ValueError, match="neither a folder of scenes nor a file"):
        load_pairs(tmp_path / "rows.txt", 10)
    with pytest.raises(ValueError, match="there is no"):
        load_pairs(tmp_path, 10)


def test_pictures_of_a_file_lie_in_its_folder(tmp_path):
    folder = tmp_path / "rows"
    (folder / "pictures").mkdir(parents=True)
    for name in ("a", "b"):
        picture().save(folder / "pictures" / f"{name}.png")
    picture().save(tmp_path / "outside.png")
    images = ["pictures/a.png", "../outside.png", str(tmp_path / "outside.png"), "gone.png", "pictures/b.png"]
    rows = [{"image": image, "caption": f"text {index}"} for index, image in enumerate(images)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs, left_out = load_pairs(folder / "rows.jsonl", 10)
    assert [pair.text for pair in pairs] == ["text 0", "text 4"] and pairs[0].image.size == (96, 96)
    assert [row["id"] for row in left_out.bad] == ["1", "2", "3"]
    assert all("leaves its folder" in row["reason"] for row in left_out.bad[:2])


class _Stop(Exception):
    """The machine goes down."""


def _stop_after(monkeypatch, batches):
    """`score_batch` does its work `batches` times more, then the machine is gone. Counts."""
    calls = []

    def counted(*arguments):
        if len(calls) == batches:
            raise _Stop
        calls.append(len(arguments[1].text_BT))
        return score_batch(*arguments)

    monkeypatch.setattr(similarity, "score_batch", counted)
    return calls


def test_a_picture_edited_in_its_file_is_another_run(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"one")
    arguments = (tmp_path, "similarity", ours().model, [Pair("a", tmp_path / "a.bin", "text")])
    Parts(*arguments)
    Parts(*arguments)
    (tmp_path / "a.bin").write_bytes(b"two")
    with pytest.raises(ValueError, match=r"parts holds another run \(pairs: "):
        Parts(*arguments)


def test_an_interrupted_run_goes_on_and_says_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(similarity, "CHUNK", 2)
    subject, settings = ours(), {"seeds": (0,), "batch_size": 2, "progress": False}
    whole = write_similarity(subject, "m", PAIRS, tmp_path / "whole", **settings)
    assert not (tmp_path / "whole" / "parts").exists()
    _stop_after(monkeypatch, 4)
    with pytest.raises(_Stop):
        write_similarity(subject, "m", PAIRS, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut" / "similarity.json").exists()
    with pytest.raises(ValueError, match=r"parts holds another run \(pairs: "):
        write_similarity(subject, "m", PAIRS[1:], tmp_path / "cut", **settings)
    with pytest.raises(ValueError, match=r"parts holds another run \(model: "):
        write_similarity(Subject(tiny_model(seed=1), subject.processor), "m", PAIRS, tmp_path / "cut", **settings)
    calls = _stop_after(monkeypatch, 100)
    # A smaller batch, because the machine ran out of memory, say.
    resumed = write_similarity(subject, "m", PAIRS, tmp_path / "cut", **{**settings, "batch_size": 1})
    assert calls == [1, 1, 1]  # of 5 matched and 5 mismatched pairs, the first 7 had been scored: 2, 2, 1 and 2
    assert resumed["headline"]["auroc"] == whole["headline"]["auroc"] and resumed["pairs"] == 5
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {"similarity.json", "scores.npz", "histogram.png", "layers.png"}
    with np.load(tmp_path / "whole" / "scores.npz") as first, np.load(tmp_path / "cut" / "scores.npz") as second:
        assert first.files == second.files
        for key in set(first.files) - {"ids"}:
            np.testing.assert_allclose(first[key], second[key], atol=1e-5)


def test_a_pair_that_cannot_be_scored_is_named_and_left_out(tmp_path):
    """A text that spells a control token, a picture that has gone since it was read; --strict stops at the first."""
    gone = tmp_path / "gone.png"
    bad = [Pair("control", picture(), "<|eot_id|>"), Pair("vanished", gone, "a house")]
    pairs = [PAIRS[0], bad[0], *PAIRS[1:4], bad[1], PAIRS[4]]
    subject = ours()
    summary, arrays = measure_similarity(subject, pairs, seeds=(0,), batch_size=3, progress=False)
    assert [row["id"] for row in summary["left_out"]] == ["control", "vanished"]
    assert (
        "a control token of the model" in summary["left_out"][0]["reason"]
        and "gone.png" in summary["left_out"][1]["reason"]
    )
    clean, expected = measure_similarity(subject, PAIRS, seeds=(0,), batch_size=3, progress=False)
    assert summary["pairs"] == clean["pairs"] == 5
    np.testing.assert_allclose(arrays["mismatched-0/centroid"], expected["mismatched-0/centroid"], atol=1e-5)
    with pytest.raises(ValueError, match="row control: the text holds"):
        measure_similarity(subject, pairs, seeds=(0,), strict=True, progress=False)
    with pytest.raises(ValueError, match="1 of 3 pairs can be scored; the first: the text holds"):
        measure_similarity(subject, [*bad, PAIRS[0]], seeds=(0,), progress=False)


@pytest.mark.parametrize(("option", "least"), [("--limit", 2), ("--seeds", 1), ("--batch-size", 1)])
def test_too_few_of_anything_is_said_at_once(option, least, capsys):
    with pytest.raises(SystemExit):
        main(["model", "data", "--output", "out", option, str(least - 1)])
    assert f"argument {option}: {least - 1} is too few; give {least} or more" in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    rows = [{"id": str(i), "image": pair.image, "question": pair.text, "mask": None} for i, pair in enumerate(PAIRS)]
    _write_rows(tmp_path / "rows.parquet", rows)
    main([str(tmp_path / "model"), str(tmp_path / "rows.parquet"), "--output", str(tmp_path / "out"), "--seeds", "2"])
    assert "over 5 pairs (0 bad row(s) left out)" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"similarity.json", "scores.npz", "histogram.png", "layers.png"}
    summary = json.loads((tmp_path / "out" / "similarity.json").read_text(encoding="utf-8"))
    assert summary["seeds"] == [0, 1] and summary["headline"]["measure"] == "centroid"
    with np.load(tmp_path / "out" / "scores.npz", allow_pickle=False) as scores:
        headline = scores["matched/centroid"][4]
    assert summary["headline"]["matched"]["mean"] == pytest.approx(float(headline.mean()), abs=1e-6)
