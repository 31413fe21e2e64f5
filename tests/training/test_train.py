"""The command line: recipes set the defaults, flags win."""

import shlex
from pathlib import Path

import pytest
import yaml

from agevlm import TINY
from agevlm.data.scenes.build import build_scenes
from agevlm.training import cli
from agevlm.training.lineage import stored_names, training_identity
from agevlm.training.stages import STAGES
from agevlm.training.train import main, parse


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "stage3.yaml"


def test_a_stage_without_flags_is_its_recipe():
    for number, stage in enumerate(STAGES, start=1):
        recipe, arguments, training, _ = parse([stage])
        assert (recipe.stage, recipe.variant, recipe.size) == (number, "agevlm", "paper")
        assert (arguments.dry_run, arguments.resume) == (False, True)
        assert training.learning_rate == 1e-5
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
        assert training.guidance_weight == (1.0 if number == 3 else 0.0)
        assert training.output_dir == f"runs/agevlm/{stage}"


def test_flags_win_over_the_recipe_and_the_batch_is_kept():
    flags = (
        "stage4_instruct --variant agevlm-lm --size tiny --freeze_self_attention --dry_run --mask_fraction 0.25 "
        "--per_device_train_batch_size 4 --learning_rate 2e-3 --vision_learning_rate 1e-4 --seed 7 --output_dir out "
        "--no_resume --init_from a/b"
    )
    recipe, arguments, training, _ = parse(shlex.split(flags))
    assert recipe.frozen == ("self_attention",)
    assert recipe.mask_fraction == 0.25
    assert recipe.training["guidance_weight"] == training.guidance_weight == 1.0
    assert (arguments.dry_run, arguments.resume, arguments.init_from) == (True, False, "a/b")
    assert training.per_device_train_batch_size == 4
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == recipe.global_batch_size
    assert (training.learning_rate, training.vision_learning_rate, training.seed) == (2e-3, 1e-4, 7)
    assert training.output_dir == "out"


def test_a_config_file_stands_between_recipe_and_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("size: tiny\nlearning_rate: 0.5\nseed: 3\n")
    recipe, _, training, _ = parse(["stage1_align", "--config", str(tmp_path / "run.yaml"), "--seed", "9"])
    assert recipe.size == "tiny"
    assert (training.learning_rate, training.seed) == (0.5, 9)
    assert training.lr_scheduler_type == "cosine"


def test_the_example_of_a_whole_stage_is_its_command_line(tmp_path, capsys):
    """What the file says gives the same arguments as the same flags, and can be run."""
    flags = []
    for name, value in yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")).items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    by_file, by_flags = parse(["stage3_ground", "--config", str(EXAMPLE)]), parse(["stage3_ground", *flags])
    assert len(flags) > 20 and by_file[0] == by_flags[0]
    for said, wanted in zip(by_file[1:], by_flags[1:], strict=True):
        assert vars(said) == vars(wanted) or said.to_dict() == wanted.to_dict()
    scenes = build_scenes(tmp_path / "scenes", captions=8, instructions=2, test=0, size=96, progress=False)
    here = ["--data", str(scenes), "--masks", str(scenes / "masks" / "captions.parquet"), "--init-from", str(TINY)]
    result = main(["stage3_ground", f"--config={EXAMPLE}", "--dry-run", *here])
    assert result.status == "dry run" and result.lineage["counts"]["rows with a mask"] == 8
    assert "stage3_ground (stage 3, agevlm, size tiny)" in capsys.readouterr().out


def test_a_configuration_file_is_written_as_a_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("size: tiny\nmask-fraction: 0.5\nmasks: a.parquet\nlearning-rate: 1e-3\n")
    recipe, arguments, training, _ = parse(["stage3_ground", "--config", str(path)])
    assert recipe.mask_fraction == 0.5 and arguments.masks == ["a.parquet"] and training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: tinny", "the field size is 'tinny'; choose from paper, small, tiny"),
        ("guidance-loss: dise", "the field guidance_loss is 'dise'; choose from dice, bce, kl"),
        ("learning_rat: 1", "learning_rat"),
        ("size: [tiny", "the file is no YAML"),
        ("- size", "must contain a YAML mapping"),
    ],
)
def test_a_wrong_configuration_file_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["stage3_ground", "--config", str(tmp_path / "run.yaml")])


def test_the_old_name_of_the_normalization_works_with_a_note(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("guidance_normalisation: max\n")
    for flags in (
        ["--guidance_normalisation", "max"],
        ["--guidance-normalisation=max"],
        ["--config", str(tmp_path / "run.yaml")],
    ):
        _, _, training, _ = parse(["stage3_ground", *flags])
        assert training.guidance_normalization == "max"
        assert capsys.readouterr().err.count("`guidance_normalisation` is now `guidance_normalization`") == 1
    assert stored_names(training_identity(training))["guidance_normalisation"] == "max"  # as stored earlier


def test_dry_run_from_the_command_line(tmp_path, capsys):
    result = main(["stage3_ground", "--dry_run", "--output_dir", str(tmp_path / "never")])
    assert result.status == "dry run"
    assert result.lineage["counts"]["steps"] == 19_532 and "77,000" in capsys.readouterr().out
    assert not (tmp_path / "never").exists()


def test_helps(capsys):
    """Ours without a stage too; the libraries' flags on request."""
    for words in ([], ["--help"], ["stage1_align", "-h"]):
        with pytest.raises(SystemExit):
            cli.train(words)
        shown = capsys.readouterr().out
        assert "stage2_adapt_vision" in shown and "--guidance-weight" in shown and "--fsdp" not in shown
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    shown = capsys.readouterr().out
    assert "--guidance_weight" in shown and "--fsdp" in shown


def test_wrong_commands_are_refused():
    with pytest.raises(ValueError, match=r"Unknown stage 'stage5'. Choose from stage1_align"):
        parse(["stage5"])
    with pytest.raises(ValueError, match=r"`--vision` does not exist for stage1_align"):
        parse(["stage1_align", "--vision", "vision_all"])
    with pytest.raises(ValueError, match="--no_such_flag"):
        parse(["stage1_align", "--no_such_flag", "1"])
