"""Results in the card: what the suite's rows become there, which are good, and of which model they are."""

import json

import pytest
from cards import BOARDS, BOUND, CHOICE, COMMAND, EXACT, RESULTS, SPEED, TABLE, TEXT, card_of, configure
from huggingface_hub import ModelCard

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.hub_upload.card_results import END, START, eval_results, evaluation_section
from nanollada.hub_upload.evaluation_file import BOOKKEEPING, config_digest


def test_the_section_tells_the_suite():
    section = evaluation_section({"results": RESULTS})
    assert TABLE.strip() in section
    assert section.count(COMMAND) == 1 and section.count("evaluate.py boards") == 1  # three results share a command
    assert section.startswith(START) and section.endswith(END) and "≤ marks an upper bound" in section
    assert "≤" not in evaluation_section({"results": [BOARDS, CHOICE]})
    assert evaluation_section({"results": []}) == ""


def test_decoding_settings_are_told_apart():
    """As a suite writes them: a metric per setting, and the paired difference."""
    off = {**CHOICE, "metric": "exact_match/off", "settings": {"verify": "qa", "columns": {"a": "b"}}}
    off["settings"] |= {"steps": 4, "presets": {"off": {}}, "decoding": {"steps": 8}}
    off["settings"]["generate"] = {"cfg_scale": 0.0, "top_k": None, "steps": 8}
    on = {**off, "metric": "exact_match/on − off", "value": -0.05, "settings": {"generate": "greedy"}}
    section = evaluation_section({"results": [off, on]})
    assert '| verify = qa, columns = {"a": "b"}, steps = 8, cfg_scale = 0.0 |' in section
    assert "| arc | en | exact match, on − off | -0.0500 ± 0.0200 |" in section and "| generate = greedy |" in section
    first, second = ModelCard(card_of({"results": [off, on]})).data.eval_results
    assert (first.metric_type, first.metric_name) == ("exact_match/off", "exact match, off")
    assert (second.metric_type, second.metric_value) == ("exact_match/on − off", -0.05)


def test_small_errors_of_large_values_are_shown():
    row = {**SPEED, "standard_error": 0.03}
    assert "| 1,234.5600 ± 0.0300 |" in evaluation_section({"results": [row]})


def test_the_index_keeps_tasks_apart_and_names_its_source():
    data = ModelCard(card_of({"results": RESULTS})).data
    boards, text, choice, speed = data.eval_results
    assert {result.source_url for result in data.eval_results} == {
        "https://huggingface.co/me/small/blob/main/evaluation.json"
    }
    assert {result.source_name for result in data.eval_results} == {"evaluation.json"}
    assert (boards.dataset_name, boards.metric_value, boards.metric_args) == (
        "boards",
        0.795,
        {"standard_error": 0.02855, "rows": 200, "settings": {"generate": {"steps": 8}}},
    )
    assert (text.dataset_config, text.dataset_revision) == ("wiki_en", TEXT["data_sha256"])
    assert (text.metric_type, text.metric_value) == ("bits_per_byte", 1.876543)
    assert text.metric_args == {
        "standard_error": 0.0123,
        "language": "en",
        "rows": 1200,
        "unit": "bits/byte",
        "bound": True,
        "settings": {"samples": 16, "order": [1]},  # YAML of the Hub's library drops what is None
    }
    assert choice.metric_args == {"standard_error": 0.02, "language": "en", "chance": 0.25, "rows": 1200}
    assert choice.dataset_type == "arc-easy" and choice.dataset_name == "arc|easy"
    assert speed.dataset_name == "speed"  # a task that makes its own rows
    assert "standard_error" not in speed.metric_args and "upper bound" in text.metric_name


BROKEN = [
    (CHOICE, {"value": None}, r"`value` of acc_norm of task 'arc' as a share in \[0, 1\], got None"),
    (CHOICE, {"value": True}, r"`value` of acc_norm of task 'arc' as a share in \[0, 1\], got True"),
    (CHOICE, {"value": 31}, r"`value` of acc_norm of task 'arc' as a share in \[0, 1\], got 31"),
    (CHOICE, {"metric": "exact_match/a", "value": -0.1}, "as a share in"),
    (CHOICE, {"metric": "exact_match/a − b", "value": -1.1}, r"as a difference of shares in \[-1, 1\], got -1.1"),
    (CHOICE, {"metric": "hits", "unit": "share", "value": 2.0}, r"`value` of hits .* as a share in \[0, 1\], got 2.0"),
    (TEXT, {"value": -1.8}, "`value` of bits_per_byte of task 'wiki_en' as a number >= 0, got -1.8"),
    (CHOICE, {"standard_error": float("inf")}, "`standard_error` of task 'arc' as a number >= 0 or null, got inf"),
    (CHOICE, {"standard_error": -1}, "`standard_error` of task 'arc' as a number >= 0 or null, got -1"),
    (CHOICE, {"metric": "acc "}, "`metric` of task 'arc' as a name, got 'acc '"),
    (CHOICE, {"rows": 0}, "`rows` of task 'arc' as a whole number >= 1 or null, got 0"),
    (CHOICE, {"rows": 12.5}, "`rows` of task 'arc' as a whole number >= 1 or null, got 12.5"),
    (CHOICE, {"chance": "1/4"}, r"`chance` of task 'arc' as a share in \[0, 1\] or null, got '1/4'"),
    (CHOICE, {"bound": "false"}, "`bound` of task 'arc' as true or false, got 'false'"),
    (CHOICE, {"data": ""}, "`data` of task 'arc' as a name or null, got ''"),
    (CHOICE, {"data_sha256": "f"}, "`data_sha256` of task 'arc' as 64 hexadecimal digits or null, got 'f'"),
    (CHOICE, {"unit": 3}, "`unit` of task 'arc' as a name or null, got 3"),
    (CHOICE, {"settings": [8]}, r"`settings` of task 'arc' as an object or null, got \[8\]"),
    (CHOICE, {"command": 5}, "`command` of task 'arc' as a name or null, got 5"),
    (CHOICE, {"task": ""}, "`task` of task '' as a name, got ''"),
    (BOARDS, {"value": 79.5}, r"`value` of exact_match of task 'sudoku' as a share in \[0, 1\], got 79.5"),
    (BOARDS, {"value": -0.2}, "`value` of exact_match of task 'sudoku' as a share"),
    (BOARDS, {"truncated": -1}, "`truncated` of task 'sudoku' as a whole number >= 0 or null, got -1"),
    (EXACT, {"value": None}, "`value` of bits_per_byte of task 'held_out' as a number >= 0, got None"),
    (EXACT, {"bound": None}, "`bound` of task 'held_out' as true or false, got None"),
    (BOUND, {"mask_error": float("nan")}, "`mask_error` of task 'held_out' as a number >= 0 or null, got nan"),
    (BOUND, {"mask_error": "0.1"}, "`mask_error` of task 'held_out' as a number >= 0 or null, got '0.1'"),
    (EXACT, {"tokens": True}, "`tokens` of task 'held_out' as a whole number >= 1 or null, got True"),
    (EXACT, {"tokens": "12"}, "`tokens` of task 'held_out' as a whole number >= 1 or null, got '12'"),
    (EXACT, {"metric": ["bits"]}, r"`metric` of task 'held_out' as a name, got \['bits'\]"),
    (EXACT, {"task": None}, "`task` of task None as a name, got None"),
    (EXACT, {"kind": 3}, "`kind` of task 'held_out' as a name or null, got 3"),
]


@pytest.mark.parametrize(("row", "change", "match"), BROKEN)
def test_a_field_out_of_its_range_is_refused(row, change, match):
    for make in (evaluation_section, lambda evaluation: eval_results(evaluation, "me/small")):
        make({"results": [row]})
        with pytest.raises(ValueError, match=match):
            make({"results": [{**row, **change}]})


@pytest.mark.parametrize(
    ("evaluation", "match"),
    [
        ({}, "`evaluation` must hold a list of `results`, got NoneType"),
        ({"results": [3]}, "`evaluation` must hold a list of `results`, got list"),
        ({"results": [EXACT], "command": 5}, "`evaluation` must give `command` of the run as a name or null, got 5"),
        (
            {"results": [EXACT], "seed": "0"},
            "`evaluation` must give `seed` of the run as a whole number or null, got '0'",
        ),
    ],
)
def test_an_evaluation_that_is_none_is_refused(evaluation, match):
    with pytest.raises(ValueError, match=match):
        evaluation_section(evaluation)


def test_an_error_must_be_said_to_be_undefined():
    row = {name: item for name, item in SPEED.items() if name != "standard_error"}
    with pytest.raises(ValueError, match="must give `standard_error` of task 'speed', or null, got none"):
        evaluation_section({"results": [row]})


def test_what_decides_the_computation_is_digested(tmp_path):
    """Every field of the config, its class, and whatever it does not know; not what saving adds."""
    seen = set()
    fields = {name: None for name in vars(NanoLLaDAConfig()) if name not in BOOKKEEPING and not name.startswith("_")}
    assert {"block_length", "rope_parameters", "label_shift", "architectures", "rms_norm_eps"} <= set(fields)
    for name in (None, "unheard_of", *fields):
        (tmp_path / "config.json").write_text(
            json.dumps({**fields, "architectures": ["A"], **({name: 7} if name else {})})
        )
        seen.add(config_digest(tmp_path))
    assert len(seen) == len(fields) + 2
    before = config_digest(tmp_path)
    configure(tmp_path, **dict.fromkeys(BOOKKEEPING, "other"))
    assert config_digest(tmp_path) == before
    for content, match in (
        ("[]", "config.json must hold a JSON object, got list"),
        ("{", "config.json must be readable JSON, got"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=match):
            config_digest(tmp_path)
