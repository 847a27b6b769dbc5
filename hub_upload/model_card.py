"""The README of a Hub folder, made from the run's own facts and from nothing else.

A fact that is not on record is left out and reported as missing; no sentence and no number is made up.
"""

import json
import math
import re
from pathlib import Path

from nanollada.hub_upload.card_facts import Facts
from nanollada.hub_upload.card_results import eval_results, evaluation_section, number, sentence
from nanollada.hub_upload.evaluation_file import results_of
from nanollada.hub_upload.hub_names import check_languages, check_license, check_repositories

TEMPLATE = Path(__file__).with_name("model_card_template.md")
FORMATS = {"pretrain": "pretraining", "sft": "supervised fine-tuning"}
PROMPTS = ("The", "1", "a")
CHAT_PROMPTS = ("What is a list?", "Hello")
NEW_TOKENS, BLOCK_LENGTH, INFILLED = 32, 16, 4  # of the snippets


def build_card(
    model,
    tokenizer,
    facts: Facts,
    *,
    model_name: str,
    repo_id: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
    prompt: str | None = None,
):
    """
    Writes the card.

    Args:
        model ([`NanoLLaDAForCausalLM`] or [`NanoLLaDAForMaskedLM`]): What is exported.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        facts (`Facts`): Of `read_facts`.
        model_name (`str`): Title, and name in the `model-index`.
        repo_id (`str`, *optional*): What the snippets load. Defaults to `model_name`: the folder, from beside it.
        license, language, datasets, base_model (*optional*): Metadata of the Hub that no run records. `datasets`
            defaults to the sources that were given as hf://datasets/….
        prompt (`str`, *optional*): Of the snippets.

    Returns:
        `ModelCard`

    Raises:
        `ValueError`: for a `prompt` that the tokenizer can't express, for results that are no numbers, and for a
            licence, language or Hub name that the Hub does not know, naming the nearest one.
    """
    from huggingface_hub import ModelCard

    check_license(license)
    check_languages(language)
    check_repositories(datasets=datasets, base_model=base_model)
    evaluation = facts.evaluation or {"results": []}
    data = _metadata(model, facts, evaluation, model_name, repo_id or model_name)
    data.license, data.language, data.base_model = license, language, base_model
    data.datasets = datasets or data.datasets
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=model_name,
        diffusion=model.is_diffusion,
        parameters=f"{model.num_parameters():,}",
        shape=_shape(model),
        use=_use(model, tokenizer, facts, repo_id or model_name, prompt),
        stages=[_stage(stage) for stage in facts.stages],
        evaluation=evaluation_section(evaluation),
        limits=_limits(model, facts, language),
    )


def _metadata(model, facts: Facts, evaluation: dict, model_name: str, repo_id: str):
    from huggingface_hub import ModelCardData

    results = results_of(evaluation)
    kind = ["diffusion", "masked-diffusion", "llada"] if model.is_diffusion else ["autoregressive"]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanollada", "custom_code", *kind],
        datasets=_hub_datasets(facts.stages) or None,
        model_name=model_name if results else None,  # without results no field of the Hub's
        metrics=list(dict.fromkeys(result["metric"].partition("/")[0] for result in results)) or None,
        eval_results=eval_results(evaluation, repo_id) or None,
    )


def _hub_datasets(stages: list[dict]) -> list[str]:
    sources = [source for stage in stages for source in stage.get("data", {}).get("sources", [])]
    found = [re.match(r"hf://datasets/([^/]+/[^/@]+)", source) for source in sources]
    return list(dict.fromkeys(match[1] for match in found if match))


def _shape(model) -> list[tuple[str, str]]:
    config = model.config
    heads = f"{config.num_attention_heads} heads"
    if config.num_key_value_heads != config.num_attention_heads:
        heads += f" ({config.num_key_value_heads} for keys and values)"
    block = "the full row" if config.block_length is None else f"{config.block_length} tokens"
    return [
        ("Class", f"`{type(model).__name__}`"),
        ("Parameters", f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}"),
        ("Vocabulary", f"{config.tokenizer_length or config.vocab_size:,} tokens, special tokens included"),
        ("Shape", f"{config.num_hidden_layers} layers, width {config.hidden_size}, {heads}"),
        *([("Block length", block)] if model.is_diffusion else []),
    ]


def _stage(stage: dict) -> dict:
    """Title, table rows and command of one run; rows without a fact are left out."""
    data, objective = stage.get("data") or {}, dict(stage.get("objective") or {})
    name = objective.pop("name", None)
    kind = FORMATS.get(data.get("format"), "training")
    init, seed = stage.get("init"), stage.get("seed")
    start = f"the weights of `{init}`" if init else "random weights" if "init" in stage else None
    settings = ", ".join(f"{key} = {value}" for key, value in objective.items() if value is not None)
    best = stage.get("best") or {}
    rows = [
        ("Kind", f"{kind}, `{stage['model_class']}`" if stage.get("model_class") else kind),
        ("Started from", start),
        ("Objective", f"{name} ({settings})" if name and settings else name),
        ("Sources", ", ".join(f"`{source}`" for source in data.get("sources") or []) or None),
        ("Data", _counts(data)),
        ("Left out", _left_out(data)),
        ("Length", sentence("{} steps, {} epochs", number(stage.get("steps")), number(stage.get("epochs")))),
        ("Tokens seen", number(stage.get("tokens_seen"))),
        (
            "Best",
            sentence("{} {} at step {}", best.get("metric"), number(best.get("value")), number(best.get("step"))),
        ),
        ("Seed", None if seed is None else str(seed)),
        ("Time", sentence("{} s", number(stage.get("seconds")))),
        ("Hardware", stage.get("hardware")),
        ("Versions", ", ".join(f"{key} {value}" for key, value in (stage.get("versions") or {}).items()) or None),
    ]
    rows = [(label, str(text).replace("|", "\\|").replace("\n", " ")) for label, text in rows if text]
    shown = {name: stage.get(name) for name in ("command", "nanollada_version")}
    return {"title": kind.capitalize(), "rows": rows, **shown}


def _counts(data: dict) -> str | None:
    parts = [
        sentence("{} documents", number(data.get("documents"))),
        sentence("{} rows", number(data.get("rows"))),
        sentence("at most {} tokens a row", number(data.get("max_length"))),
        sentence("{} target tokens", number(data.get("target_tokens"))),
        sentence("{} bytes", number(data.get("bytes"))),
    ]
    return ", ".join(part for part in parts if part) or None


def _left_out(data: dict) -> str | None:
    """Skipped and truncated rows, dropped tokens; "nothing" only where the record says so."""
    if not any(key in data for key in ("skipped_rows", "truncated_rows", "dropped_tokens")):
        return None
    skipped = data.get("skipped_rows") or 0
    parts = [f"{count:,} broken rows ({why})" for why, count in skipped.items()] if isinstance(skipped, dict) else []
    if skipped and not parts:
        parts.append(f"{skipped:,} broken rows")
    for key, text in (
        ("truncated_rows", "the ends of {} rows"),
        ("dropped_tokens", "{} tokens of the last, partial row"),
    ):
        if data.get(key):
            parts.append(text.format(number(data[key])))
    return ", ".join(parts) or "nothing"


def _limits(model, facts: Facts, language) -> list[str]:
    data = (facts.stages[-1].get("data") or {}) if facts.stages else {}
    limits = [
        f"A model of {model.num_parameters():,} parameters: what it writes is often wrong, and must not be relied on.",
        "No evaluation of safety, bias or truthfulness is on record.",
    ]
    if data.get("max_length"):
        limits.append(f"Trained on at most {number(data['max_length'])} tokens at a time: longer texts are untried.")
    if not data.get("sources"):
        limits.append("What it was trained on is not on record.")
    if language:
        names = ", ".join([language] if isinstance(language, str) else language)
        limits.append(f"Language: {names}. Others are untried.")
    if model.is_diffusion:
        limits.append(
            "The number of places to fill (`max_new_tokens`) is chosen beforehand. Fewer `steps` are faster and worse."
        )
    if facts.evaluation is None:
        limits.append("No evaluation is on record.")
    elif any(result["bound"] for result in facts.evaluation.get("results", [])):
        limits.append(
            "Bits per byte of a diffusion model are an upper bound, those of an autoregressive model are exact."
        )
    return limits


def _use(model, tokenizer, facts: Facts, repo_id: str, prompt: str | None) -> dict:
    """What the template's python blocks need to run as they stand, one after the other."""
    fine_tuned = bool(facts.stages) and (facts.stages[-1].get("data") or {}).get("format") == "sft"
    chat = fine_tuned and bool(tokenizer.chat_template)
    text = choose_prompt(tokenizer, CHAT_PROMPTS if chat else PROMPTS, prompt)
    return {
        "repo_id": _literal(repo_id),
        "chat": chat and _survives(tokenizer, _rendered(tokenizer, text)),
        "prompt": _literal(text),
        "after": _literal(choose_prompt(tokenizer, (".", text))),
        "masks": INFILLED,
        "settings": _denoising(model.config.block_length) if model.is_diffusion else f"max_new_tokens={NEW_TOKENS}",
    }


def _denoising(block_length: int | None) -> str:
    if block_length is None:
        return f"max_new_tokens={NEW_TOKENS}, block_length={BLOCK_LENGTH}, steps={BLOCK_LENGTH}"
    blocks = math.ceil(NEW_TOKENS / block_length)
    return f"max_new_tokens={blocks * block_length}, steps={min(block_length, NEW_TOKENS)}"


def _literal(text: str) -> str:
    """Python source of a string, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def choose_prompt(tokenizer, candidates: tuple[str, ...], prompt: str | None = None) -> str:
    """
    The given prompt, or the first candidate that survives encoding and decoding; else the first text token that does.

    Raises:
        `ValueError`: if the tokenizer can't express `prompt`.
    """
    if prompt is not None:
        if not _survives(tokenizer, prompt):
            raise ValueError(f"`prompt` must be text that the tokenizer can express, got {prompt!r}")
        return prompt
    special = set(tokenizer.all_special_ids)
    tokens = (tokenizer.decode([index]) for index in range(len(tokenizer)) if index not in special)
    for text in (*candidates, *(token for token in tokens if token.strip())):
        if _survives(tokenizer, text):
            return text
    raise ValueError("`tokenizer` must be able to express some text, got none that survives encoding and decoding")


def _survives(tokenizer, text: str) -> bool:
    try:
        ids = tokenizer(text, add_special_tokens=False).input_ids
    except Exception:  # the Rust tokenizers raise bare exceptions, a character tokenizer for every unknown character
        return False
    return bool(ids) and tokenizer.decode(ids) == text


def _rendered(tokenizer, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
