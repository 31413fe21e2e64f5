"""Cards say what the run's facts say."""

from agevlm.hub_cards import render_card, write_card


FACTS = {
    "name": "stage3_ground",
    "stage": 3,
    "variant": "agevlm-lm",
    "size": "tiny",
    "repo": "someone/agevlm",
    "license": "apache-2.0",
    "parent": {"init_from": "someone/stage2", "revision": "abc123", "repo": "someone/stage2"},
    "data": {"rows": 1000, "guided_rows": 31, "fingerprint": "f00d"},
    "recipe_hash": "beef",
    "git_commit": None,
    "versions": {"torch": "2.13"},
    "metrics": {"loss": 1.23456, "guidance_loss": 0.5, "num_tokens": 1200},
}


def test_metadata_is_what_the_hub_reads():
    data = render_card(FACTS).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.base_model == "someone/stage2"
    assert data.license == "apache-2.0"
    assert "agevlm" in data.tags


def test_a_local_parent_is_named_but_no_base_model():
    card = render_card({**FACTS, "parent": {"init_from": "runs/stage2", "revision": None, "repo": None}})
    assert card.data.base_model is None
    assert "| started from | runs/stage2 |" in card.content
    assert "revision of it" not in card.content


def test_an_intermediate_stage_says_so_before_anything_else():
    lines = [line for line in render_card(FACTS).text.splitlines() if line]
    assert lines[0].startswith("# AGE-VLM (agevlm-lm")
    assert lines[1].startswith("> **Intermediate checkpoint**: stage 3 of 4 (stage3_ground)")
    assert "Intermediate" not in render_card({**FACTS, "stage": 4}).text


def test_facts_and_metrics_appear_and_missing_ones_do_not():
    text = render_card(FACTS).text
    for line in (
        "| rows | 1000 |",
        "| rows with a mask | 31 |",
        "| revision of it | abc123 |",
        "| recipe hash | beef |",
        "| libraries | torch 2.13 |",
        "| loss | 1.235 |",
        "| num_tokens | 1200 |",
        'repo = "someone/agevlm"',
    ):
        assert line in text
    assert "git commit" not in text
    assert "None" not in text


def test_a_card_without_facts_is_still_a_card(tmp_path):
    path = write_card(tmp_path / "new", {})
    assert path.read_text().startswith("---\nlanguage: en")
    assert "None" not in path.read_text()
    assert [item.name for item in path.parent.iterdir()] == ["README.md"]
