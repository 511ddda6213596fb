"""How an annotator is named on the command line: its spec."""

from typing import Any

from wrappers.errors import UserError

VLM_PREFIXES = TRANSFORMERS, OPENAI = "transformers:", "openai:"
EMBEDDED = "embedded"
"""models of `semore-bench train-guidance`: the package's own, or those of a folder that follows behind a colon"""
EXPECTED_CAPTIONER = "embedded, embedded:<folder>, transformers:<name or folder> or openai:<base url>#<model>"
EXPECTED = f"none, simulator, {EXPECTED_CAPTIONER}"


def is_known(spec: str) -> bool:
    """Whether a spec has one of the forms that are `EXPECTED`."""
    return spec in ("none", "simulator") or is_embedded(spec) or spec.startswith(VLM_PREFIXES)


def is_embedded(annotator: Any) -> bool:
    """Whether it is the spec of models that `semore-bench train-guidance` makes."""
    return isinstance(annotator, str) and annotator.partition(":")[0] == EMBEDDED and annotator[-1] != ":"


def is_vlm(annotator: Any) -> bool:
    """Whether it is the spec of a vision-language model other than the embedded ones."""
    return isinstance(annotator, str) and annotator.startswith(VLM_PREFIXES)


def is_server(annotator: Any) -> bool:
    """Whether it is the spec of a model behind a server, which many environments may share."""
    return isinstance(annotator, str) and annotator.startswith(OPENAI)


def loads_models(annotator: Any) -> bool:
    """Whether it is the spec of an annotator with neural networks."""
    return is_embedded(annotator) or is_vlm(annotator)


def split_server(spec: str) -> tuple[str, str]:
    """Base URL and model of "openai:<base url>#<model>".

    Raises:
        UserError: if it is not of this form.
    """
    base_url, _, model = spec.removeprefix("openai:").rpartition("#")
    if spec.startswith("openai:") and base_url.startswith(("http://", "https://")) and model:
        return base_url, model
    raise UserError(
        f"unknown captioner {spec!r}: expected {EXPECTED_CAPTIONER}, for example "
        "openai:http://localhost:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct"
    )
