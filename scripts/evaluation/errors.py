"""Whether the standard errors of Monte Carlo bounds are what they say: short answers, drawn and enumerated."""

import math
from pathlib import Path

from nanollada.scripts.evaluation.bench import Bench
from nanollada.scripts.evaluation.kinds import KINDS
from nanollada.scripts.evaluation.rows import limited
from nanollada.scripts.evaluation.runner import Runner, plan
from nanollada.trainers.records import command, write_json


def short_pairs(bench: Bench, planned: list, samples: int) -> list[tuple[list[int], list[int]]]:
    """
    (context, answer) of a suite's rows, answers of at most 12 tokens and so long that the protocol draws their masks:
    choices, cloze answers, minimal pairs, reference answers; and pieces of texts, 16 tokens before each.
    """
    from nanollada.trainers.scoring.likelihood import MAX_EXACT_TARGETS

    fewest = next(n for n in range(2, 99) if 2**n - 1 > samples)
    if fewest > MAX_EXACT_TARGETS:
        raise ValueError(f"`samples` must be below {2**MAX_EXACT_TARGETS - 1} to check errors, got {samples}")
    sizes, pairs = range(fewest, MAX_EXACT_TARGETS + 1), []
    for item in planned:
        if short := KINDS[item.task.kind].short:
            pairs += short(bench, item.task, item.rows, sizes)
    return [pair for pair in pairs if len(pair[1]) in sizes]


def check_errors(bench: Bench, pairs: list, block_length: int | None = None) -> dict:
    """
    Draws and enumerates the bounds of `pairs` under a diffusion model.

    Returns:
        `dict`: `pairs`; `within_2`: the share of the drawn bounds within two of their standard errors of the truth
            (95.4 % for normal errors that are right); `mean_squared_z`: of error by standard error (1 if right);
            `mean_z`; `rms_error` and `rms_standard_error` in nats; `records`.
    """
    import torch

    from nanollada.trainers.scoring.continuations import conditional_rows
    from nanollada.trainers.scoring.likelihood import exact_nelbo, monte_carlo_nelbo

    prompts, answers = (list(column) for column in zip(*pairs, strict=True))
    records = []
    for batch in conditional_rows(prompts, answers, bench.tokenizer.pad_token_id, bench.batch_size):
        batch = {name: value.to(bench.model.device) for name, value in batch.items()}
        with torch.no_grad():
            exact = exact_nelbo(bench.model, batch, block_length)
            drawn, variance = monte_carlo_nelbo(bench.model, batch, bench.samples, bench.seed, None, block_length)
        for truth, found, noise in zip(exact.tolist(), drawn.tolist(), variance.tolist(), strict=True):
            records.append({"tokens": len(answers[len(records)]), "exact": truth, "drawn": found})
            records[-1]["standard_error"] = math.sqrt(noise)
        bench.progress(len(exact))
    errors = [record["drawn"] - record["exact"] for record in records]
    deviations = [record["standard_error"] for record in records]
    scores = [_score(error, deviation) for error, deviation in zip(errors, deviations, strict=True)]
    count = len(scores)
    return {
        "pairs": count,
        "samples": bench.samples,
        "seed": bench.seed,
        "within_2": sum(abs(z) <= 2 for z in scores) / count,
        "mean_squared_z": math.fsum(z * z for z in scores) / count,
        "mean_z": math.fsum(scores) / count,
        "rms_error": math.sqrt(math.fsum(error**2 for error in errors) / count),
        "rms_standard_error": math.sqrt(math.fsum(deviation**2 for deviation in deviations) / count),
        "records": records,
    }


def _score(error: float, deviation: float) -> float:
    """Error by standard error; where nothing was left to chance (blocks of a token) only rounding may differ."""
    if deviation < 1e-9:
        return 0.0 if abs(error) < 1e-4 else math.copysign(math.inf, error)
    return error / deviation


def check_suite(args) -> dict:
    """`check_errors` of each diffusion checkpoint on the suite's rows; writes `errors.json` and prints a line each."""
    from tqdm.auto import tqdm

    _, planned = plan(args)
    runner, found = Runner(args, planned), {}
    for name, checkpoint in zip(args.names, args.checkpoints, strict=True):
        bench = runner.load(checkpoint)
        if not bench.is_diffusion:
            print(f"{name}: autoregressive, its scores are exact")
            continue
        pairs = limited(short_pairs(bench, planned, args.samples), args.check_errors)
        if not pairs:
            raise ValueError(
                f"`suite` must hold answers of at most 12 tokens for `check_errors`, got none in {args.suite}"
            )
        with tqdm(total=len(pairs), desc=f"{name}: errors", unit=" answers") as bar:
            bench.progress = bar.update
            found[name] = check_errors(bench, pairs)
    content = {"command": command(), "suite": Path(args.suite).name, "models": found}
    Path(args.output).mkdir(parents=True, exist_ok=True)
    write_json(Path(args.output) / "errors.json", content)
    for name, figures in found.items():
        print(
            f"{name}: of {figures['pairs']} bounds with {figures['samples']} masks {figures['within_2']:.1%} lie "
            f"within two standard errors of the enumerated one; mean z² {figures['mean_squared_z']:.2f}, mean z "
            f"{figures['mean_z']:+.2f}; r.m.s. error {figures['rms_error']:.3f} nats"
        )
    return content
