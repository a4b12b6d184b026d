"""Many prompts: what files of prompts may hold, and what is named before a model is loaded."""

import json
from dataclasses import replace

import pytest

from model.generation.prompt_files import answer_seed, read_prompts
from model.generation.sampling import MAX_SEED

SIZE = (64, 32)
TEMPLATE = "Generate an image of 64x32 according to the following prompt:\n"


def test_a_text_file_has_one_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red cat\r\n\n  two \u2028 dogs\n", encoding="utf-8")
    first, second = read_prompts(path, None, has_template=True)
    assert (first.text, first.name, first.size, first.seed, first.images) == ("a red cat", "00000", None, None, ())
    assert second.text == "two \u2028 dogs" and second.name == "00001"
    assert json.loads(first.source) == {"prompt": "a red cat"}


def test_json_lines_have_more(tmp_path):
    (tmp_path / "cat.png").touch()
    lines = [
        '{"prompt": "a cat",   "image": ["cat.png", "pyproject.toml"], "size": "32x64", "seed": 3, "id": 7}',
        '{"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches", "id": null}',
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(lines))
    first, second = read_prompts(path, SIZE, has_template=True)
    # A prompt with images stays as it is, and paths are beside the file, else in the working directory.
    assert (first.text, first.name, first.size, first.seed) == ("a cat", "7", (32, 64), 3)
    assert [path.name for path in first.images] == ["cat.png", "pyproject.toml"]
    # GenEval's keys mean nothing here, and are kept.
    assert (second.text, second.name, second.size) == (TEMPLATE + "two benches", "00001", SIZE)
    assert [first.source, second.source] == lines


def test_a_folder_has_one_prompt_per_txt_file(tmp_path):
    for name, text in (("partiprompts2.txt", "a cat\n"), ("10.txt", "a dog\nin the rain\n"), ("dpg_bench.csv", "x")):
        (tmp_path / name).write_text(text)
    prompts = read_prompts(tmp_path, None, has_template=True)
    assert [(prompt.name, prompt.text) for prompt in prompts] == [
        ("10", "a dog\nin the rain"),
        ("partiprompts2", "a cat"),
    ]


@pytest.mark.parametrize(
    "text, size, has_template, expected",
    [
        ("a cat", SIZE, True, TEMPLATE + "a cat"),
        ("a cat", SIZE, False, "a cat"),
        ("a cat", None, True, "a cat"),
        ("Generate an image of a cat", SIZE, True, "Generate an image of a cat"),
    ],
)
def test_a_prompt_with_a_size_gets_the_recipe_s_words(tmp_path, text, size, has_template, expected):
    (tmp_path / "p.txt").write_text(text)
    assert read_prompts(tmp_path / "p.txt", size, has_template)[0].text == expected


def test_seeds_depend_on_the_run_s_seed_the_place_and_the_number(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "a", "seed": 5}')
    prompts = read_prompts(tmp_path / "p.jsonl", None, has_template=True)
    cases = [(place, number, seed) for place in (0, 1) for number in (0, 1) for seed in (0, 1)]
    seeds = [answer_seed(prompts[place], place, number, seed) for place, number, seed in cases]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    # Written down: other seeds would be other images under the same command.
    assert answer_seed(prompts[0], 0, 0, 0) == 5_346_321_772_774_276_043
    assert [answer_seed(prompts[2], 2, number, seed) for number, seed in ((0, 0), (0, 9), (1, 0))] == [5, 5, 6]
    assert answer_seed(replace(prompts[2], seed=MAX_SEED), 2, 1, 0) == 0


@pytest.mark.parametrize(
    "content, message",
    [
        ("\n \n", "has no prompts; it must have a prompt on each line"),
        ('{"prompt": "a"}\n\n{"prompt": \n', "line 3 of .*no JSON"),
        ('["a"]', "line 1 of .*an object with a text `prompt`"),
        ('{"prompt": " "}', "an object with a text `prompt`"),
        ('{"prompt": "a", "image": "absent.png"}', "line 1 of .*image 'absent.png' is not there"),
        ('{"prompt": "a", "image": 3}', "`image` must be a path or a list of paths"),
        ('{"prompt": "<|image|>a"}', r"1 <\|image\|>, but there are 0 images"),
        ('{"prompt": "a", "size": "big"}', "'big' is no size"),
        ('{"prompt": "a", "size": "100x64"}', "100x64 must be in multiples of 32"),
        ('{"prompt": "a", "seed": -1}', "`seed` must be a whole number"),
        ('{"prompt": "a", "id": []}', "`id` must be a text or a number"),
        ('{"prompt": "a", "id": "\\ud800"}', "`id` must be a text or a number, in valid UTF-8"),
        ('{"prompt": "a", "image": "' + "a" * 5000 + '"}', "image 'aaaa.*aaaa' is not there"),
        ("[" * 100_000, "line 1 of .*no JSON"),
        ("[]\n" * 8, "(?s)line 5 of .*\nand 3 more like these"),
        ("\udcff", "is not valid UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_prompts(path, None, has_template=True)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        read_prompts(tmp_path / "absent.txt", None, has_template=True)
    with pytest.raises(ValueError, match=r"has no prompts; it must have \*.txt files"):
        read_prompts(tmp_path, None, has_template=True)
