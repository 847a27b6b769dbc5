"""What verify.py recomputes: `generate` against plain loops, golden tokens, and a download that verifies itself."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.hub_upload import verify as verify_module
from nanollada.hub_upload.export import export
from nanollada.hub_upload.recompute import Recomputation, compare_tokens, recompute, runs_to_check
from nanollada.hub_upload.verify import VerificationError, check_files, read_golden, verify
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "ar": (NanoLLaDAForCausalLM, {}),
    "whole rows": (NanoLLaDAForMaskedLM, {}),
    "blocks": (NanoLLaDAForMaskedLM, {"block_length": 8}),
    "shifted labels": (NanoLLaDAForMaskedLM, {"label_shift": True}),
}
# What a rename of the argument did to code that took any: the cache never arrives.
SWALLOW = """

_forward = {0}.forward


def _without_cache(self, *args, past_key_values=None, cache=None, **kwargs):
    return _forward(self, *args, **kwargs)


{0}.forward = _without_cache
"""


def build(kind: str):
    """Opinions far apart, as after training."""
    torch.manual_seed(0)
    model_class, options = KINDS[kind]
    return model_class(NanoLLaDAConfig(vocab_size=300, initializer_range=0.2, **SHAPE, **options)).eval()


def built(kind: str):
    model = build(kind)
    model.config.architectures = [type(model).__name__]
    return model


@pytest.fixture(scope="module")
def exports(tokenizer, tmp_path_factory) -> dict[str, Path]:
    root, folders = tmp_path_factory.mktemp("exports"), {}
    for kind in ("ar", "blocks"):
        build(kind).save_pretrained(root / "runs" / kind)
        tokenizer.save_pretrained(root / "runs" / kind)
        folders[kind] = export(root / "runs" / kind, root / kind)
    return folders


@pytest.fixture
def exported(exports, tmp_path) -> Path:
    """A copy of the AR export, to be broken."""
    return Path(shutil.copytree(exports["ar"], tmp_path / "broken"))


# ---- the recomputation


@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_what_is_recomputed(kind):
    """All tokens, with margins above every rounding: nothing hides behind a tie."""
    model = built(kind)
    compared, all_tokens = Recomputation(model, "these versions").check_generate()
    assert compared == all_tokens == (144 if kind == "ar" else 576)
    runs = [recompute(model, run["prompt"], **run["settings"]) for run in runs_to_check(model.config)]
    assert all(len(run["tokens"]) == len(run["steps"]) == 16 for run in runs)
    assert all(sorted(set(run["steps"])) == list(range(len(run["margins"]))) for run in runs)
    if kind != "ar":  # three steps a block, 8 tokens a block; and a threshold that is passed now and then
        assert len(runs[3]["margins"]) in (6, 7, 8, 9) and len(runs[0]["margins"]) == 16
        assert any(1 < len(run["margins"]) < 16 for run in runs[6:])


@pytest.mark.parametrize("kind", ["ar", "blocks"])
@pytest.mark.parametrize("fault", ["swallowed", "refused"])
def test_a_cache_that_does_not_arrive_is_noticed(kind, fault, monkeypatch):
    model = built(kind)
    forward = type(model).forward

    @functools.wraps(forward)
    def broken(self, *args, past_key_values=None, cache=None, **kwargs):
        if fault == "refused" and (past_key_values is not None or cache is not None):
            raise TypeError("forward() got an unexpected keyword argument 'cache'")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", broken)
    rule = r"`generate` must give the tokens of a recomputation .*\(.* use_cache=True, .*, transformers 9\.9\)"
    found = r"got TypeError: .*'cache'" if fault == "refused" else r"got \d+ for \d+ as new token \d+ of 16"
    with pytest.raises(ValueError, match=f"{rule}, {found}"):
        Recomputation(model, "transformers 9.9").check_generate()


def test_only_a_tie_excuses_another_token():
    clear = {"tokens": [5, 6, 7, 8], "steps": [2, 0, 1, 2], "margins": [1.0, 0.5, 0.5]}
    tie = {**clear, "margins": [1.0, 0.5, 1e-5]}
    assert compare_tokens(clear, [5, 6, 7, 8], "rule") == 4
    assert compare_tokens(tie, [9, 6, 7, 9], "rule") == 2  # what the last step decided is open
    for expected, tokens, match in (
        (clear, [9, 6, 7, 8], "rule, got 9 for 5 as new token 1 of 4"),
        (tie, [9, 6, 9, 9], "rule, got 9 for 7 as new token 3 of 4"),
        (tie, [5, 6, 7], "rule, got 3 for 4 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            compare_tokens(expected, tokens, "rule")


# ---- golden tokens


def test_golden_tokens_are_of_these_weights(exported):
    golden = read_golden(exported)
    assert golden["versions"].keys() == {"python", "torch", "transformers"}
    assert [len(run["tokens"]) for run in golden["runs"]] == [16, 16, 16]
    state = (exported / "model.safetensors").read_bytes()
    (exported / "model.safetensors").write_bytes(state[:-4] + b"\0\0\0\0")
    with pytest.raises(
        VerificationError, match="golden.json must be of the weights beside it, got .* model.safetensors"
    ):
        check_files(exported)
    (exported / "model.safetensors").write_bytes(state)
    for text, match in (
        ("{", "golden.json must hold `sha256` and `runs`, got JSONDecodeError"),
        (json.dumps({"runs": golden["runs"]}), "golden.json must hold `sha256` and `runs`, got KeyError: 'sha256'"),
        (json.dumps({**golden, "runs": []}), "golden.json must hold `runs` with .*, got 0 runs"),
    ):
        (exported / "golden.json").write_text(text)
        with pytest.raises(VerificationError, match=match):
            check_files(exported)


def test_another_golden_token_is_noticed(exported, tmp_path):
    clean = verify_module._CleanProcess(exported, tmp_path)
    clean.recomputation = Recomputation(built("ar"), "transformers 9.9")
    assert clean.golden() is None and clean.report["golden_tokens"] == [48, 48]
    golden = read_golden(exported)
    golden["runs"][1]["tokens"][3] += 1
    (exported / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(
        ValueError, match=r"must give the golden tokens \(transformers 9\.9, made by .*new token 4 of 16"
    ):
        clean.golden()
    (exported / "golden.json").unlink()
    check_files(exported)
    assert "no golden.json in the folder" in clean.golden() and clean.report["golden_tokens"] is None


# ---- the whole program


DOWNLOADED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("verify", sys.argv[1])
verify = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verify)
verify.block_nanollada()
sys.exit(verify.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("kind", ["ar", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_download_verifies_itself_without_nanollada(exports, tmp_path, kind):
    command = [sys.executable, "-I", "-B", "-c", DOWNLOADED, str(exports[kind] / "verify.py")]
    environment = verify_module.clean_environment(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    report, lines = json.loads(done.stdout), done.stderr.splitlines()
    count, golden = (144, 48) if kind == "ar" else (576, 192)
    assert f"generation: {count} of {count} tokens compared and equal" in lines
    assert f"golden: {golden} of {golden} tokens compared and equal" in lines
    assert report["ok"] and report["generated_tokens"] == [count, count]
    missing = [
        "results: not checked: the card's numbers need nanollada",
        "logits: not checked: nanollada is not installed",
    ]
    assert [line.startswith(text) for line, text in zip(report["not_checked"], missing, strict=True)] == [True, True]
    assert set(report["not_checked"]) < set(lines)
    assert not (exports[kind] / "__pycache__").exists()


def test_a_folder_whose_code_swallows_the_cache_is_refused(exported):
    """It loads, its logits are right and its card runs: only decoding is wrong."""
    with open(exported / "modeling_nanollada.py", "a") as stream:
        stream.write(SWALLOW.format("NanoLLaDAForCausalLM"))
    with pytest.raises(VerificationError, match="^generation: .*`generate` must give .*, transformers [0-9.]+"):
        verify(exported)
