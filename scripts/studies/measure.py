"""What a study measures at its trained models: held-out scores in parts, and the noise of the training loss."""

import os
from pathlib import Path

from nanollada.trainers.scoring.estimates import mean

MOST_GRADIENTS = 16


def score(folder, sources: dict[str, Path], blocks: list, *, samples: int, max_length: int, batch_size: int) -> list:
    """
    Scores a checkpoint on held-out texts: AR exactly, diffusion by its bound, on the same rows and bytes.

    Args:
        folder (`Path`): The checkpoint.
        sources (`dict[str, Path]`): Files by name.
        blocks (`list`): Block lengths of a diffusion model; `None` is its own, 0 the whole row.
        samples (`int`), max_length (`int`), batch_size (`int`): Masks per row, tokens per row, rows per forward.

    Returns:
        `list[dict]`: by source and block length `data`, `block_length`, `own` (whether it is the model's), `bound`,
            `estimator`, and `chunks`: `[nats, variance, tokens, bytes]` of every `batch_size` rows in order, which are
            the same texts for every model. The variance is that of the random masks.
    """
    from nanollada.scripts.decoding.checkpoint import load_checkpoint
    from nanollada.trainers.data.collator import Collator
    from nanollada.trainers.data.prepare import DataArguments, prepare_data
    from nanollada.trainers.scoring.kind import is_diffusion
    from nanollada.trainers.scoring.likelihood import evaluate_likelihood

    model, tokenizer = load_checkpoint(str(folder))
    collate, results = Collator(tokenizer.pad_token_id), []
    for name, path in sources.items():
        rows = prepare_data(DataArguments(eval_data=[str(path)], max_length=max_length), tokenizer).eval
        for block in blocks if is_diffusion(model) else [None]:
            parts = []
            for at in range(0, len(rows), batch_size):
                batch = collate([rows[i] for i in range(at, min(at + batch_size, len(rows)))])
                parts.append(evaluate_likelihood(model, [batch], samples=samples, block_length=block))
            length = block if block is not None else (model.config.block_length or 0) if is_diffusion(model) else None
            chunks = [[part.nats, part.standard_error**2, part.tokens, part.bytes] for part in parts]
            labels = {"own": block is None, "bound": parts[0].bound, "estimator": parts[0].estimator}
            results.append({"data": name, "block_length": length, **labels, "chunks": chunks})
    return results


def loss_noise(folder, files: list[str], draws: int, batch_size: int, max_length: int, seed: int) -> dict:
    """
    How much the training loss of one batch and its gradient vary with the masks, at a fixed model.

    Args:
        folder (`Path`): A trained diffusion checkpoint, which fixes the block length.
        files (`list[str]`): Where the batch is from: their first rows.
        draws (`int`): Masks drawn, as in so many epochs of training; the gradient is taken for the first 16.
        batch_size (`int`), max_length (`int`), seed (`int`): Of the batch and its noise.

    Returns:
        `dict`: `block_length`, `tokens` of the batch, and for `exact` and `bernoulli` the `mean` loss in nats per
            token with its `standard_error`, `standard_deviation`, and `gradient_variance`: the trace of the gradient's
            covariance over draws. The expected gradient is the same for both.
    """
    import torch

    from nanollada.scripts.decoding.checkpoint import load_checkpoint
    from nanollada.trainers.data.collator import Collator
    from nanollada.trainers.data.prepare import DataArguments, prepare_data
    from nanollada.trainers.registry import TRAINERS

    model, tokenizer = load_checkpoint(str(folder))
    rows = prepare_data(DataArguments(eval_data=files, max_length=max_length), tokenizer).eval
    rows = [rows[i] for i in range(min(batch_size, len(rows)))]
    collate = Collator(tokenizer.pad_token_id)
    record = {"block_length": model.config.block_length or 0, "tokens": 0}
    entry = TRAINERS["diffusion"]
    for mask_count in ("exact", "bernoulli"):
        args = entry.config_class(
            output_dir=os.path.join(folder, "noise"),
            mask_count=mask_count,
            seed=seed,
            plot_loss=False,
            use_cpu=model.device.type == "cpu",
        )
        trainer = entry.trainer_class(model, args, collate, rows)
        losses, gradients = [], []
        for draw in range(draws):
            batch = collate([{**row, "rank": rank, "epoch": draw} for rank, row in enumerate(rows)])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            record["tokens"] = int((batch["labels"] != -100).sum())
            with torch.set_grad_enabled(draw < MOST_GRADIENTS):
                loss = trainer.compute_loss(model, batch)
            losses.append(loss.item())
            if draw < MOST_GRADIENTS:
                slopes = torch.autograd.grad(loss, list(model.parameters()))
                gradients.append(torch.cat([slope.flatten() for slope in slopes]))
        record[mask_count] = {**moments(losses), "gradient_variance": gradient_variance(gradients)}
    return record


def moments(values: list[float]) -> dict:
    """Mean, its standard error, and standard deviation."""
    average = mean(values)
    error, draws = average["standard_error"], average["rows"]
    deviation = None if error is None else error * draws**0.5
    return {"mean": average["value"], "standard_error": error, "standard_deviation": deviation, "draws": draws}


def gradient_variance(gradients: list) -> float:
    """tr Cov(g), unbiased."""
    import torch

    return torch.stack(gradients).var(0).sum().item()
