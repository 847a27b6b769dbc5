"""Licences, languages and names that the Hub's metadata takes, and what is said of others."""

import pytest
from cards import RESULTS
from huggingface_hub import ModelCard, ModelCardData

from nanollada.hub_upload.card_results import eval_results, with_source
from nanollada.hub_upload.export import main
from nanollada.hub_upload.hub_names import LICENSES, check_languages, check_license, check_repositories


def test_what_the_hub_knows_is_taken():
    for name in (None, *LICENSES):
        check_license(name)
    for language in (None, "en", ["en", "zh"], "eng", "chi", "zho", "yue", "code", "multilingual", ["el", "grc"]):
        check_languages(language)
    check_repositories(datasets=["me/other", "wikitext"], base_model="me/base", none=None)


@pytest.mark.parametrize(
    ("check", "given", "match"),
    [
        (check_license, "apache2", "`license` must be .*, got 'apache2', did you mean 'apache-2.0'"),
        (check_license, "MIT", "got 'MIT', did you mean 'mit'"),
        (check_license, "qwertz", r"got 'qwertz' \(https://huggingface.co/docs/hub/repositories-licenses\)"),
        (check_languages, "english", "`language` must be ISO 639 codes .*, got 'english', did you mean 'en'"),
        (check_languages, ["en", "French"], "got 'French', did you mean 'fr'"),
        (check_languages, ["zh-CN"], "got 'zh-CN', did you mean 'zh'"),
        (check_languages, "EN", "got 'EN', did you mean 'en'"),
        (check_languages, "qqq", "got 'qqq'$"),
        (lambda name: check_repositories(base_model=name), "./runs/x", "`base_model` must be .*, got './runs/x'"),
        (lambda name: check_repositories(datasets=name), ["a/b", "a/b/c"], "`datasets` must be .*, got 'a/b/c'"),
    ],
)  # fmt: skip
def test_what_it_does_not_know_is_refused_with_the_nearest(check, given, match):
    with pytest.raises(ValueError, match=match):
        check(given)


def test_export_refuses_them(tokenizer, tmp_path):
    from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
    from nanollada.trainers.models import config_for

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    NanoLLaDAForCausalLM(config_for(tokenizer, **shape)).save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    folders = [str(tmp_path / "run"), str(tmp_path / "out")]
    for options in (["--license", "apache2"], ["--language", "en", "english"], ["--base_model", str(tmp_path)]):
        with pytest.raises(ValueError, match=f"`{options[0][2:]}` must be"):
            main([*folders, *options])
    assert not (tmp_path / "out").exists()


def test_a_source_has_an_owner():
    """`https://huggingface.co/small/blob/…` leads nowhere; uploading knows the owner."""
    evaluation = {"results": RESULTS}
    assert all(result.source_url is None for result in eval_results(evaluation, "small"))
    data = ModelCardData(model_name="small", eval_results=eval_results(evaluation, "small"))
    card = f"---\n{data.to_yaml()}\n---\n\n# small\n\nText.\n"
    assert "source" not in card
    sourced = with_source(card, "me/small", "trial")
    url = "https://huggingface.co/me/small/blob/trial/evaluation.json"
    assert {result.source_url for result in ModelCard(sourced).data.eval_results} == {url}
    assert sourced.endswith("\n---\n\n# small\n\nText.\n") and with_source(sourced, "me/small", "trial") == sourced
    given = eval_results(evaluation, "me/small", "trial")
    assert (
        ModelCard(sourced).data.eval_results
        == ModelCard(
            f"---\n{ModelCardData(model_name='small', eval_results=given).to_yaml()}\n---\n"
        ).data.eval_results
    )
