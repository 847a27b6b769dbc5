"""Golden tokens: what a folder's weights decode, recomputed in float32 on the CPU when the folder is made."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from nanollada.hub_upload.evaluation_file import file_digest
from nanollada.hub_upload.recompute import recompute, runs_to_check
from nanollada.hub_upload.verify import GOLDEN

ABOUT = (
    "Greedy tokens of these weights, by a plain loop without generate and without a cache, in float32 on a CPU: "
    "python verify.py compares. steps: the forward that decided each token; margins: how clear each forward's choices "
    "were, in nats."
)


def write_golden(folder: Path) -> None:
    """
    Writes golden.json into an exported folder, whose model is loaded with the local classes.

    Args:
        folder (`Path`): With config.json and safetensors.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runs = [{**run, **recompute(model, run["prompt"], **run["settings"])} for run in runs_to_check(model.config)]
    runs = [{**run, "margins": [round(margin, 6) for margin in run["margins"]]} for run in runs]
    facts = {
        "about": ABOUT,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "sha256": {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))},
    }
    lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)  # a line per run
    head = json.dumps(facts, indent=2).removesuffix("\n}")
    (folder / GOLDEN).write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")
