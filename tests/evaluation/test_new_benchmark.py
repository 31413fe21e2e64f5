"""A benchmark that this repository does not have, added as CONTRIBUTING says: its value and one registry line."""

import json
from dataclasses import replace

import pytest

from agevlm.evaluation import pope
from agevlm.evaluation.benchmark import Column, Source
from agevlm.evaluation.cli import evaluate as main
from agevlm.evaluation.leaderboard import read_metrics, results_page
from agevlm.evaluation.registry import BENCHMARKS
from builders import picture, save_tiny


# Questions about colors in a format of their own: other columns, rows numbered by two fields, the category in the
# file's name, another headline.
COLORS = replace(
    pope.PAPER,
    name="colors",
    rule="the question alone; yes or no",
    source=Source(
        "nobody/colors",
        None,
        ("test",),
        files=("colors_of_things.json",),
        renamed={"ask": "question", "say": "answer"},
        number=lambda row: (row["page"], row["line"]),
        from_name=lambda stem: {"category": stem.removeprefix("colors_of_")},
    ),
    columns=(Column("Colors", ("accuracy",), 0.01, 3),),
    shown=("accuracy", "recall"),
    headline="accuracy",
    prompt=lambda row: row["question"],
)


def test_one_value_and_one_line_are_enough(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BENCHMARKS, "colors", {"paper": COLORS})
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for index, answer in enumerate(("Yes", "No", "Yes", "No")):
        picture(40, 30, seed=index).save(folder / f"{index}.png")
        rows.append(
            {"page": index // 2, "line": index % 2, "image": f"{index}.png", "ask": "Is it red?", "say": answer}
        )
    (folder / "colors_of_things.json").write_text(json.dumps(rows))
    save_tiny(tmp_path / "model")
    command = [str(tmp_path / "model"), "--benchmarks", "colors", "--data", str(folder), "--max-new-tokens", "2"]
    main([*command, "--output", str(tmp_path / "out")])

    shown = capsys.readouterr().out
    assert "colors accuracy" in shown and "colors recall" in shown and "colors f1" not in shown
    metrics = read_metrics(tmp_path / "out" / "model" / "metrics.json")
    result = metrics["benchmarks"]["colors"]
    assert result["n"] == 4 and result["headline"] == "accuracy" and list(result["categories"]) == ["things"]
    lines = (tmp_path / "out" / "model" / "colors" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["0-0", "0-1", "1-0", "1-1"]
    header, *table = [line.split("|") for line in results_page([metrics]).splitlines() if line.startswith("|")]
    assert header[-2].strip() == "Colors"
    (ours,) = [cells for cells in table if cells[1].strip() == "model"]
    assert float(ours[-2]) == pytest.approx(result["accuracy"] / 100, abs=5e-4)
    (paper,) = [cells for cells in table if cells[1].strip() == "AGE-VLM"]
    assert paper[-2].strip() == "" and paper[-3].strip() == "87.34"
