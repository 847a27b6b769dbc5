"""The ways of corrupting rows, by the name that `--corruption` takes. A new one is a file here and an entry."""

from nanollada.trainers.noise import masking
from nanollada.trainers.noise.corruption import CorruptionKind
from nanollada.trainers.noise.masking import MaskingSettings

CORRUPTIONS = {
    "masking": CorruptionKind(
        masking.corrupt,
        (MaskingSettings,),
        "masked diffusion bound",
        "targets give way to the mask token (LLaDA, BD3-LM)",
    ),
}
