"""Files such as you may have, to try docs/own_data.md with: drawn pictures, conversations, masks and test questions.

python examples/own_files.py mine

mine/photos/*.jpg       drawn pictures of things that the tiny checkpoint has never seen
mine/llava.json         a description and two questions for each picture, in LLaVA's form
mine/coco.json          a mask of each thing, as COCO and many labeling tools write it
mine/questions.jsonl    questions about other pictures; mine/masks/*.png is what those answered yes are about
"""

import argparse
import json
from pathlib import Path

import numpy as np

from agevlm.data.scenes.arguments import SceneArguments
from agevlm.data.scenes.builder import SceneBuilder
from agevlm.data.scenes.words import join_phrases, plural, sentence, with_article


NAMES = ("anchor", "crown", "guitar", "heart", "lamp", "moon", "robot", "rocket", "spider", "umbrella")
ASK = "Please answer yes or no."  # as `agevlm eval` asks


def write_files(folder: Path, train: int = 200, test: int = 40) -> None:
    """Writes pictures with conversations and masks (`train`) and pictures with questions (`test`)."""
    builder = SceneBuilder(SceneArguments(names=NAMES, max_objects=2))
    pool = builder.pools["train"]
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True)
    rows: list[dict] = []
    questions: list[dict] = []
    images: list[dict] = []
    annotations: list[dict] = []
    categories: dict[str, int] = {}
    for number in range(train + test):
        rng = builder.stream("own", number)
        picture = builder.picture(rng, pool, word_rate=0)
        file, things = f"{number:04d}.jpg", [thing.described for thing in picture.scene.objects]
        picture.image.save(folder / "photos" / file, quality=90)
        everything = [f"{color} {name}" for name in pool.names for color in pool.colors[name]]
        absent = rng.choice([thing for thing in everything if thing not in things])
        asked = [(f"Is there {with_article(thing)} in the image? {ASK}", thing) for thing in (things[0], absent)]
        if number >= train:
            mask = f"masks/{number:04d}.png"
            shown = picture.mask([index for index, thing in enumerate(things) if thing == things[0]])
            assert shown is not None  # the first thing is there
            shown.save(folder / mask)
            questions += [
                {"image": f"photos/{file}", "question": asked[0][0], "answer": "yes", "mask": mask},
                {"image": f"photos/{file}", "question": asked[1][0], "answer": "no"},
            ]
            continue
        said = [plural(thing) if things.count(thing) > 1 else with_article(thing) for thing in dict.fromkeys(things)]
        caption = ("Describe the image.", sentence(join_phrases(said)))
        answers = [(question, "Yes" if thing in things else "No") for question, thing in asked]
        rng.shuffle(answers)
        for kind, turns in (("caption", [caption]), ("questions", answers)):
            messages = [
                {"from": who, "value": text}
                for turn in turns
                for who, text in zip(("human", "gpt"), turn, strict=True)
            ]
            messages[0]["value"] = f"<image>\n{messages[0]['value']}"
            rows.append({"id": f"{number:04d}-{kind}", "image": file, "conversations": messages})
        width, height = picture.image.size
        images.append({"id": number, "file_name": file, "width": width, "height": height})
        for index, thing in enumerate(things):
            column = (picture.owner == index).ravel(order="F")
            edges = np.flatnonzero(np.diff(column, prepend=False))
            runs = np.diff(edges, prepend=0, append=column.size).tolist()
            category = categories.setdefault(thing, len(categories))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 1,
                 "area": int(column.sum()), "segmentation": {"size": [height, width], "counts": runs}}
            )  # fmt: skip
    named = [{"id": index, "name": name} for name, index in categories.items()]
    coco = {"images": images, "annotations": annotations, "categories": named}
    (folder / "llava.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (folder / "coco.json").write_text(json.dumps(coco), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in questions)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder to write")
    place = parser.parse_args().folder
    if place.exists():
        parser.error(f"{place} is there already; choose another path")
    write_files(place)
