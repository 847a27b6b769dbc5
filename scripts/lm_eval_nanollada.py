"""lm-eval (EleutherAI's evaluation harness) on AR and diffusion checkpoints, by the likelihoods of this package.

python scripts/lm_eval_nanollada.py run --model nanollada --model_args pretrained=outputs/diffusion,samples=128 \\
    --tasks hellaswag --batch_size 16 --output_path results
python scripts/lm_eval_nanollada.py ls tasks

lm-eval's own command with one model more (0.4.13 finds models of other packages in no other way). The arguments of
`--model_args` are those of [`~scripts.evaluation.lm_eval_model.NanoLLaDALM`]. `scripts/lm_eval_tasks` has templates of
tasks over local JSON lines, to be included by a task's own YAML: `choice`, `pairs` and `text`, as the suite has them.
"""

import sys
from importlib.util import find_spec

from nanollada.trainers.commands.ending import run_program

NAME = "nanollada"


def register() -> None:
    """
    Makes the model known to lm-eval under the name "nanollada", for `lm_eval.simple_evaluate` as well.

    Raises:
        `ValueError`: if lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("the model nanollada needs lm-eval (pip install 'nanollada[peers]'), which is not installed")
    import lm_eval.models  # noqa: F401, fills the registry with lm-eval's own models, which it does only while empty
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="nanollada.scripts.evaluation.lm_eval_model:NanoLLaDALM")


def main(argv: list[str] | None = None) -> None:
    """lm-eval's command line."""
    register()
    if argv is not None:
        sys.argv[1:] = argv  # which is where lm-eval reads it
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    run_program(main)
