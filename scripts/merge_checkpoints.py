"""The parameter mean of checkpoints of one model, as a checkpoint (LLaDA2.0's checkpoint merge).

python scripts/merge_checkpoints.py --checkpoints outputs/run/checkpoint-800 outputs/run/checkpoint-1000 \
    --output_dir outputs/merged
"""

from dataclasses import dataclass, field

from nanollada.trainers.commands.ending import run_program


@dataclass
class MergeArguments:
    """What is merged, and where it goes."""

    checkpoints: list[str] = field(metadata={"help": "Folders with model.safetensors and config.json, two or more."})
    output_dir: str = field(metadata={"help": "New folder for the merged checkpoint."})


def main(argv: list[str] | None = None) -> None:
    """Parses arguments (or `--config file.yaml`), merges, saves, and says what was made."""
    from nanollada.trainers.commands.parser import Parser
    from nanollada.trainers.weights.merging import merge_checkpoints

    (args,) = Parser(MergeArguments).parse_args_and_config(argv)
    merge_checkpoints(args.checkpoints, args.output_dir)
    print(f"mean of {len(args.checkpoints)} checkpoints: {args.output_dir}")


if __name__ == "__main__":
    run_program(main)
