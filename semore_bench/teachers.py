"""Who trained the models that guide an agent, and with what: results say so of every row that is guided."""

import re

from wrappers.backends.specs import is_embedded, is_vlm


def teacher(guidance: str | None) -> str | None:
    """A sentence on guidance as results name it, see `CommonArgs.guidance_source`; None where nothing guides."""
    annotator, *clip = re.split(r"(?:^|, )CLIP ", guidance or "none", maxsplit=1)
    said = [_of_annotator(annotator), *map(_of_clip, clip)]
    return "; ".join(text for text in said if text) or None


def _of_annotator(annotator: str) -> str | None:
    if annotator == "simulator":
        return "the simulator itself names things and knows their masks (privileged)"
    if is_embedded(annotator):
        return f"captioner and CLIP were {_of_embedded(annotator)}"
    return "a vision-language model that others trained, with data of theirs" if is_vlm(annotator) else None


def _of_clip(clip: str) -> str:
    if clip == "embedded":
        return f"the CLIP was {_of_embedded(clip)}"
    return f"CLIP {clip} was trained by others, with data of theirs"


def _of_embedded(annotator: str) -> str:
    from wrappers.backends.embedded import learned_from  # evaluation needs no model

    domains, left_out = "the domains that their card lists", re.search(r" \(without (.*)\)$", annotator)
    without = left_out[1] if left_out else None
    if annotator == "embedded" and (learned := learned_from(annotator)):
        domains, without = ", ".join(learned["domains"]), learned["left_out"]
    never = f", never of {without}" if without else ""
    return f"trained on the simulator's captions and masks of {domains}, in other states{never}"
