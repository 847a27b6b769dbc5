"""Files that are whole, whoever else writes them."""

import threading

import pytest

from nanollada.trainers import records
from nanollada.trainers.records import write_json, write_whole, written_beside


def test_two_writers_of_a_file_do_not_meet(tmp_path, monkeypatch):
    """The second begins and ends while the first has written and not yet renamed: each has a file of its own."""
    flush, inside = records.flush, threading.Event()

    def slow(path):
        flush(path)
        if path.suffix == ".partial" and not inside.is_set():
            inside.set()
            write_whole(tmp_path / "run.json", "second")

    monkeypatch.setattr(records, "flush", slow)
    write_whole(tmp_path / "run.json", "first")
    assert (tmp_path / "run.json").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == [
        "run.json"
    ]


def test_many_writers_leave_one_whole_file(tmp_path):
    values = [{"writer": number, "filling": [number] * 2000} for number in range(8)]
    threads = [threading.Thread(target=write_json, args=(tmp_path / "run.json", value)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert records.read_json(tmp_path / "run.json") in values and len(list(tmp_path.iterdir())) == 1


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    write_whole(tmp_path / "text", "old")
    with pytest.raises(OSError, match="disk"), written_beside(tmp_path / "text") as partial:
        partial.write_text("half")
        raise OSError("the disk is full")
    assert (tmp_path / "text").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_folder_of_a_file_is_made(tmp_path):
    write_whole(tmp_path / "new" / "one" / "page.html", "text")
    assert [path.name for path in (tmp_path / "new" / "one").iterdir()] == ["page.html"]
