"""Rows: every way to break one is refused with its id, field and fix; paths stay inside."""

import io

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from PIL import Image

from agevlm.data.rows import ROW_FEATURES, content_digest, refuse_names, resolve_inside, undecoded, validate_row
from agevlm.data.tables import load_table, read_files
from agevlm.images import open_image


def jpeg(size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def mask(size=(40, 30)) -> Image.Image:
    picture = Image.new("1", size)
    picture.paste(1, (5, 5, 10, 10))
    return picture


def row(**changes) -> dict:
    base = {
        "id": "a-1",
        "images": [{"bytes": jpeg(), "path": None}],
        "messages": [
            {"role": "user", "content": "<|image|>Is there a cat?"},
            {"role": "assistant", "content": "Yes"},
        ],
        "guidance": {"query": "a cat", "message_index": 0, "mask": mask(), "source": "test", "score": 1.0},
    }
    return {**base, **changes}


def guidance(**changes) -> dict:
    return {**row()["guidance"], **changes}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_the_digest_of_content_changes_with_every_byte_and_with_no_name(tmp_path):
    def digest_of(picture, text="a", name="x.png", **more):
        row = {
            "id": "1",
            "images": [{"bytes": picture, "path": name}],
            "messages": [{"role": "user", "content": text}],
        }
        return content_digest(Dataset.from_list([{**row, **more}], features=ROW_FEATURES), ["images", "messages"])

    here = digest_of(b"picture")
    assert digest_of(b"picture", name="y.png") == here
    (tmp_path / "z.png").write_bytes(b"picture")
    assert digest_of(None, name=str(tmp_path / "z.png")) == here
    assert digest_of(b"picture", id="2") == here
    others = [digest_of(b"picturE"), digest_of(b"picture", "b"), digest_of(b"picture", images=[])]
    (tmp_path / "z.png").write_bytes(b"pictur3")
    assert len({here, *others, digest_of(None, name=str(tmp_path / "z.png"))}) == 5


def test_valid_rows_pass():
    validate_row(row())
    validate_row(row(guidance=None))
    validate_row(row(images=[], messages=user("hello"), guidance=None))
    two = [Image.new("RGB", (40, 30)), Image.new("RGB", (9, 9))]
    validate_row(row(images=two, messages=user("<|image|><|image|>a cat")))


BROKEN = {
    "no id": (row(id=""), "id is ''"),
    "images no list": (row(images=jpeg()), "images is bytes"),
    "no messages": (row(messages=[]), "messages is"),
    "role": (row(messages=[{"role": "bot", "content": "<|image|>"}]), "role is 'bot'"),
    "content": (row(messages=[{"role": "user", "content": None}]), "content is NoneType"),
    "picture without placeholder": (row(messages=user("a cat")), "0 <|image|> in messages but 1 pictures"),
    "placeholder without picture": (row(images=[], guidance=None), "1 <|image|> in messages but 0 pictures"),
    "assistant shows a picture": (row(messages=[{"role": "assistant", "content": "<|image|>"}]), "only user messages"),
    "truncated picture": (row(images=[{"bytes": jpeg()[:300], "path": None}]), "images[0]: the picture cannot"),
    "no picture": (row(images=[{"bytes": b"text", "path": None}]), "cannot be decoded"),
    "nothing": (row(images=[None]), "got NoneType"),
    "guidance field": (row(guidance={"query": "a cat"}), "guidance lacks"),
    "guidance without picture": (row(images=[], messages=user("a cat")), "without pictures"),
    "message index": (row(guidance=guidance(message_index=2)), "message_index is 2; use 0 to 1"),
    "query elsewhere": (row(guidance=guidance(message_index=1)), "'a cat' is not in messages[1]"),
    "query empty": (row(guidance=guidance(query="")), "guidance.query ''"),
    "mask size": (row(guidance=guidance(mask=mask((30, 40)))), "guidance.mask is 30 x 40 but images[0] is 40 x 30"),
    "mask empty": (row(guidance=guidance(mask=Image.new("1", (40, 30)))), "mask is empty"),
    "mask broken": (row(guidance=guidance(mask={"bytes": b"", "path": None})), "guidance.mask"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_refused(case):
    broken, message = BROKEN[case]
    with pytest.raises(ValueError) as caught:
        validate_row(broken, where="row 17 of train.parquet")
    text = str(caught.value)
    assert message in text
    assert text.startswith("row 17 of train.parquet")
    assert case == "no id" or "'a-1'" in text


def test_paths_cannot_leave_their_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    assert resolve_inside(root, "a/b.png") == root / "a/b.png"
    for path in ("../secret", "a/../../secret", str(outside), "link/file"):
        with pytest.raises(ValueError, match="leaves its folder"):
            resolve_inside(root, path)


def test_rows_are_left_undecoded_without_a_copy(tmp_path):
    item = {name: row()[name] for name in ROW_FEATURES}
    Dataset.from_list([item], features=ROW_FEATURES).to_parquet(tmp_path / "rows.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    bare = undecoded(rows.select([0]))
    assert bare[0] == item and bare.cache_files == rows.cache_files
    assert undecoded(bare) is bare


def test_a_parquet_file_names_no_file_of_this_machine(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    named = {"bytes": None, "path": str(secret)}
    images = [[], [{"bytes": jpeg(), "path": "a.jpg"}], [named, None], [{"bytes": None, "path": "http://a.b/c.png"}]]
    features = Features({"images": List(ImageFeature()), "guidance": {"mask": ImageFeature()}})
    masks = [{"mask": None}, {"mask": named}, {"mask": None}, {"mask": None}]
    rows = Dataset.from_dict({"images": images, "guidance": masks}, features=features)
    assert open_image(undecoded(rows)[2]["images"][0], "a script's row").size == (8, 8)
    pq.write_table(rows.data.table, tmp_path / "rows.parquet")
    for read in (read_files([tmp_path / "rows.parquet"]), load_table(str(tmp_path / "rows.parquet"))):
        kept = undecoded(read)
        assert kept[0]["images"] == [] and kept[2]["images"][1] is None and kept[0]["guidance"]["mask"] is None
        assert open_image(kept[1]["images"][0], "row").size == (40, 30)
        for refused in (kept[2]["images"][0], kept[3]["images"][0], kept[1]["guidance"]["mask"]):
            with pytest.raises(ValueError, match=r"row: there are no bytes.*(secret|http).* is not opened"):
                open_image(refused, "row")
        assert refuse_names(read) is read


def test_pictures_with_bytes_are_not_copied():
    images = [[{"bytes": jpeg(), "path": "a.jpg"}]]
    rows = Dataset.from_dict({"images": images}, Features({"images": List(ImageFeature())}))
    assert refuse_names(rows) is rows
