"""Manifests and indexes of runs, which other programs may have changed."""

import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flownet2.errors import Error
from flownet2.manifest import Index, ManifestError, remove_manifest, update_manifest

HEADER = "number,first,second,time,next_time,file,bytes,crc32\n"
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELD = st.text(max_size=8) | st.sampled_from(["", "..", "/", "../x", "a.flo", "1e999", "nan", "9"])


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_is_ours_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        path.write_bytes(content)
        for change in (remove_manifest, lambda name: update_manifest(name, {"a": 1}, {})):
            with pytest.raises(ManifestError, match=r"manifest\.json"):
                change(folder)
            assert path.read_bytes() == content


@given(st.lists(st.lists(FIELD, min_size=7, max_size=9), max_size=4))
def test_any_index_leaves_other_files_alone(rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        inside, outside = Path(folder) / "out", Path(folder) / "x"
        inside.mkdir()
        outside.write_text("mine")
        (inside / "index.csv").write_bytes((HEADER + text.getvalue()).encode(errors="replace"))
        with contextlib.suppress(Error):
            index = Index(str(inside))
            index.rows()
            index.clear()
        assert outside.read_text() == "mine"


def test_an_index_that_was_cut_off_is_repaired(tmp_path: Path) -> None:
    index = Index(str(tmp_path))
    for number in range(3):
        index.write(f"{number}.flo", b"flow", number, ("a", "b"))
    path = tmp_path / "index.csv"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        index = Index(str(tmp_path))
        kept = [row.file for row in index.rows()]
        assert kept == [f"{number}.flo" for number in range(len(kept))]
        assert len(kept) >= whole[:length].count(b"\n") - 1
        assert all(index.has(file) for file in kept)
