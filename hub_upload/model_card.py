"""The README of a Hub folder, made from the run's own facts and from nothing else.

A fact that is not on record is left out and reported as missing; no sentence and no number is made up.
"""

import re
from pathlib import Path

from nanollada.hub_upload.card_facts import Facts
from nanollada.hub_upload.card_results import command_block, eval_results, evaluation_section, number, sentence
from nanollada.hub_upload.card_use import corruptions, edits_structurally, use_of
from nanollada.hub_upload.evaluation_file import results_of
from nanollada.hub_upload.hub_names import check_languages, check_license, check_repositories

TEMPLATE = Path(__file__).with_name("model_card_template.md")
FORMATS = {
    "pretrain": "pretraining",
    "sft": "supervised fine-tuning",
    "preference": "preference learning",
    "prompt": "reinforcement learning",
}
HUB = "https://huggingface.co/"


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
    twin: str | None = None,
    picture: str | None = None,
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
        prompt (`str`, *optional*): Of the snippets. Defaults to the first that the evaluation asked.
        twin (`str`, *optional*): Hub name of the model of the other kind. Without an owner it is this one's.
        picture (`str`, *optional*): File beside the card that shows how the model writes.

    Returns:
        `ModelCard`

    Raises:
        `ValueError`: for a `prompt` that the tokenizer can't express, for results that are no numbers, and for a
            licence, language or Hub name that the Hub does not know, naming the nearest one.
    """
    from huggingface_hub import ModelCard

    check_license(license)
    check_languages(language)
    check_repositories(datasets=datasets, base_model=base_model, twin=twin)
    evaluation = facts.evaluation or {"results": []}
    data = _metadata(model, facts, evaluation, model_name, repo_id or model_name)
    data.license, data.language, data.base_model = license, language, base_model
    if base_model is not None:
        data.base_model_relation = "adapter" if _adapter(model) else "finetune"
    data.datasets = datasets or data.datasets
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=model_name,
        diffusion=model.is_diffusion,
        adapter=_adapter(model) and {"kind": _adapter(model).peft_type.value, "base": base_model},
        parameters=f"{model.num_parameters():,}",
        shape=_shape(model),
        use=use_of(model, tokenizer, facts, repo_id or model_name, prompt, _base(model, base_model)),
        twin=twin and _twin(model, twin, repo_id or model_name),
        picture=picture,
        stages=[_stage(stage) for stage in facts.stages],
        evaluation=evaluation_section(evaluation),
        limits=_limits(model, facts, language),
    )


def _adapter(model):
    """The settings of the adapter that a model has, PEFT's."""
    return getattr(model, "active_peft_config", None)


def _base(model, name: str) -> tuple | None:
    """Name and revision of the model under an adapter; one of another name has no revision of that."""
    adapter = _adapter(model)
    return adapter and (name, adapter.revision if adapter.base_model_name_or_path == name else None)


def _twin(model, twin: str, repo_id: str) -> dict:
    """Kind, name and address; beside a folder without an owner, which uploading completes."""
    owner = repo_id.rpartition("/")[0]
    address = HUB + (twin if "/" in twin else f"{owner}/{twin}") if "/" in twin or owner else f"../{twin}"
    return {"kind": "autoregressive" if model.is_diffusion else "diffusion", "name": twin, "address": address}


def _metadata(model, facts: Facts, evaluation: dict, model_name: str, repo_id: str):
    from huggingface_hub import ModelCardData

    results = results_of(evaluation)
    kind = ["diffusion", "masked-diffusion", "llada"] if model.is_diffusion else ["autoregressive"]
    kind += ["block-diffusion"] if model.is_diffusion and model.config.block_length else []
    adapter = _adapter(model)
    kind += [adapter.peft_type.value.lower()] if adapter else []
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
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
    adapter = _adapter(model)
    return [
        ("Class", f"`{type(model.get_base_model() if adapter else model).__name__}`"),
        ("Parameters", f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}"),
        *([("Adapter", _adapter_size(model))] if adapter else []),
        ("Vocabulary", f"{config.tokenizer_length or config.vocab_size:,} tokens, special tokens included"),
        ("Shape", f"{config.num_hidden_layers} layers, width {config.hidden_size}, {heads}"),
        *([("Block length", block)] if model.is_diffusion else []),
        *([("Edit tokens", "`<|delete|>` and `<|insert|>`, which no text holds")] if config.edit_token_ids else []),
    ]


def _stage(stage: dict) -> dict:
    """Title, table rows and command of one run; rows without a fact are left out."""
    data, objective = stage.get("data") or {}, dict(stage.get("objective") or {})
    name = objective.pop("name", None)
    kind = FORMATS.get(data.get("format"), "training")
    init, seed = stage.get("init"), stage.get("seed")
    start = f"the weights of `{init}`" if init else "random weights" if "init" in stage else None
    settings = ", ".join(f"{key} = {_plain(value)}" for key, value in objective.items() if value is not None)
    best = stage.get("best") or {}
    rows = [
        ("Kind", f"{kind}, `{stage['model_class']}`" if stage.get("model_class") else kind),
        ("Started from", start),
        ("Objective", f"{name} ({settings})" if name and settings else name),
        ("Adapter", _adapter_settings(stage.get("adapter") or {})),
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
    command = stage.get("command") and command_block(stage["command"])
    return {
        "title": kind.capitalize(),
        "rows": rows,
        "command": command,
        "nanollada_version": stage.get("nanollada_version"),
    }


def _adapter_settings(settings: dict) -> str | None:
    """Kind, settings that are not PEFT's defaults, and how many parameters were trained."""
    settings, trained = dict(settings), settings.get("trained_parameters")
    kind = settings.pop("peft_type", "PEFT")
    given = {name: value for name, value in settings.items() if name not in ("task_type", "trained_parameters")}
    words = "; ".join(f"{name} = {_plain(value)}" for name, value in given.items() if value is not None)
    parts = (f"{kind} ({words})" if words else kind, sentence("{} parameters trained", number(trained)))
    return ", ".join(filter(None, parts)) if settings else None


def _plain(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _adapter_size(model) -> str:
    """Kind, parameters and places of an adapter."""
    from peft import get_peft_model_state_dict

    config = _adapter(model)
    own = sum(value.numel() for value in get_peft_model_state_dict(model, save_embedding_layers=False).values())
    places = getattr(config, "target_modules", None) or ()
    places = f", on {places if isinstance(places, str) else ', '.join(sorted(places))}" if places else ""
    return f"{config.peft_type.value}, {own:,} parameters of these{places}"


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


def _limits_of_edits(model, facts: Facts) -> list[str]:
    """What edits cost and can't do: of a model that decodes with them, or has tokens for them."""
    settings, limits = model.generation_config, []
    if model.is_diffusion and any(
        getattr(settings, name) is not None for name in ("edit_threshold", "joint_threshold")
    ):
        limits.append(
            "It edits what it wrote until a block is finished: that takes further forward passes, an edit can be for "
            "the worse, and earlier blocks stay as they are."
        )
    if not model.config.edit_token_ids:
        return limits
    if not model.is_diffusion:
        limits.append("The edit tokens are those of a diffusion twin: this model never writes them.")
    elif edits_structurally(model, facts):
        limits.append(
            "Structural edits are `generate`'s own (`structural_edits`): greedy, inside the block at work, as many as "
            "`max_post_steps` allows. Other programs' decoders see a model of text alone: both edit tokens have "
            "probability 0 unless `forward` is asked for them (`edit_tokens=True`), and no likelihood counts them."
        )
    elif "expansion" in corruptions(facts):
        limits.append(
            "It fills gaps of unknown length by `generate(ids_with_masks, max_new_tokens=0, max_expansions=…)`, whole "
            "rows only; how often it writes each of several fitting texts is not the law of the texts."
        )
    else:
        limits.append("It has tokens for structural edits, and no record says that it was trained to use them.")
    return limits


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
            "The most tokens to write (`max_new_tokens`) are chosen beforehand. Fewer `steps` are faster and worse."
        )
    limits += _limits_of_edits(model, facts)
    if facts.evaluation is None:
        limits.append("No evaluation is on record.")
    elif any(result["bound"] for result in facts.evaluation.get("results", [])):
        limits.append(
            "Bits per byte of a diffusion model are an upper bound, those of an autoregressive model are exact."
        )
    return limits
