"""Tests of prompt files, which are read completely or rejected with the line of each problem."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from difrl.data.jsonl import DataFileError
from difrl.data.prompts import Prompt, check_images, load_prompts
from difrl.tasks import shapes

GENEVAL_ROW = {
    "tag": "two_object",
    "include": [{"class": "bench", "count": 1}, {"class": "dog", "count": 1}],
    "prompt": "a photo of a bench and a dog",
}


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    text = "\ufeff# colours\na red circle\r\n\n  two blue squares  \n#nofilter sunset\n#\n"
    prompts = load_prompts(written(tmp_path, "p.txt", text))
    assert [p.text for p in prompts] == ["a red circle", "two blue squares", "#nofilter sunset"]
    assert prompts[0] == Prompt("a red circle", {}, None, 1.0)


def test_json_lines_with_everything(tmp_path: Path) -> None:
    row = {"prompt": "a “sign”\u2028", "metadata": {"k": [1]}, "negative": "blur", "weight": 2}
    text = json.dumps(row, ensure_ascii=False) + '\n\n{"prompt": "b", "negative": null}\n'
    assert load_prompts(written(tmp_path, "p.jsonl", text)) == [
        Prompt("a “sign”\u2028", {"k": [1]}, "blur", 2.0),
        Prompt("b", {}, None, 1.0),
    ]


def test_geneval_rows_are_their_own_metadata(tmp_path: Path) -> None:
    row = {**GENEVAL_ROW, "weight": 3.5}
    (prompt,) = load_prompts(written(tmp_path, "evaluation_metadata.jsonl", json.dumps(row)))
    assert prompt == Prompt(GENEVAL_ROW["prompt"], GENEVAL_ROW, None, 3.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not valid JSON at column 15"),
        ('["a"]', 'expected an object such as {"prompt": "a red circle"}, found a list'),
        ('{"text": "a", "tag": 1}', '"prompt" is missing, found "text", "tag"'),
        ('{"prompt": 3}', '"prompt" must be text that is not empty, found 3'),
        ('{"prompt": " "}', '"prompt" must be text that is not empty, found " "'),
        ('{"prompt": "a", "weight": 0}', '"weight" must be a number above 0, found 0'),
        ('{"prompt": "a", "weight": -1.5}', '"weight" must be a number above 0, found -1.5'),
        ('{"prompt": "a", "weight": true}', '"weight" must be a number above 0, found true'),
        ('{"prompt": "a", "weight": "2"}', '"weight" must be a number above 0, found "2"'),
        ('{"prompt": "a", "weight": 1e999}', '"weight" must be a number above 0, found inf'),
        ('{"prompt": "a", "weight": NaN}', "NaN is not JSON"),
        ('{"prompt": "a", "negative": 1}', '"negative" must be text or null, found 1'),
        ('{"prompt": "a", "negative_prompt": "b"}', 'write "negative"'),
        ('{"prompt": "a", "metadata": "b"}', '"metadata" must be an object, found "b"'),
        ('{"prompt": "a", "metadata": {}, "tag": 1}', 'unknown key "tag"; put it inside "metadata"'),
        ('{"prompt": "a", "prompt": "b"}', '"prompt" is given twice'),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    source = written(tmp_path, "p.jsonl", f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(DataFileError) as caught:
        load_prompts(source)
    assert str(caught.value).startswith(f"{source}:3: ")
    assert message in str(caught.value)


def test_every_broken_line_is_listed_up_to_ten(tmp_path: Path) -> None:
    source = written(tmp_path, "p.jsonl", "{}\n" * 12)
    with pytest.raises(DataFileError) as caught:
        load_prompts(source)
    lines = str(caught.value).split("\n")
    assert len(lines) == 11
    assert lines[9].startswith(f"{source}:10: ")
    assert lines[10] == "and 2 lines more"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="no prompt in it"):
        load_prompts(written(tmp_path, "empty.txt", "\n# only this\n"))
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataFileError, match=r"latin\.txt:2: not UTF-8"):
        load_prompts("latin.txt", base=tmp_path)
    with pytest.raises(DataFileError, match=r"latn\.txt: no such file, looked for .*did you mean .*latin\.txt"):
        load_prompts("latn.txt", base=tmp_path)
    with pytest.raises(DataFileError, match=r"expected a \.txt or \.jsonl file"):
        load_prompts("prompts.csv", base=tmp_path)


def test_built_in_sets() -> None:
    train, evaluation, everything = (load_prompts(f"shapes:{split}") for split in ("train", "eval", "all"))
    assert [p.text for p in train] == [p.text for p in shapes.prompts("train")]
    assert {p.text for p in train} | {p.text for p in evaluation} == {p.text for p in everything}
    assert train[0].metadata["include"]
    with pytest.raises(DataFileError, match=r"shapes:test: there is no built-in set.*shapes:"):
        load_prompts("shapes:test")


def test_arithmetic_is_built_in_and_holds_its_answers() -> None:
    train, evaluation, everything = (load_prompts(f"arithmetic:{split}") for split in ("train", "eval", "all"))
    assert len(train) + len(evaluation) == len(everything) == 15_050
    assert all(eval(p.text.removesuffix("=")) == int(p.metadata["answer"]) for p in everything[::97])
    with pytest.raises(DataFileError, match=r"arithmetic:test: .*did you mean arithmetic:"):
        load_prompts("arithmetic:test")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(DataFileError, match=f"{name}: a device or a pipe, expected a file with text"):
        load_prompts(str(path))
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataFileError, match=f"{name}: a device or a pipe, expected a file with text"):
        load_prompts(str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(DataFileError, match=f"{name}: a folder, expected a file with text"):
        load_prompts(str(path))
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(200_000_000)  # a sparse file
    with pytest.raises(DataFileError, match=f"{name}: 200 MB, expected at most 100 MB"):
        load_prompts(str(path))
    path.write_text("\n" * 1_000_000)
    with pytest.raises(DataFileError, match="1,000,001 lines, expected at most 1,000,000"):
        load_prompts(str(path))
    path.write_text("\n" + "x" * 1_000_001)
    with pytest.raises(DataFileError, match=f"{name}:2: a line of 1,000,001 characters"):
        load_prompts(str(path))
    path.write_bytes(b"a\nb\0c\n")
    with pytest.raises(DataFileError, match=rf"{name}:2: found the character U\+0000"):
        load_prompts(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ' + "[" * 100_000, "nested too deep"),
        ('{"prompt": "a\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "a", "weight": ' + "9" * 5_000 + "}", "Exceeds the limit"),
    ],
    ids=["deep", "surrogate", "digits"],
)
def test_a_line_that_python_cannot_hold_is_named(tmp_path: Path, line: str, message: str) -> None:
    source = written(tmp_path, "p.jsonl", f'{{"prompt": "fine \\ud83d\\ude00"}}\n{line}\n')
    with pytest.raises(DataFileError, match=message) as caught:
        load_prompts(source)
    assert str(caught.value).startswith(f"{source}:2: ")


def picture(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 0)).save(path)
    return path


def test_input_images_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "metadata" and in flat rows, in whose metadata the image is not repeated, and from a relative path."""
    cat, dog = picture(tmp_path / "data" / "cat.png"), picture(tmp_path / "data" / "far" / "dog.png", (40, 9))
    rows = [
        {"prompt": "make it red", "image": "cat.png", "mask": "far/dog.png", "metadata": {"n": 1}},
        {"prompt": "turn it", "image": "far/dog.png", "tag": "turn"},
        {"prompt": "turn it", "image": str(dog)},
    ]
    written(tmp_path / "data", "p.jsonl", "\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    prompts = load_prompts("data/p.jsonl")
    assert prompts == [
        Prompt("make it red", {"n": 1}, image=cat, mask=dog),
        Prompt("turn it", {"prompt": "turn it", "tag": "turn"}, image=dog),
        Prompt("turn it", {}, image=dog),
    ]
    check_images(prompts)


def test_mask_without_an_input_image_is_metadata(tmp_path: Path) -> None:
    row = {"prompt": "a cat", "mask": "none.png"}
    assert load_prompts(written(tmp_path, "p.jsonl", json.dumps(row))) == [Prompt("a cat", row)]


@pytest.mark.parametrize("name", ["cat.png", "missing.png", 3, None])
def test_image_of_a_text_run_is_metadata(tmp_path: Path, name: object) -> None:
    row = {"prompt": "1+1=", "image": name}
    (prompt,) = load_prompts(written(tmp_path, "p.jsonl", json.dumps(row)), images=False)
    assert prompt == Prompt("1+1=", row)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ('"cat.jpg"', '"image": there is no image {folder}/cat.jpg; it belongs to the input image'),
        ('""', '"image" must be the path of an image, found ""'),
        ("3", '"image" must be the path of an image, found 3'),
        ('["cat.png"]', '"image" must be the path of an image, found a list'),
        (f'"{"x" * 5000}"', '"image": there is no image'),
        ('"cat.png", "metadata": {"image": "dog.png"}', '"metadata" has "image", where rewards find that of the row'),
        ('"cat.png", "mask": "m.png"', '"mask": there is no image {folder}/m.png; it belongs to the input image'),
        ('"cat.png", "mask": "cat.png", "metadata": {"mask": 1}', '"metadata" has "mask", where rewards find'),
    ],
)
def test_an_input_image_that_is_not_there_is_named(tmp_path: Path, image: str, message: str) -> None:
    picture(tmp_path / "cat.png")
    source = written(tmp_path, "p.jsonl", f'{{"prompt": "a", "image": "cat.png"}}\n{{"prompt": "b", "image": {image}}}')
    with pytest.raises(DataFileError) as caught:
        load_prompts(source)
    assert str(caught.value).startswith(f"{source}:2: {message.format(folder=tmp_path)}")


def test_all_rows_have_an_input_image_or_none_has(tmp_path: Path) -> None:
    """The rows that differ are named: those in the minority, up to ten."""
    picture(tmp_path / "cat.png")
    having, lacking = '{"prompt": "a", "image": "cat.png"}\n', '{"prompt": "a", "image": null}\n'
    source = written(tmp_path, "p.jsonl", having * 3 + lacking + having)
    with pytest.raises(DataFileError) as caught:
        load_prompts(source)
    rule = "expected all or none"
    assert str(caught.value) == f"{source}: 4 of 5 rows have an input image, {rule}; these have none: {source}:4"
    source = written(tmp_path, "p.jsonl", lacking * 13 + having * 12)
    with pytest.raises(DataFileError) as caught:
        load_prompts(source)
    assert f"12 of 25 rows have an input image, {rule}; only these have one: {source}:14, " in str(caught.value)
    assert str(caught.value).endswith(f"{source}:23 and 2 more")
    assert len(load_prompts(written(tmp_path, "p.jsonl", lacking * 2))) == 2


def test_input_images_are_decoded_and_named_with_their_first_line(tmp_path: Path) -> None:
    picture(tmp_path / "cat.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cat.png").read_bytes()[:45])
    (tmp_path / "folder").mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 0, 9)).save(tmp_path / "clear.png")
    names = ["cat.png", "cut.png", "folder", "cut.png"]
    rows = [
        *({"prompt": "a", "image": name} for name in names),
        {"prompt": "a", "image": "cat.png", "mask": "clear.png"},
    ]
    source = written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)))
    prompts = load_prompts(source)
    with pytest.raises(DataFileError) as caught:
        check_images(prompts)
    found = str(caught.value).split("\n")
    expected = [(2, "cut.png: a damaged or truncated PNG"), (3, "folder: there is no"), (5, "clear.png: transparent")]
    assert len(found) == 3
    for message, (line, problem) in zip(found, expected, strict=True):
        assert message.startswith(f"{source}:{line}: {tmp_path}/{problem}")
