"""Quality against forward passes, by hand: mixtures, gains, tables."""

import json

import pytest

from nanollada.scripts.studies.editing import frontier
from nanollada.scripts.studies.editing.frontier import (
    by_decoder,
    gains_of,
    matched,
    mixture,
    record_of,
    tables,
    verdict,
)

POINTS = {"all": (1.0, 0.4), "t0.5": (2.0, 0.3), "t0.9": (3.0, 0.8), "one": (17.0, 0.9)}


@pytest.mark.parametrize(
    ("forwards", "shares", "quality"),
    [
        (0.5, {}, None),
        (1.0, {"all": 1.0}, 0.4),
        (2.0, {"all": 0.5, "t0.9": 0.5}, 0.6),  # not the poor one that costs as much
        (3.0, {"t0.9": 1.0}, 0.8),
        (10.0, {"t0.9": 0.5, "one": 0.5}, 0.85),
        (40.0, {"one": 1.0}, 0.9),
    ],
)
def test_the_best_mixture(forwards, shares, quality):
    found = mixture(POINTS, forwards)
    assert found == pytest.approx(shares)
    if shares:
        assert sum(share * POINTS[name][1] for name, share in found.items()) == pytest.approx(quality)
        assert sum(share * POINTS[name][0] for name, share in found.items()) <= forwards


def test_more_forwards_never_cost_quality():
    dearer = {"all": (1.0, 0.4), "one": (5.0, 0.2)}
    assert mixture(dearer, 3.0) == mixture(dearer, 9.0) == {"all": 1.0}


def run(seed, **decoders):
    """A run's scores, of `(quality, forwards)` by row."""
    names = {name.replace("_", "+"): rows for name, rows in decoders.items()}
    return {
        "seed": seed,
        "decoders": {
            name: {"quality": [q for q, _ in rows], "forwards": [f for _, f in rows], "edits": [0.5] * len(rows)}
            for name, rows in names.items()
        },
        "beliefs": {"replaced": [2.0, 4.0], "kept": [0.0, 0.0]},
    }


PLAIN = [
    run(1, all=[(0, 1), (1, 1)], one=[(1, 5), (1, 5)], all_edit=[(0, 2), (1, 2)]),
    run(2, all=[(0, 1), (0, 1)], one=[(1, 5), (0, 5)], all_edit=[(0, 2), (0, 2)]),
]
EDITED = [
    run(1, all=[(0, 1), (0, 1)], one=[(1, 5), (1, 5)], all_edit=[(1, 3), (1, 3)]),
    run(2, all=[(0, 1), (1, 1)], one=[(1, 5), (1, 5)], all_edit=[(1, 3), (0, 3)]),
]


def test_gains_are_paired_by_row_and_seed():
    (gain,) = gains_of("self", by_decoder(EDITED), by_decoder(PLAIN))
    assert (gain["run"], gain["decoder"]) == ("self", "all+edit")
    figures = gain["figures"]
    assert figures["draft"]["value"] == pytest.approx(0.5)  # (1 + 1 + 1 − 1) / 4
    assert figures["plain_draft"]["value"] == pytest.approx(0.5)  # (1 + 0 + 1 + 0) / 4
    # 3 forwards: half of all at once, half of one per step: .5 1 | .5 0
    assert matched(by_decoder(PLAIN), 3.0, "all+edit") == {1: [0.5, 1.0], 2: [0.5, 0.0]}
    assert figures["matched"]["value"] == pytest.approx(0.25)
    # rows: (.5 + .5) / 2, (0 + 0) / 2: s.d. √.125, / √2; seeds: .25 and .25
    assert figures["matched"]["sampling_error"] == pytest.approx(0.25)
    assert figures["matched"]["seed_error"] == pytest.approx(0.0)


def test_equal_forwards_are_those_of_decoders_of_the_kind():
    plain = [run(1, all=[(0, 1)], steps2=[(0.4, 2)], t0=[(0.9, 2)], one=[(1, 5)], drawn=[(0.5, 1)])]
    names = {"t0": "t0.9", "drawn": "all@1"}
    plain[0]["decoders"] = {names.get(name, name): rows for name, rows in plain[0]["decoders"].items()}
    runs = by_decoder(plain)
    assert matched(runs, 2.0, "all+edit") == {1: [0.9]} and matched(runs, 2.0, "all+edit", fixed=True) == {1: [0.4]}
    assert matched(runs, 2.0, "all@1+gibbs") == {1: [0.5]} and matched(runs, 2.0, "single+expand") == {}
    del runs["t0.9"]["quality"][1]
    runs["t0.9"]["quality"][2] = [0.9]
    assert matched(runs, 3.0, "all+edit") == {}  # no seed has both


def test_seeds_that_one_arm_lacks_are_left_out():
    (gain,) = gains_of("self", by_decoder(EDITED[1:]), by_decoder(PLAIN[:1]))
    assert gain["figures"].keys() == {"draft"}  # no seed of both
    (gain,) = gains_of("self", by_decoder(EDITED), by_decoder(PLAIN[:1]))
    assert gain["figures"]["matched"]["seeds"] == [1]
    (gain,) = gains_of("self", by_decoder(EDITED), None)
    assert gain["figures"].keys() == {"draft"}


@pytest.fixture
def study(tmp_path):
    for name, runs in (("plain", PLAIN), ("self", EDITED)):
        for scores in runs:
            folder = tmp_path / f"{name}-{scores['seed']}"
            folder.mkdir()
            facts = {"command": "python a.py", "hardware": "one", "versions": {}, "run": name}
            (folder / "scores.json").write_text(json.dumps({**facts, **scores}))
    (tmp_path / "settings.json").write_text("{}")
    return tmp_path, {name: sorted(tmp_path.glob(f"{name}-*")) for name in ("plain", "self")}


def test_the_tables_say_what_was_measured(study):
    folder, finished = study
    text = frontier.write_frontier(folder, "sudoku", finished)
    assert text == (folder / "sudoku.md").read_text()
    assert (folder / "sudoku.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "sudoku.json").read_text())
    assert tables(record) == tables(record_of("sudoku", finished)) and text.startswith(tables(record))
    lines = text.splitlines()
    assert lines[0] == "| decoder | plain (2 seeds) | edits of self (2 seeds) |"
    (line,) = [line for line in lines if line.startswith("| all at once |")]
    assert line == "| all at once | 25.0 % ± 35.4 @ 1.0, 0.50 edits | 25.0 % ± 35.4 @ 1.0, 0.50 edits |"
    (line,) = [line for line in lines if line.startswith("| edits of self: all at once + edits |")]
    assert line.endswith("| 50.0 % ± 70.7 | 50.0 % ± 50.0 | 25.0 % ± 25.0 | 25.0 % ± 25.0 |")
    assert "| plain | 3.000 ± 1.000 | 0.000 ± 0.000 |" in lines


def test_a_verdict_takes_two_standard_errors():
    def gain(decoder, value, error):
        return {"run": "self", "decoder": decoder, "figures": {"matched": {"value": value, "standard_error": error}}}

    record = {"gains": [gain("all+edit", 0.2, 0.05), gain("t0.5+edit", -0.2, 0.05), gain("t0.9+edit", 0.09, 0.05)]}
    assert verdict(record).split("\n\n") == [
        "Ahead of plain decoding at equal forwards, by 2 s.e.: edits of self (all at once + edits).",
        "Behind plain decoding at equal forwards, by 2 s.e.: edits of self (threshold 0.5 + edits).",
        "Not apart from plain decoding at equal forwards, by 2 s.e.: edits of self (threshold 0.9 + edits).",
    ]
    assert verdict({"gains": [{"run": "self", "decoder": "all+edit", "figures": {}}]}) == ""
