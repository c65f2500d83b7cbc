import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunetv2_misfm.data.outcome import Outcome
from nnunetv2_misfm.data.report import COLUMNS, REPORT, VERDICTS, settle_duplicates, summary, write_report

PLACE = [1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0]


def taken(path: str, content: str = "one", *, shift_mm: float = 0.0, **more: Any) -> Outcome:
    """An accepted scan, moved along x."""
    affine = list(PLACE)
    affine[3] = shift_mm
    case, image = f"scan_{path}", f"imagesTr/scan_{path}_0000.nii.gz"
    values: dict[str, Any] = {"case": case, "image": image, "content": content, "affine": affine, "size": [9, 9, 9]}
    return Outcome(path, path, **{"verdict": "accepted", **values, **more})


def verdicts(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.path + outcome.part: outcome.verdict for outcome in settle_duplicates(outcomes)}


def test_of_equal_scans_the_first_by_path_counts_whatever_the_order():
    outcomes = [taken("c"), taken("a"), taken("b")]
    for order in (outcomes, outcomes[::-1]):
        first, second, third = settle_duplicates(order)
        assert first == taken("a")
        for other in (second, third):
            assert (other.verdict, other.case, other.image) == ("duplicate", "scan_a", "")
            assert other.reason == "same voxels and geometry as a"
        assert (second.path, third.path) == ("b", "c")


def test_a_duplicate_keeps_what_the_file_says_of_itself():
    one, other = taken("a"), taken("b", sha256="other", shape="3x3x3", dtype="int16")
    settled = settle_duplicates([one, other])[1]
    assert (settled.sha256, settled.shape, settled.dtype) == ("other", "3x3x3", "int16")


def test_equal_voxels_elsewhere_and_other_voxels_here_are_no_duplicates():
    outcomes = [taken("a"), taken("b", shift_mm=5), taken("c", "two"), taken("d", shift_mm=5), taken("e")]
    settled = settle_duplicates(outcomes)
    assert [outcome.verdict for outcome in settled] == ["accepted", "accepted", "accepted", "duplicate", "duplicate"]
    assert [outcome.case for outcome in settled] == ["scan_a", "scan_b", "scan_c", "scan_b", "scan_a"]


@pytest.mark.parametrize(("shift_mm", "verdict"), [(0.009, "duplicate"), (0.011, "accepted"), (-0.009, "duplicate")])
def test_places_are_equal_within_a_hundredth_of_a_millimetre(shift_mm, verdict):
    assert verdicts([taken("a"), taken("b", shift_mm=shift_mm)])["b"] == verdict


def test_the_tolerance_does_not_grow_with_the_distance_from_the_origin():
    far = [taken("a", shift_mm=2000), taken("b", shift_mm=2000.02)]
    assert verdicts(far) == {"a": "accepted", "b": "accepted"}


def test_in_a_chain_every_scan_is_compared_with_those_that_count():
    chain = [taken("a"), taken("b", shift_mm=0.008), taken("c", shift_mm=0.016)]
    assert verdicts(chain) == {"a": "accepted", "b": "duplicate", "c": "accepted"}


def test_repaired_and_split_scans_count_too_and_refused_ones_do_not():
    refused = replace(taken("a"), verdict="rejected", reason="2D: a single slice")
    outcomes = [refused, taken("b", verdict="repaired"), taken("c", verdict="split", part="volume 1 of 2")]
    settled = settle_duplicates(outcomes)
    assert [outcome.verdict for outcome in settled] == ["rejected", "repaired", "duplicate"]
    assert settled[0] == refused


def test_parts_are_in_their_natural_order():
    parts = [
        "",
        "stack 1 of 2, volume 2 of 10",
        "stack 1 of 2, volume 10 of 10",
        "stack 2 of 2, volume 1 of 10",
        "stack 2 of 2, volume 9 of 10",
    ]
    volumes = [f"volume {number} of 12" for number in range(1, 13)]
    for ordered in (parts, volumes):
        outcomes = [taken("a", content=part, part=part) for part in sorted(ordered, reverse=True)]
        assert [outcome.part for outcome in settle_duplicates(outcomes)] == ordered


def test_equal_volumes_of_one_series_name_the_first():
    outcomes = [taken("a", part=f"volume {number} of 10", verdict="split") for number in (10, 2, 1)]
    settled = settle_duplicates(outcomes)
    assert [outcome.verdict for outcome in settled] == ["split", "duplicate", "duplicate"]
    assert settled[2].reason == "same voxels and geometry as a, volume 1 of 10"


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / REPORT, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_the_report_has_the_columns_promised_and_one_row_per_outcome(tmp_path):
    one = Outcome(
        "a/b.nii.gz",
        "a/b.nii.gz",
        "repaired",
        reason="3 voxels were not finite: set to 0",
        part="volume 1 of 2",
        case="scan_1",
        modality="CT",
        files=2,
        shape="3x4x5",
        spacing_mm="0.700x0.700x1.250",
        orientation="RAS",
        dtype="int16",
        intensity_range="-1024..3071",
        body_share="0.5",
        sha256="ab",
        content="not written",
        affine=PLACE,
        image="not written",
    )
    write_report([one, Outcome("c", "c", "rejected")], tmp_path)
    first, second = rows(tmp_path)
    # by hand, as issue and user's guide name them
    promised = "path part verdict reason case modality files shape spacing_mm orientation dtype intensity_range"
    assert tuple(first) == COLUMNS == (*promised.split(), "body_share", "sha256")
    assert first["reason"] == "3 voxels were not finite: set to 0" and first["files"] == "2"
    assert first["spacing_mm"] == "0.700x0.700x1.250" and first["sha256"] == "ab" and first["part"] == "volume 1 of 2"
    assert second["path"] == "c" and second["case"] == "" and "not written" not in first.values()


@pytest.mark.parametrize("name", ["a,b", 'a"b', "a\nb", "a\r", "a\r\nb", "é ü 語", "\udce9", " a ", "a;b", ""])
def test_any_name_comes_back_from_the_report(tmp_path, name):
    write_report([Outcome(name, name, "rejected", reason=name), Outcome("next", "next", "accepted")], tmp_path)
    assert [(row["path"], row["reason"]) for row in rows(tmp_path)] == [(name, name), ("next", "")]


def test_a_report_is_replaced_only_by_a_whole_one(tmp_path):
    write_report([Outcome("a", "a", "accepted")], tmp_path)

    def cut_off() -> Iterator[Outcome]:
        yield Outcome("b", "b", "accepted")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(cut_off(), tmp_path)
    assert [row["path"] for row in rows(tmp_path)] == ["a"]
    write_report([Outcome("c", "c", "accepted")], tmp_path)
    assert [row["path"] for row in rows(tmp_path)] == ["c"]
    assert [file.name for file in tmp_path.iterdir()] == [REPORT]


def test_equal_outcomes_give_equal_bytes(tmp_path):
    contents = set()
    for _ in range(2):
        write_report([taken("a"), taken("b")], tmp_path)
        contents.add((tmp_path / REPORT).read_bytes())
    assert len(contents) == 1


def counts(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """The figures of the two halves of a summary."""
    above, _, below = text.partition("\nof these\n")
    first = {line.split()[0]: int(line.split()[1]) for line in above.splitlines() if line}
    second = {line.split(maxsplit=1)[1]: int(line.split()[0]) for line in below.splitlines() if line}
    return first, second


def test_the_summary_adds_up():
    draw = np.random.default_rng(0)
    outcomes = []
    for number in range(500):
        verdict = VERDICTS[draw.integers(len(VERDICTS))]
        reason = "" if verdict == "accepted" else f"{'xyzuvwabcdefghijk'[draw.integers(17)]} of its own: {number}"
        outcomes.append(Outcome(f"a{number}", f"a{number}", verdict, reason=reason))
    by_verdict, by_reason = counts(summary(iter(outcomes)))
    assert by_verdict == {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in VERDICTS}
    assert sum(by_reason.values()) == 500 - by_verdict["accepted"] - by_verdict["split"]
    assert len(by_reason) == 13 and "for other reasons" in by_reason
    assert list(by_reason.values())[:12] == sorted(list(by_reason.values())[:12], reverse=True)


def test_reasons_that_differ_only_in_details_are_counted_together():
    reasons = [
        "time series of 10 volumes; --split-time-series takes them apart",
        "time series of 3 volumes; --split-time-series takes them apart",
        "damaged: the file is cut off or corrupt (EOFError)",
        "damaged: the file is cut off or corrupt (CRC check failed)",
    ]
    outcomes = [Outcome(f"a{number}", f"a{number}", "rejected", reason=reason) for number, reason in enumerate(reasons)]
    outcomes += [Outcome(name, name, "duplicate", reason=f"same voxels and geometry as {name}") for name in "xyz"]
    assert counts(summary(outcomes)) == (
        {"duplicate": 3, "rejected": 4},
        {"duplicate: same as another scan": 3, "rejected: time series of N volumes": 2, "rejected: damaged": 2},
    )


def test_the_summary_says_2d_as_it_is():
    assert "1  rejected: 2D" in summary([Outcome("a", "a", "rejected", reason="2D: a single slice")])


def test_accepted_scans_alone_need_no_reasons():
    assert (
        summary([Outcome("a", "a", "accepted"), Outcome("b", "b", "split")])
        == "accepted          1\nsplit             1"
    )
    assert summary([]) == ""
