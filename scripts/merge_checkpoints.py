"""The parameter mean of checkpoints of one model (LLaDA2.0's checkpoint merge), or an adapter in its model's weights.

python scripts/merge_checkpoints.py --checkpoints outputs/run/checkpoint-800 outputs/run/checkpoint-1000 \
    --output_dir outputs/merged
python scripts/merge_checkpoints.py --adapter outputs/lora --output_dir outputs/merged
"""

from dataclasses import dataclass, field

from nanollada.trainers.commands.ending import run_program


@dataclass
class MergeArguments:
    """What is merged, and where it goes."""

    output_dir: str = field(metadata={"help": "New folder for the merged checkpoint."})
    checkpoints: list[str] | None = field(
        default=None, metadata={"help": "Folders with model.safetensors and config.json, two or more: their mean."}
    )
    adapter: list[str] | None = field(
        default=None, metadata={"help": "Folder of an adapter, which goes into the weights of the model it names."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code of an adapter's model."})

    def __post_init__(self):
        if (self.checkpoints is None) == (self.adapter is None):
            given = "both" if self.adapter else "neither"
            raise ValueError(f"`checkpoints` or `adapter` must be given, got {given}")
        if self.adapter is not None and len(self.adapter) != 1:
            raise ValueError(
                f"`adapter` must be one folder, got {len(self.adapter)}: adapters trained apart don't add up (merge "
                "one, and train the next on that)"
            )
        if self.trust_remote_code and self.adapter is None:
            raise ValueError("`trust_remote_code` is for `adapter`, got True without")


def main(argv: list[str] | None = None) -> None:
    """Parses arguments (or `--config file.yaml`), merges, saves, and says what was made."""
    from nanollada.trainers.commands.parser import Parser
    from nanollada.trainers.weights.adapters import merge_adapter
    from nanollada.trainers.weights.merging import merge_checkpoints

    (args,) = Parser(MergeArguments).parse_args_and_config(argv)
    if args.adapter is not None:
        model = merge_adapter(args.adapter[0], args.output_dir, args.trust_remote_code)
        print(f"{args.adapter[0]} in the weights of its {type(model).__name__}: {args.output_dir}")
        return
    merge_checkpoints(args.checkpoints, args.output_dir)
    print(f"mean of {len(args.checkpoints)} checkpoints: {args.output_dir}")


if __name__ == "__main__":
    run_program(main)
