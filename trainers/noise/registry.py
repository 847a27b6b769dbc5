"""The ways of corrupting rows, by the name that `--corruption` takes. A new one is a file here and an entry."""

from nanollada.trainers.noise import editing, expansion, masking, structural
from nanollada.trainers.noise.corruption import CorruptionKind
from nanollada.trainers.noise.editing import EditingSettings
from nanollada.trainers.noise.expansion import ExpansionSettings
from nanollada.trainers.noise.masking import MaskingSettings
from nanollada.trainers.noise.structural import StructuralSettings

CORRUPTIONS = {
    "masking": CorruptionKind(
        masking.corrupt,
        (MaskingSettings,),
        "masked diffusion bound",
        "targets give way to the mask token (LLaDA, BD3-LM)",
    ),
    "editing": CorruptionKind(
        editing.corrupt,
        (MaskingSettings, EditingSettings),
        "masked diffusion bound and token editing",
        "in a share of the rows visible targets are replaced as well, and put right (LLaDA 2.1)",
        check=editing.check,
        drafts=editing.needs_drafts,
        lexicon=True,
    ),
    "structural": CorruptionKind(
        structural.corrupt,
        (MaskingSettings, EditingSettings, StructuralSettings),
        "masked diffusion bound, token and structural editing",
        "as editing, and in a share of the rows tokens are missing or too many (LLaDA 2.2)",
        check=structural.check,
        drafts=editing.needs_drafts,
        lexicon=True,
        documents=True,
        edit_tokens=structural.needs_edit_tokens,
    ),
    "expansion": CorruptionKind(
        expansion.corrupt,
        (MaskingSettings, ExpansionSettings),
        "masked diffusion bound and infilling of unknown length",
        "in a share of the rows a stretch is to be filled that has fewer or more masks than tokens (DreamOn)",
        check=expansion.check,
        edit_tokens=expansion.needs_edit_tokens,
    ),
}
