"""A study's figures: errors over texts, masks and seeds, differences on the same texts, and where curves cross."""

import math

import pytest
import torch

from nanollada.scripts.studies.report import bits_per_byte, cell, crossing, curve_table, summary, verdicts

LN2 = math.log(2)


def parts(rates, variance=0.0, size=100):
    """Parts of `size` bytes with these bits per byte."""
    return [[rate * LN2 * size, variance, size // 4, size] for rate in rates]


def test_bits_per_byte_and_their_error_over_texts():
    chunks = parts([1.0, 2.0, 3.0])
    assert bits_per_byte(chunks)["value"] == pytest.approx(2.0)
    assert bits_per_byte(chunks)["standard_error"] == pytest.approx(1 / math.sqrt(3))  # equal parts: s.d. / √n
    assert bits_per_byte(chunks[:1])["standard_error"] is None
    torch.manual_seed(0)
    draws = [bits_per_byte(parts((2 + torch.randn(8)).tolist())) for _ in range(500)]
    spread = torch.tensor([draw["value"] for draw in draws]).std().item()
    assert sum(draw["standard_error"] for draw in draws) / 500 == pytest.approx(spread, rel=0.1)


def test_summary_has_all_errors():
    found = summary({1: parts([1.0, 2.0], 4.0), 2: parts([2.0, 3.0], 4.0)})
    assert found["value"] == pytest.approx(2.0) and found["seeds"] == [1, 2]
    assert found["seed_error"] == pytest.approx(0.5)  # of 1.5 and 2.5
    assert found["sampling_error"] == pytest.approx(0.5)  # of 1.5 and 2.5, the parts' means over seeds
    assert found["mask_error"] == pytest.approx(math.sqrt(8 / 2) / LN2 / 200)
    assert found["standard_error"] == pytest.approx(math.sqrt(0.5))
    single = summary({1: parts([1.0, 2.0])})
    assert single["seed_error"] is None and single["standard_error"] == single["sampling_error"]


def test_a_difference_is_taken_on_the_same_texts_and_seeds():
    reference = {1: parts([1.0, 9.0]), 2: parts([2.0, 8.0])}
    found = summary({1: parts([1.5, 9.5]), 2: parts([2.5, 8.5]), 3: parts([7.0, 7.0])}, reference)
    assert found["value"] == pytest.approx(0.5) and found["seeds"] == [1, 2]
    assert found["standard_error"] == pytest.approx(0, abs=1e-9)  # whatever the texts differ by themselves
    assert summary(reference)["standard_error"] > 1


def curve(run, values, epochs=(1, 2, 3, 4)):
    return {"run": run, "title": run, "seed": 1, "epochs": list(epochs), "bits_per_byte": list(values)}


def test_crossing_is_where_the_second_curve_falls_below():
    ar, diffusion = curve("small_ar", [3.0, 2.0, 2.5, 3.0]), curve("small_mdlm", [4.0, 3.0, 2.75, 2.5])
    assert crossing(ar, diffusion) == pytest.approx(3 + 0.25 / 0.75)
    assert crossing(ar, curve("small_mdlm", [4.0] * 4)) is None
    assert crossing(curve("small_ar", [3.0, 2.0], (1, 2)), diffusion) is None
    rows = verdicts([ar, diffusion])
    assert (rows[0]["best"], rows[0]["best_epoch"], rows[0]["last"]) == (2.0, 2, 3.0)
    assert rows[0]["gap_of_bests"] == pytest.approx(0.5) and "gap_of_bests" not in rows[1]
    lines = curve_table(rows).splitlines()
    assert lines[2] == "| small_ar | 1 | 2.000 | 2.0 | 3.000 | 4.0 | 3.3 |"
    assert lines[3].endswith("| – |")
    assert curve_table(verdicts([ar, curve("small_mdlm", [4.0] * 4)])).splitlines()[2].endswith("| never |")


def test_cells_say_what_a_number_is():
    figure = {"value": 2.34567, "standard_error": 0.0123}
    assert cell(figure) == "2.346 ± 0.012"
    assert cell(figure, True) == "≤ 2.346 ± 0.012"
    assert cell({**figure, "standard_error": None}) == "2.346"
    assert cell(None) == "–"
