import json
import os
from pathlib import Path

from nnunetv2_misfm.data.records import Records, fingerprint


def test_a_record_counts_while_its_files_are_unchanged(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    records = Records(tmp_path / "state")
    before = fingerprint([file])
    records.put("key", before, {"answer": 1})
    assert records.get("key", fingerprint([file])) == {"answer": 1}
    file.write_text("three")
    assert records.get("key", fingerprint([file])) is None
    assert records.last("key") == {"answer": 1}


def test_the_fingerprint_tells_a_touched_file_another_name_and_another_setting(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    first = fingerprint([file])
    assert fingerprint([file]) == first
    assert fingerprint([file], "setting") != first
    os.utime(file, ns=(0, 0))
    assert fingerprint([file]) != first
    other = tmp_path / "b"
    other.write_text("one")
    os.utime(other, ns=(0, 0))
    assert fingerprint([other]) != fingerprint([file])
    assert fingerprint([other, file]) == fingerprint([file, other])


def test_records_are_listed_once_each_and_the_last_put_counts(tmp_path):
    records = Records(tmp_path)
    for number in range(50):
        records.put(f"key {number}", "x", number)
    records.put("key 7", "y", 700)
    assert dict(records) == {f"key {number}": number for number in range(50)} | {"key 7": 700}


def test_the_files_of_records_do_not_depend_on_the_order_of_writing(tmp_path):
    for place, order in (("one", range(20)), ("two", reversed(range(20)))):
        records = Records(tmp_path / place)
        for number in order:
            records.put(f"key {number}", "x", {"b": number, "a": 0})
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_damaged_record_is_as_good_as_none(tmp_path):
    records = Records(tmp_path)
    records.put("key", "x", 1)
    [file] = tmp_path.glob("*/*.json")
    file.write_text(file.read_text()[:10])
    assert records.get("key", "x") is None


def test_names_that_are_no_unicode_are_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    records = Records(tmp_path)
    records.put(name, "x", {"path": name})
    assert dict(records) == {name: {"path": name}}
    [file] = tmp_path.glob("*/*.json")
    json.loads(file.read_bytes())


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.json"))}
