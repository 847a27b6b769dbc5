"""What a study of post-training measures at its models: held-out pairs, problems, and how two gradients agree."""

import json
from pathlib import Path

DECODINGS = {  # by name in tables; a threshold is diffusion's
    "greedy": {"temperature": 0.0},
    "threshold": {"temperature": 0.0, "threshold": 0.9},
    "sampled": {"temperature": 1.0},
}
TOGETHER = 100  # rows of a batch
PROMPTS = 8  # whose rollouts are a gradient's batch


def preferences(folder: str, sources: list[str], samples: int, max_length: int | None) -> dict:
    """
    Scores held-out pairs, every model with the same masks, and ended as DPO's defaults end them.

    Args:
        folder (`str`): The checkpoint.
        sources (`list[str]`): Files of pairs; those longer than `max_length` are left out.
        samples (`int`): Masks per answer, even.
        max_length (`int`, *optional*): Most tokens of a prompt and answer.

    Returns:
        `dict`: `pairs`, in the order of the files: `[chosen, rejected]`, each `[log-probability, tokens]` in nats
            (bounds for diffusion), and `mask_variance`, that of the difference of the two by the masks, the mean.
    """
    from nanollada.scripts.decoding.checkpoint import load_checkpoint
    from nanollada.trainers.data.feedback.preferences import PreferenceArguments, prepare_preferences
    from nanollada.trainers.preferences.judging import score_pairs
    from nanollada.trainers.preferences.pairs import padding_for
    from nanollada.trainers.scoring.kind import is_diffusion

    model, tokenizer = load_checkpoint(folder)
    rows = prepare_preferences(PreferenceArguments(eval_data=sources, on_bad_rows="skip"), tokenizer, max_length).eval
    padding = None
    if is_diffusion(model):
        padding = padding_for(None, model.config, model.generation_config, tokenizer.eos_token_id, max_length)
    judged = score_pairs(model, rows, padding=padding, samples=samples)
    pairs = []
    for row, scores in zip(rows, judged.scores.tolist(), strict=True):
        lengths = [len(row[name]) for name in ("chosen_ids", "rejected_ids")]
        pairs.append([list(answer) for answer in zip(scores, lengths, strict=True)])
    return {"pairs": pairs, "mask_variance": judged.variances.sum(1).mean().item()}


def problems(folder: str, puzzle: str, count: int, options: dict, max_new_tokens: int, seed: int) -> dict:
    """
    Lets a model solve fresh problems, the same ones for all.

    Args:
        folder (`str`): The checkpoint.
        puzzle (`str`), count (`int`), options (`dict`): Which problems, of the test side, and how many.
        max_new_tokens (`int`): Places of an answer.
        seed (`int`): Of what is drawn.

    Returns:
        `dict`: `solved`: by decoding 0 or 1 for each problem.
    """
    from nanollada.scripts.decoding.checkpoint import load_checkpoint, prompt_ids
    from nanollada.scripts.decoding.settings import default_decoding, generation_settings
    from nanollada.trainers.puzzles.registry import make_rows, solves
    from nanollada.trainers.scoring.kind import is_diffusion

    model, tokenizer = load_checkpoint(folder)
    rows = make_rows(puzzle, count, 0, "test", **options)
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in rows]
    solved = {}
    for name, decoding in DECODINGS.items():
        if "threshold" in decoding and not is_diffusion(model):
            continue
        with default_decoding(model):
            settings = generation_settings(model, max_new_tokens=max_new_tokens, **decoding)
            texts = _answers(model, tokenizer, prompts, settings, seed)
        solved[name] = [int(solves(puzzle, row, text)) for row, text in zip(rows, texts, strict=True)]
    return {"solved": solved}


def _answers(model, tokenizer, prompts: list[list[int]], settings: dict, seed: int) -> list[str]:
    """What is written behind each prompt, up to its end."""
    from nanollada.scripts.evaluation.answers import batches_of_prompts, new_tokens, until_end

    texts = [""] * len(prompts)
    for number, places in enumerate(batches_of_prompts(model, prompts, TOGETHER, settings)):
        batch = [prompts[place] for place in places]
        written = new_tokens(model, batch, tokenizer.pad_token_id, 1000 * seed + number, settings)
        for place, ids in zip(places, written, strict=True):
            texts[place] = tokenizer.decode(until_end(model, ids)[0], skip_special_tokens=True)
    return texts


def agreement(folder: str, source: str, rollouts: int, max_new_tokens: int, seed: int) -> dict:
    """
    How much the policy gradients of one batch agree: of its ELBO (each number of masks once) and of its replay.

    Args:
        folder (`str`): A diffusion checkpoint.
        source (`str`): A file of prompts, the last 8 of which are taken.
        rollouts, max_new_tokens (`int`): Of a prompt, and places of each.
        seed (`int`): Of what is drawn.

    Returns:
        `dict`: `cosine` of the two, `norm_ratio` (ELBO / replay), and `reward`, the share of rollouts that are right;
            the first two are `None` where all or none are.
    """
    import torch

    from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig
    from nanollada.scripts.decoding.checkpoint import load_checkpoint, prompt_ids
    from nanollada.scripts.decoding.settings import default_decoding
    from nanollada.scripts.evaluation.answers import until_end
    from nanollada.trainers.puzzles.registry import solves
    from nanollada.trainers.rollouts.decoding import Decoding
    from nanollada.trainers.rollouts.likelihoods import ESTIMATORS
    from nanollada.trainers.rollouts.rollouts import Rollouts

    model, tokenizer = load_checkpoint(folder)
    lines = Path(source).read_text(encoding="utf-8").splitlines()[-PROMPTS:]
    rows = [row for row in map(json.loads, lines) for _ in range(rollouts)]
    ids = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    width = max(map(len, ids))
    padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    settings = {"max_new_tokens": max_new_tokens, "temperature": 1.0}
    generator = torch.Generator(model.device).manual_seed(seed)
    with default_decoding(model), torch.no_grad():
        options = {"attention_mask": mask, "generator": generator, "return_dict_in_generate": True, **settings}
        output = model.generate(padded, **options)
    texts = [tokenizer.decode(until_end(model, row[width:])[0]) for row in output.sequences.tolist()]
    rewards = [float(solves(row["verify"], row, text)) for row, text in zip(rows, texts, strict=True)]
    by_prompt = torch.tensor(rewards, device=model.device).view(-1, rollouts)
    advantages = (by_prompt - by_prompt.mean(1, keepdim=True)).flatten()  # [B]
    written, decoding = Rollouts.of(output, mask, model.config), NanoLLaDAGenerationConfig(**settings)
    slopes = []
    for name in ("elbo", "replay"):
        scores = ESTIMATORS[name].score(model, written, Decoding.of(decoding, model.config)).total()  # [B]
        parts = torch.autograd.grad((advantages * scores).sum(), list(model.parameters()))
        slopes.append(torch.cat([part.flatten() for part in parts]))
    sizes = [slope.norm().item() for slope in slopes]
    known = min(sizes) > 0
    cosine = torch.cosine_similarity(*slopes, dim=0).item() if known else None
    return {"cosine": cosine, "norm_ratio": sizes[0] / sizes[1] if known else None, "reward": by_prompt.mean().item()}
