"""The paper's recipe, as a dry run prints it: every number, and where the paper says so."""

import io

import pytest
from rich.console import Console

from agevlm.training import stages
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage3_ground


STAGES = dict(enumerate(stages.STAGES.values(), start=1))

# Parameters at the paper's size: ConvNeXt-L without its last norm, Llama-3.2-1B with a tied head.
SIZES = {
    "vision embeddings": 9_792,
    "vision stage 1": 918_144,
    "vision stage 2": 3_901_440,
    "vision stage 3": 129_785_856,
    "vision stage 4": 61_612_032,
    "projector": 7_344_128,
    "LLM embeddings": 262_668_288,
    "LLM self-attention": 167_804_928,
    "LLM FFN": 805_339_136,
    "LLM head and final norm": 2_048,
    "cross-attention blocks": 243_286_016,
}
NEW = {"projector", "cross-attention blocks"}
TRAINS = {1: NEW, 2: NEW | {"vision stage 4"}, 3: NEW | {"vision stage 4"}, 4: set(SIZES)}
TOTALS = {1: 250_630_144, 2: 312_242_176, 3: 312_242_176, 4: 1_682_671_808}

OF_EVERY_STAGE = (
    "global_batch_size 128 section 4: 16 on each of 8 GPUs",
    "per_device_train_batch_size 16 section 4: 16 per GPU",
    "learning_rate 1e-05 appendix B",
    "weight_decay 0.1 appendix B",
    "warmup_steps 0.03 appendix B",
    "adam_beta2 0.95 appendix B",
    "num_train_epochs 1 appendix B",
    "optim adamw_torch_fused appendix B: Adam with weight decay",
    "guidance_normalization sum section 3.2.2: normalized to a distribution",
    "adam_beta1 0.9 not stated in the paper",
    "lr_scheduler_type cosine not stated in the paper",
    "bf16 True not stated in the paper",
    "rows per step 128 = 16 x 1 device(s) x 8 accumulated section 4: 16 on each of 8 GPUs",
)
MASKS = "sections 3.2.2 and 4: 77K of 2.5M captions, 150K of 10M instructions"
TRAINING_PARTS = "projector, cross_attention"
OF_A_STAGE = {
    1: (f"trains {TRAINING_PARTS} Table 1", "data captions section 4", f"mask_fraction 0.0 {MASKS}"),
    2: (f"trains {TRAINING_PARTS}, vision_last_stage Table 1", "data captions section 4"),
    3: (f"trains {TRAINING_PARTS}, vision_last_stage Table 1", f"mask_fraction 0.0308 {MASKS}"),
    4: (f"trains {TRAINING_PARTS}, vision_all, language_model Table 1", f"mask_fraction 0.015 {MASKS}"),
}
# rows, rows with a mask, steps of 128 rows, 3 % of them
COUNTS = {
    1: ("2,500,000", "0", "19,532", "586"),
    2: ("2,500,000", "0", "19,532", "586"),
    3: ("2,500,000", "77,000", "19,532", "586"),
    4: ("10,000,000", "150,000", "78,125", "2,344"),
}


def printed(recipe, folder, **arguments) -> list[str]:
    """The lines of a dry run, without the tables' borders."""
    console = Console(record=True, width=200, file=io.StringIO())
    run_stage(recipe, folder, dry_run=True, console=console, **arguments)
    return [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_the_papers_numbers_each_with_its_source(tmp_path, stage):
    lines = printed(STAGES[stage](), tmp_path / "never")
    rows, masks, steps, warmup = COUNTS[stage]
    wanted = [
        *OF_EVERY_STAGE,
        *OF_A_STAGE[stage],
        f"rows {rows} section 4: Cambrian 2.5M and 10M",
        f"rows with a mask {masks} sections 3.2.2 and 4",
        f"steps {steps} appendix B: one epoch",
        f"warmup steps {warmup} appendix B: 0.03 of the steps",
    ]
    for module, size in SIZES.items():
        wanted.append(f"{module} {size:,} " + (f"{size:,}" if module in TRAINS[stage] else "frozen"))
    wanted.append(f"total {sum(SIZES.values()):,} {TOTALS[stage]:,}")
    assert [line for line in wanted if line not in lines] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("variant", "guided"), [("agevlm", {3}), ("agevlm-lm", {3, 4}), ("ca-baseline", set())])
def test_the_variants_losses(tmp_path, variant, guided):
    for stage, recipe in STAGES.items():
        lines = printed(recipe(size="small", variant=variant), tmp_path / "never")
        assert f"guidance_weight {float(stage in guided)} Table 1, section 3.2.2" in lines


def test_what_differs_from_the_paper_is_shown_beside_what_the_paper_says(tmp_path):
    recipe = stage3_ground.recipe(vision="vision_all").override(learning_rate=3e-4, mask_fraction=0.5)
    lines = printed(recipe, tmp_path / "never")
    assert "learning_rate 0.0003 1e-05 (appendix B)" in lines
    assert f"mask_fraction 0.5 0.0308 ({MASKS})" in lines
    assert f"trains {TRAINING_PARTS}, vision_all {TRAINING_PARTS}, vision_last_stage (Table 1)" in lines
    assert "rows with a mask 1,250,000 77,000 (sections 3.2.2 and 4)" in lines
