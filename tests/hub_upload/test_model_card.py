"""The card: what a run has on record, all of it and nothing else."""

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.hub_upload.card_facts import Facts, read_facts, without_paths
from nanollada.hub_upload.card_use import choose_prompt
from nanollada.hub_upload.evaluation_file import VERSION, model_digests, save_evaluation
from nanollada.hub_upload.export import export
from nanollada.hub_upload.model_card import build_card
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.run import _saved_digests

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DATA = {
    "sources": ["/home/me/my texts/tales.jsonl", "hf://datasets/me/rows/a.jsonl"],
    "format": "pretrain",
    "max_length": 128,
    "documents": 1500,
    "rows": 321,
    "skipped_rows": {"bad JSON": 2},
    "truncated_rows": 0,
    "dropped_tokens": 17,
    "target_tokens": 41088,
    "bytes": 98765,
}
RUN = {
    "nanollada_version": "0.1.0",
    "model_class": "NanoLLaDAForCausalLM",
    "init": None,
    "objective": {"name": "next-token cross-entropy"},
    "command": "causal.py --data '/home/me/my texts/tales.jsonl' --output_dir=/scratch/me/ar --seed 42",
    "seed": 42,
    "data": DATA,
    "steps": 200,
    "epochs": 2.5,
    "tokens_seen": 102720,
    "parameters": 1,
    "seconds": 61.5,
    "hardware": "CPU, x86_64, 2 threads",
    "versions": {"nanollada": "0.1.0", "torch": "2.13.0"},
    "evaluation": None,
}
BOUND = {
    "task": "held_out",
    "kind": "text",
    "data": "/home/me/held-out.jsonl",
    "metric": "bits_per_byte",
    "unit": "bits/byte",
    "bound": True,
    "value": 2.34567,
    "standard_error": 0.0456,
    "mask_error": 0.0123,
    "rows": 25,
    "tokens": 1234,
    "bytes": 5678,
    "documents": 9,
    "settings": {"max_length": 64, "samples": 8, "estimator": "stratified exact count"},
}
MATCH = {"task": "sudoku", "kind": "generation", "data": "boards", "metric": "exact_match", "value": 0.925}
MATCH |= {"standard_error": 0.02, "bound": False, "rows": 64, "settings": {"generate": {"steps": 8, "top_k": None}}}


def save(folder: Path, model_class, tokenizer) -> Path:
    torch.manual_seed(model_class.is_diffusion)
    model_class(NanoLLaDAConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, **records) -> None:
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


def saved(folder: Path) -> dict[str, str]:
    """What run.json says of the files beside it."""
    names = ("config.json", "model.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """An AR run, and a fine-tuned diffusion run that started from it."""
    root = tmp_path_factory.mktemp("runs")
    ar = save(root / "ar", NanoLLaDAForCausalLM, tokenizer)
    found = {"bound": False, "bits_per_byte": 2.5, "bits_per_byte_standard_error": 0.0, "nats_per_token": 3.0}
    found |= {"tokens": 700, "bytes": 1800, "rows": 6, "estimator": "exact"}
    write(ar, run={**RUN, "evaluation": found, "sha256": saved(ar)})
    diffusion = save(root / "diffusion", NanoLLaDAForMaskedLM, tokenizer)
    objective = {"name": "masked diffusion bound", "mask_count": "exact", "time_epsilon": None}
    run = {**RUN, "model_class": "NanoLLaDAForMaskedLM", "init": str(ar), "objective": objective}
    run |= {"command": f"diffusion.py --model_name_or_path {ar} --data chats.jsonl", "seed": 43}
    run["data"] = {**DATA, "format": "sft", "sources": ["chats.jsonl"]}
    log = [{"step": 50, "loss": 2.0}, {"step": 50, "eval_loss": 1.75}]
    state = {"global_step": 200, "best_global_step": 50, "best_metric": 1.75, "log_history": log}
    evaluation = {
        "version": VERSION,
        "checkpoint": str(diffusion),
        **model_digests(diffusion),
        "command": f"evaluate.py --checkpoint {diffusion}",
        "seed": 7,
    }
    write(diffusion, run=run, trainer_state=state, evaluation={**evaluation, "results": [BOUND, MATCH]})
    return {"ar": ar, "diffusion": diffusion}


@pytest.fixture(scope="module")
def exports(checkpoints, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    options = {"license": "apache-2.0", "language": ["en"]}
    return {name: export(folder, root / f"small-{name}", **options) for name, folder in checkpoints.items()}


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_nothing_of_this_machine_leaks(exports, checkpoints, name):
    for path in exports[name].iterdir():
        content = path.read_bytes()
        for local in (str(checkpoints[name].parent), "/home/me", "/scratch", "is_local"):
            assert local.encode() not in content, path.name


DIFFUSION_CARD = r"""---
datasets:
- me/rows
language:
- en
library_name: transformers
license: apache-2\.0
.*
pipeline_tag: text-generation
tags:
- nanollada
- custom_code
- diffusion
.*
model-index:
- name: small-diffusion
.*---

# small-diffusion

small-diffusion is a masked-diffusion language model \(LLaDA\) with [\d,]+ parameters\..* nanollada 0\.1\.0\.

- Class: `NanoLLaDAForMaskedLM`
- Parameters: [\d,]+, float32
- Vocabulary: \d+ tokens, .*
- Shape: 2 layers, width 32, 4 heads
- Block length: the full row

## Use
.*
```python
.*
repo_id = "small-diffusion"
tokenizer = AutoTokenizer\.from_pretrained\(repo_id, trust_remote_code=True\)
model = AutoModelForCausalLM\.from_pretrained\(repo_id, trust_remote_code=True\)
```
.*
```python
messages = .*
output = model\.generate\(\*\*inputs, max_new_tokens=32, block_length=16, steps=16\)
.*
```
.*
```python
start = .*
inputs = tokenizer\(prompt \+ .* \+ tokenizer\.mask_token \* \d+ \+ .*
filled = model\.generate\(\*\*inputs, max_new_tokens=0\)
.*
```

## Training

### 1\. Pretraining

\| \| \|
\|---\|---\|
\| Kind \| pretraining, `NanoLLaDAForCausalLM` \|
\| Started from \| random weights \|
\| Objective \| next-token cross-entropy \|
\| Sources \| `tales\.jsonl`, `hf://datasets/me/rows/a\.jsonl` \|
\| Data \| 1,500 documents, 321 rows, at most 128 tokens a row, 41,088 target tokens, 98,765 bytes \|
\| Left out \| 2 broken rows \(bad JSON\), 17 tokens of the last, partial row \|
\| Length \| 200 steps, 2\.5 epochs \|
\| Tokens seen \| 102,720 \|
\| Seed \| 42 \|
\| Time \| 61\.5 s \|
\| Hardware \| CPU, x86_64, 2 threads \|
\| Versions \| nanollada 0\.1\.0, torch 2\.13\.0 \|

```bash
python trainers/causal\.py --data tales\.jsonl --output_dir=ar --seed 42
```

### 2\. Supervised fine-tuning
.*
\| Started from \| the weights of `ar` \|
\| Objective \| masked diffusion bound \(mask_count = exact\) \|
.*
\| Best \| eval_loss 1\.75 at step 50 \|
\| Seed \| 43 \|
.*
```bash
python trainers/diffusion\.py --model_name_or_path ar --data chats\.jsonl
```

## Evaluation

.*
\| held_out \| – \| .*, upper bound \(.*\) \| ≤ 2\.3457 ± 0\.0456 \(masks ± 0\.0123\) \| – \| 25 rows, 1,234 tokens, .*
\| sudoku \| – \| exact match \| 0\.9250 ± 0\.0200 \| – \| 64 rows \| `boards` \| steps = 8 \|

± is one standard error .*

≤ marks an upper bound .*

Seed 7:

```bash
python scripts/evaluate\.py --checkpoint diffusion
```

<!-- end of .* -->

## Limits

- A model of .*
- Trained on at most 128 tokens at a time: .*
- Language: en\. .*

## Citation
.*arXiv:2502\.09992.*
## Licence

apache-2\.0
"""


def test_diffusion_card_tells_the_run(exports):
    card = (exports["diffusion"] / "README.md").read_text()
    pattern = re.compile(DIFFUSION_CARD.strip(), re.DOTALL)
    assert pattern.fullmatch(card.strip()), card
    assert "[More Information Needed]" not in card
    for line in card.split("## Training")[1].splitlines():
        assert line == line.rstrip()
    assert "\n\n\n" not in card


def test_ar_card_tells_an_exact_number(exports):
    card = (exports["ar"] / "README.md").read_text()
    assert "autoregressive language model" in card and "LLaDA)" not in card and "2502.09992" not in card
    assert "| held_out | – | bits per byte (bits/byte) | 2.5000 | – | 6 rows, 700 tokens, 1,800 bytes |" in card
    assert "Measured at the end of the last training run above." in card
    evaluation = json.loads((exports["ar"] / "evaluation.json").read_text())
    assert evaluation.items() >= model_digests(exports["ar"]).items()  # of the files that went into this folder
    assert "### " not in card and "≤" not in card and "Infilling" not in card
    assert "output = model.generate(**inputs, max_new_tokens=32)" in card


def test_card_metadata_round_trips(exports):
    data = ModelCard.load(exports["diffusion"] / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.metrics == ["bits_per_byte", "exact_match"]
    bound, match = data.eval_results
    assert (bound.dataset_name, bound.metric_type, bound.metric_value) == ("held-out.jsonl", "bits_per_byte", 2.34567)
    assert "upper bound" in bound.metric_name and bound.metric_args["standard_error"] == 0.0456
    assert (match.dataset_name, match.metric_type, match.metric_value) == ("boards", "exact_match", 0.925)


def make_card(tokenizer, facts=None, model_class=NanoLLaDAForMaskedLM, block_length=None, **options) -> str:
    model = model_class(NanoLLaDAConfig(vocab_size=len(tokenizer), block_length=block_length, **SHAPE))
    return str(build_card(model, tokenizer, facts or Facts(), model_name="name", **options))


def test_snippets_follow_model_and_tokenizer(tokenizer, char_tokenizer):
    chat = Facts(stages=[{"data": {"format": "sft"}}])
    assert "apply_chat_template" in make_card(tokenizer, chat)
    assert "apply_chat_template" not in make_card(tokenizer, Facts(stages=[{"data": {"format": "pretrain"}}]))
    untemplated = copy.deepcopy(tokenizer)
    untemplated.chat_template = None
    assert "apply_chat_template" not in make_card(untemplated, chat)
    assert "max_new_tokens=36, steps=12)" in make_card(tokenizer, block_length=12)
    assert "max_new_tokens=512, steps=32)" in make_card(tokenizer, block_length=512)
    assert 'tokenizer("say \\"hi\\"", return_tensors' in make_card(tokenizer, prompt='say "hi"')
    assert "Block length" not in make_card(tokenizer, model_class=NanoLLaDAForCausalLM)
    with pytest.raises(ValueError, match="`prompt` must be text that the tokenizer can express, got 'Zebra~'"):
        make_card(char_tokenizer, prompt="Zebra~")
    assert choose_prompt(char_tokenizer, ("Zebra~", "The")) == "The"
    odd = choose_prompt(char_tokenizer, ("~",))
    assert char_tokenizer.decode(char_tokenizer(odd).input_ids) == odd


def test_card_options_and_cells(tokenizer):
    card = make_card(tokenizer, datasets=["me/other"], base_model="me/base", language="en")
    assert "base_model: me/base" in card and "- me/other" in card and "language: en" in card
    stage = {"data": {"sources": ["a|b.txt"], "skipped_rows": 3, "truncated_rows": 0}, "seed": 0, "init": "hub/model"}
    card = make_card(tokenizer, Facts(stages=[stage]))
    assert "| Sources | `a\\|b.txt` |" in card
    assert "| Left out | 3 broken rows |" in card
    assert "| Seed | 0 |" in card
    assert "| Started from | the weights of `hub/model` |" in card
    assert "| Left out | nothing |" in make_card(tokenizer, Facts(stages=[{"data": {"skipped_rows": {}}}]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"value": None}, "must give `value` of bits_per_byte of task 'held_out' as a number >= 0, got None"),
        ({"value": float("nan")}, "must give `value` of bits_per_byte of task 'held_out' as a number >= 0, got nan"),
        ({"mask_error": "0"}, "must give `mask_error` of task 'held_out' as a number >= 0 or null, got '0'"),
    ],
)
def test_results_without_a_number_are_refused(tokenizer, change, match):
    with pytest.raises(ValueError, match=match):
        make_card(tokenizer, Facts(evaluation={"results": [{**BOUND, **change}]}))


def test_results_of_several_commands_name_them_all(tokenizer):
    first = {**BOUND, "command": "evaluate.py a", "seed": 0}
    second = {**MATCH, "command": "evaluate.py b", "seed": 1}
    card = make_card(tokenizer, Facts(evaluation={"command": "evaluate.py b", "results": [first, second, second]}))
    blocks = [f"Seed {seed}:\n\n```bash\npython scripts/evaluate.py {name}\n```" for seed, name in enumerate("ab")]
    assert "\n\n".join([*blocks, "<!-- end"]) in card


def test_an_evaluation_must_name_its_model(checkpoints, tmp_path):
    """A folder's name alone says nothing, and neither do the weights without the config."""
    digests = model_digests(checkpoints["diffusion"])
    for kept, missing in (({}, "weights"), ({"weights_sha256": digests["weights_sha256"]}, "config")):
        write(
            tmp_path, evaluation={"version": VERSION, "checkpoint": "elsewhere/diffusion", **kept, "results": [BOUND]}
        )
        match = f"evaluation.json must name its model by `{missing}_sha256`, got none .* measure again"
        with pytest.raises(ValueError, match=match):
            read_facts(checkpoints["diffusion"], tmp_path / "evaluation.json")
    write(tmp_path, foreign={"version": VERSION, "checkpoint": "anything", **digests, "results": [BOUND]})
    assert read_facts(checkpoints["diffusion"], tmp_path / "foreign.json").evaluation["results"][0]["tokens"] == 1234
    with pytest.raises(ValueError, match="foreign.json must be of the model in ar, got `weights_sha256` [0-9a-f]{64}"):
        read_facts(checkpoints["ar"], tmp_path / "foreign.json")
    folder = export(checkpoints["diffusion"], tmp_path / "out", evaluation=tmp_path / "foreign.json")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation.items() >= model_digests(folder).items()


def test_one_tensors_in_three_models_are_told_apart(tokenizer, tmp_path):
    """The same weights as AR, as diffusion, and in blocks of 4 have other numbers."""
    model = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=len(tokenizer), **SHAPE))
    ar, whole, blocks = (tmp_path / name for name in ("ar", "whole", "blocks"))
    model.save_pretrained(ar)
    for folder, block_length in ((whole, None), (blocks, 4)):
        model.config.block_length = block_length
        twin = NanoLLaDAForMaskedLM(model.config)
        twin.load_state_dict(model.state_dict())
        twin.save_pretrained(folder)
    assert len({model_digests(folder)["weights_sha256"] for folder in (ar, whole, blocks)}) == 1
    exact = {**BOUND, "bound": False}
    for folder, other, result in ((ar, whole, exact), (whole, blocks, BOUND), (blocks, whole, BOUND)):
        tokenizer.save_pretrained(other)
        write(folder, evaluation={"version": VERSION, **model_digests(folder), "results": [result]})
        assert read_facts(folder).evaluation is not None
        with pytest.raises(ValueError, match=f"evaluation.json must be of the model in {other.name}, got `config_sha"):
            export(other, tmp_path / "out", evaluation=folder / "evaluation.json")
    write(whole, evaluation={"version": VERSION, **model_digests(whole), "results": [exact]})
    with pytest.raises(ValueError, match="must hold upper bounds of a masked class .*, got .* NanoLLaDAForMaskedLM"):
        read_facts(whole)


@pytest.mark.parametrize("model_class", [NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM])
def test_saving_again_keeps_the_digests(model_class, tokenizer, tmp_path):
    """And so does an export; what saving adds besides counts for nothing."""
    shape = {**SHAPE, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
    model = model_class(NanoLLaDAConfig(vocab_size=len(tokenizer), pad_token_id=0, block_length=4, **shape))
    model.save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    model_class.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    folder = export(tmp_path / "first", tmp_path / "third")
    edited = json.loads((tmp_path / "second" / "config.json").read_text())
    del edited["auto_map"]
    edited |= {"transformers_version": "5.99", "dtype": None}
    (tmp_path / "second" / "config.json").write_text(json.dumps(edited))
    assert model_digests(tmp_path / "first") == model_digests(tmp_path / "second") == model_digests(folder)


def test_the_numbers_of_a_run_are_of_its_files(checkpoints, tmp_path):
    """A run.json beside other weights, or another config, is refused; one that names no files gives no number."""
    folder = Path(shutil.copytree(checkpoints["ar"], tmp_path / "ar"))
    assert _saved_digests(folder) == saved(folder)  # as a run writes them
    assert read_facts(folder).evaluation["results"][0]["value"] == 2.5
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("1000000.0", "10.0"))
    match = r"run.json must be of the model in ar, got an `evaluation` of another {} \(measure again\)"
    with pytest.raises(ValueError, match=match.format("config.json")):
        read_facts(folder)
    (folder / "config.json").write_text(config)
    shutil.copy(checkpoints["diffusion"] / "model.safetensors", folder)
    with pytest.raises(ValueError, match=match.format("model.safetensors")):
        read_facts(folder)
    shutil.copy(checkpoints["ar"] / "model.safetensors", folder / "model-2.safetensors")
    shutil.copy(checkpoints["ar"] / "model.safetensors", folder)
    with pytest.raises(ValueError, match=match.format("model-2.safetensors")):
        read_facts(folder)
    run = json.loads((folder / "run.json").read_text())
    del run["sha256"]
    write(folder, run=run)
    facts = read_facts(folder)
    assert facts.evaluation is None
    assert facts.missing == ["evaluation: that of run.json is of unknown weights (no `sha256`), measure again"]


def test_kept_results_are_of_one_model(tmp_path, capsys):
    """A block length that was changed since, or a file that named no config: its results go, and that is said."""
    path = tmp_path / "evaluation.json"
    new = {"version": VERSION, "weights_sha256": "w", "config_sha256": "c", "results": [BOUND]}
    for old, dropped in (({}, 0), ({"config_sha256": "d"}, 1), ({"config_sha256": None}, 1)):
        path.write_text(json.dumps({**new, **old, "results": [MATCH]}))
        assert len(save_evaluation(new, path)["results"]) == 2 - dropped
        said = capsys.readouterr().err
        assert ("dropped 1 results, which don't name this model by weights_sha256 and config" in said) == dropped


def test_facts_that_cannot_be_read_are_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="none.json must be readable JSON, got"):
        read_facts(checkpoints["ar"], tmp_path / "none.json")
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="run.json must hold a JSON object, got list"):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/a.txt", "a.txt"),
        ("see /home/me/a.txt, ~/b and ../../c/d.e", "see a.txt, b and d.e"),
        ("C:\\Users\\me\\a.txt", "a.txt"),
        ("--data=/x/y.jsonl:2", "--data=y.jsonl:2"),
        ("https://host/a/b hf://datasets/me/a", "https://host/a/b hf://datasets/me/a"),
        ("owner/name data/a.txt and/or 1 / 2", "owner/name data/a.txt and/or 1 / 2"),
        ("/home/me/", "me"),
    ],
)
def test_local_paths_are_cut(text, expected):
    assert without_paths(text) == without_paths([text])[0] == expected
    assert without_paths({"sources": ["/my home/a b.txt"], "n": 3}) == {"sources": ["a b.txt"], "n": 3}
