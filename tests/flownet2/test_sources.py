"""Sources of a run: which files are taken, in which pairs, under which names."""

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flownet2 import Error
from flownet2.lists import ListError, read_pairs, read_sources
from flownet2.pairs import Position, Selection, SourceError
from flownet2.sources import find, shard
from tests.support.videos import write_video

CASES = Path(__file__).parents[3] / "shared" / "cases"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def picture(path: Path, value: int = 0, format: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(path, format)


def pairs_of(*arguments: object, **options: object) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Return the names of the frames of all pairs by source, and what was printed."""
    warnings: list[str] = []
    found = find(map(str, arguments), warnings.append)
    pairs = {
        name: [
            (pair.first.name, pair.second.name)
            for pair in source.pairs(Selection(**options), warnings.append)
        ]
        for name, source in found.items()
    }
    return pairs, "\n".join(warnings)


@pytest.mark.parametrize("place", ["photo[1].jpg", "photo[1]/a.jpg"])
def test_a_name_that_exists_is_not_a_pattern(tmp_path: Path, place: str) -> None:
    touch(tmp_path, place, place.replace("[1]", "1"), "what?.jpg", "whats.jpg", "a*.jpg", "ab.jpg")
    for name in (place, "what?.jpg", "a*.jpg"):
        (source,) = find([str(tmp_path / name)]).values()
        assert source.files == (str(tmp_path / name),)


def test_a_pattern_in_a_folder_whose_name_looks_like_one(tmp_path: Path) -> None:
    touch(tmp_path, "take[1]/b.jpg", "take[1]/a.jpg", "take1/c.jpg")
    (source,) = find([f"{tmp_path}/take[1]/*.jpg"]).values()
    assert [Path(file).name for file in source.files] == ["a.jpg", "b.jpg"]


def test_numbered_names_as_ffmpeg_writes_them(tmp_path: Path) -> None:
    touch(tmp_path, "f[1]_0009.jpg", "f[1]_0010.jpg", "f[1]_9.jpg", "f[1]_x.jpg", "f1_0011.jpg")
    (source,) = find([f"{tmp_path}/f[1]_%04d.jpg"]).values()
    assert [Path(file).name for file in source.files] == ["f[1]_0009.jpg", "f[1]_0010.jpg"]


def test_machines_that_list_in_other_orders_share_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"v_{kind}_g{number:02}.avi" for number in range(20) for kind in ("run", "jump")]
    found = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        touch(folder, *names)
        monkeypatch.chdir(folder)
        found.append(find(random.Random(seed).sample(names, len(names))))
    assert list(found[0]) == list(found[1])
    parts = [list(shard(found[machine], machine, 2)) for machine in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(found[0])
    assert min(map(len, parts)) > 10


def test_shards_do_not_move_when_a_file_is_added(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.avi" for number in range(30)))
    before = set(shard(find([str(tmp_path)]), 0, 3))
    touch(tmp_path, "0a.avi")
    assert set(shard(find([str(tmp_path)]), 0, 3)) - {"0a"} == before


def test_a_folder_is_searched_with_its_subfolders(tmp_path: Path) -> None:
    write_video(tmp_path / "run" / "a.mp4", 3)
    write_video(tmp_path / "run" / "a.3gp", 3)
    write_video(tmp_path / "jump" / "a.mp4", 3)
    write_video(tmp_path / "jump" / "b.bin", 3, format="mov")
    for number in range(2):
        picture(tmp_path / "frames" / f"{number}.png", number)
        picture(tmp_path / "frames" / "odd" / f"{number}.img", number, "PNG")
    touch(tmp_path, "frames/.hidden.png", "frames/._0.png", ".git/x.png", "notes.txt", "a.bin")
    pairs, said = pairs_of(tmp_path)
    assert list(pairs) == [
        "frames", "frames/odd", "jump/a", "jump/b", "run/a.3gp", "run/a.mp4",
    ]  # fmt: skip
    assert {len(of_source) for name, of_source in pairs.items() if "frames" in name} == {1}
    assert "notes.txt" in said
    assert "a.bin" in said
    assert "hidden" not in said


def test_results_of_a_run_are_no_sources(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png")
    picture(tmp_path / "out" / "0" / "000000.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"options": {}, "model": {}, "sources": {}}')
    picture(tmp_path / "other" / "0" / "000000.png")
    said: list[str] = []
    assert list(find([str(tmp_path)], said.append, exclude=[str(tmp_path / "out")])) == [
        tmp_path.name
    ]
    assert "other" in said[0]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".jfif", ".avif", ".jp2", ".pbm", ""])
def test_images_of_many_kinds(tmp_path: Path, suffix: str) -> None:
    formats = {".jfif": "JPEG", ".jp2": "JPEG2000", "": "PNG", ".pbm": "PPM"}
    for number in range(2):
        picture(tmp_path / f"{number}{suffix}", number, formats.get(suffix))
    pairs, _ = pairs_of(tmp_path)
    assert pairs == {tmp_path.name: [(f"0{suffix}", f"1{suffix}")]}


def test_an_animated_gif_is_a_video(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((16, 16), value, np.uint8)) for value in (0, 90, 180)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=40)
    pairs, _ = pairs_of(tmp_path)
    assert pairs == {"a": [("0", "1"), ("1", "2")]}


def test_a_gap_in_the_numbers_is_named(tmp_path: Path) -> None:
    touch(tmp_path, *(f"frame_{number:04}.png" for number in (0, 2, 4, 10, 12, 14)))
    pairs, said = pairs_of(tmp_path)
    assert len(pairs[tmp_path.name]) == 5
    assert "frame_0004.png and frame_0010.png" in said
    assert "frame_0002" not in said
    touch(tmp_path, "frame_0006.png", "frame_0008.png")
    assert pairs_of(tmp_path)[1] == ""


@pytest.mark.parametrize(
    "form",
    ["{:06}_10.png {:06}_11.png", "{:05}_img1.ppm {:05}_img2.ppm", "{:06}_0000.png {:06}_0001.png"],
)
def test_frames_of_different_scenes_of_a_dataset_make_no_pair(tmp_path: Path, form: str) -> None:
    scenes = [tuple(form.format(scene, scene).split()) for scene in range(3)]
    touch(tmp_path, *(name for scene in scenes for name in scene))
    pairs, said = pairs_of(tmp_path)
    assert pairs[tmp_path.name] == scenes
    assert "scenes" in said


def test_frames_given_twice_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    with pytest.raises(SourceError, match="is given twice"):
        find([f"{tmp_path}/*.png", f"{tmp_path}/a.png"])


def test_times_need_a_video(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    for options in ({"fps": 5.0}, {"start": Position(1, seconds=True)}):
        with pytest.raises(SourceError, match="has no times"):
            pairs_of(tmp_path, **options)


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        ("it's/a.png b.png", ("it's/a.png", "b.png", "")),
        ("'tis.png b.png", ("'tis.png", "b.png", "")),
        ("a#2.png b.png out", ("a#2.png", "b.png", "out")),
        ("#1.png b.png", ("#1.png", "b.png", "")),
        (r"it's\a.png b.png x\y.flo", ("it's/a.png", "b.png", "x/y")),
        ("my clip/a.png\tb.png", ("my clip/a.png", "b.png", "")),
        ("a.png\t\tb.png\tclip.0001", ("a.png", "b.png", "clip.0001")),
        ("a.png b.png\tout", ("a.png", "b.png", "out")),
        ("""  "my clip/a.png"  'b.png' "an out.npy" """, ("my clip/a.png", "b.png", "an out")),
        ("a.png b.png clip.0001.flo", ("a.png", "b.png", "clip.0001")),
        ("é.png b.png", ("é.png", "b.png", "")),
    ],
)
def test_a_line_of_a_list(tmp_path: Path, line: str, pair: tuple[str, str, str]) -> None:
    touch(tmp_path, *pair[:2])
    expected = (*(str(tmp_path / name) for name in pair[:2]), pair[2], 2)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        for end in ("\n", "\r\n", ""):
            (tmp_path / "list.txt").write_bytes(f"# list\n{line}{end}".encode(encoding))
            (listed,) = read_pairs(str(tmp_path / "list.txt"))
            found = (listed.first, listed.second, listed.output, listed.line)
            assert found == expected, encoding


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists nothing"),
        ("# none\n\n", "lists nothing"),
        ("a.png b.png\nmy own a.png b.png\n", "line 2"),
        ("a.png b.png ../x\n", "line 1"),
        ("a.png b.png /x\n", "line 1"),
        ("a.png b.png .mp4/x\n", "line 1"),
        ("a.png b.png #note\n", "line 1"),
        ("a.png\n", "line 1"),
        ("clip.mp4\na.png b.png\n", "line 2"),
        ("a.png b.png\0\n", "not a text"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ListError, match=message):
        pairs_of(tmp_path / "list.txt")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_list_or_refused(content: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"list-{os.getpid()}.txt"
    path.write_bytes(content)
    for read in (read_pairs, read_sources):
        with contextlib.suppress(Error):
            read(str(path))
    path.unlink()


def test_a_list_of_videos(tmp_path: Path) -> None:
    touch(tmp_path, "run/a b.avi", "run/c.avi", "jump/a.avi")
    (tmp_path / "list.txt").write_text("run/a b.avi\nrun/c.avi 3\njump/a.avi 12\n")
    assert list(find([str(tmp_path / "list.txt")])) == ["jump/a", "run/a b", "run/c"]


def test_cases_of_users(tmp_path: Path) -> None:
    if not CASES.exists():
        pytest.skip("the cases are not here")
    names = CASES / "names"
    (source,) = find([str(names / "dup" / f"photo[{n}].jpg") for n in (1, 2)]).values()
    assert [Path(file).name for file in source.files] == ["photo[1].jpg", "photo[2].jpg"]
    for name, second in {
        "apostrophe1": "f1.png",
        "hash": "f1#2.png",
        "backslash": "f1.png",
    }.items():
        (pair,) = read_pairs(str(CASES / "lists" / f"{name}.txt"))
        assert Path(pair.second).name == second
        assert Path(pair.first).exists()
        assert Path(pair.second).exists()
    dotted = read_pairs(str(CASES / "lists" / "dotted.txt"))
    assert [pair.output for pair in dotted] == ["clip.0001", "clip.0002"]
    assert len(find([str(CASES / "video" / "folder")])) == 3
    assert "frame_0001.png and frame_0004.png" in pairs_of(names / "gap")[1]
    kitti, _ = pairs_of(CASES / "data" / "kitti" / "testing" / "image_2")
    assert kitti["image_2"] == [(f"00000{n}_10.png", f"00000{n}_11.png") for n in (0, 1)]
    assert pairs_of(names / "appledouble")[0] == {"appledouble": [("f0.png", "f1.png")]}
