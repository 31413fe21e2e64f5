"""Model cards, rendered from the facts that a run leaves behind (plain dictionaries, no model needed).

A card is never written by hand afterwards: it says what the lineage file says.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
STAGES = 4
TAGS = ["agevlm", "vision-language", "visual-grounding", "convnext", "llama"]


def render_card(facts: Mapping[str, Any]) -> ModelCard:
    """The card of an AGE-VLM checkpoint.

    Args:
        facts: what `agevlm_stage.json` holds; every field may be missing. Used: `name`, `stage`, `variant`, `size`,
            `repo` (the Hub repository), `parent` (`init_from`, `revision`, `repo` if that is a Hub repository), `data`
            (`rows`, `guided_rows`, `fingerprint`), `recipe_hash`, `git_commit`, `versions`, `metrics`, and `license`
            (`id`).
    """
    stage = facts.get("stage")
    parent = facts.get("parent") or {}
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        language="en",
        tags=TAGS,
        license=facts.get("license"),
        base_model=parent.get("repo"),
    )
    variant = facts.get("variant")
    title = "AGE-VLM" if variant is None else f"AGE-VLM ({variant}, {facts.get('size')} size)"
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title if stage is None else f"{title}, stage {stage}",
        repo=facts.get("repo") or ".",
        intermediate=stage is not None and stage < STAGES,
        stage=stage,
        stages=STAGES,
        name=facts.get("name"),
        facts=_facts(facts, parent),
        metrics=[(name, _number(value)) for name, value in (facts.get("metrics") or {}).items()],
    )


def write_card(folder: str | os.PathLike, facts: Mapping[str, Any]) -> Path:
    """Render the card of `facts` into `folder` as README.md (replaced in one step) and return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / "README.md", folder / ".README.md.tmp"
    temporary.write_text(str(render_card(facts)), encoding="utf-8")
    os.replace(temporary, target)
    return target


def _facts(facts: Mapping[str, Any], parent: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = facts.get("data") or {}
    versions = facts.get("versions") or {}
    rows = [
        ("stage", facts.get("name")),
        ("started from", parent.get("init_from")),
        ("revision of it", parent.get("revision")),
        ("rows", data.get("rows")),
        ("rows with a mask", data.get("guided_rows")),
        ("data fingerprint", data.get("fingerprint")),
        ("recipe hash", facts.get("recipe_hash")),
        ("git commit", facts.get("git_commit")),
        ("libraries", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    ]
    return [(key, str(value)) for key, value in rows if value is not None]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
