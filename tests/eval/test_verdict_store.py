from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys

import pytest

from still.eval.verdict_store import Kept, VerdictStore, default_store, verdict_key
from still.eval.verdicts import Tokens

KEPT = Kept("pass", "because", ("quoted",), ("misquoted",), "judge", Tokens(9, 8, 7, 6, 5, 4))


def test_what_is_kept_comes_back_from_the_file(tmp_path):
    path = tmp_path / "deep" / "verdicts.sqlite"
    with VerdictStore(path) as store:
        assert store.get(b"k") is None
        store.put([(b"k", KEPT), (b"l", Kept("fail", "no"))])
        store.put([(b"k", Kept("fail", "later"))])
    with VerdictStore(path) as store:
        assert store.get(b"k") == KEPT, "the first one stays"
        assert store.get(b"l").label == "fail"
        assert len(store) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("label", ["unscored", "error", "", "PASS"])
def test_only_a_verdict_is_kept(label):
    with VerdictStore() as store:
        with pytest.raises(ValueError, match="never cached"):
            store.put([(b"a", KEPT), (b"b", Kept(label, ""))])
        assert len(store) == 0
        with pytest.raises(sqlite3.IntegrityError):
            store._base.execute("INSERT INTO verdicts VALUES (x'00', 'unscored', '', '', '[]', 0)")


def test_a_key_is_the_content_and_the_content_alone():
    key = verdict_key("a", None, "b")
    assert key == verdict_key("a", None, "b")
    assert len(key) == 32
    others = [("a", "None", "b"), ("a", 0, "b"), ("a", None, "b", ""), ("ab", None, ""), ("b", None, "a")]
    assert len({key, *(verdict_key(*parts) for parts in others)}) == 6


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to look like one" * 20, None])
def test_another_file_is_not_taken_for_a_cache(tmp_path, content):
    path = tmp_path / "file.sqlite"
    if content:
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as base:
            base.execute("CREATE TABLE other (x)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="name another file"):
        VerdictStore(path)
    assert path.read_bytes() == before


WRITE = """
import sys
from still.eval.verdict_store import Kept, VerdictStore
path, start = sys.argv[1], int(sys.argv[2])
with VerdictStore(path) as store:
    for number in range(start, start + 200):
        store.put([(str(number).encode(), Kept("pass", "because"))])
"""


def test_several_processes_share_a_file(tmp_path):
    path = str(tmp_path / "verdicts.sqlite")
    workers = [subprocess.Popen([sys.executable, "-c", WRITE, path, str(100 * number)]) for number in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    with VerdictStore(path) as store:
        assert len(store) == 400


def test_the_default_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == tmp_path / "still" / "verdicts.sqlite"
