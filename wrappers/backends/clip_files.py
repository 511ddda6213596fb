"""CLIP models from files that may come from anybody: read, checked, and built without running code of theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from wrappers.backends import dense
from wrappers.backends.dense import DenseHead
from wrappers.backends.model_files import no_remote_code
from wrappers.errors import UserError

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
_PARTS = {
    "embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu", "init_logit_scale",
    "init_logit_bias", "nonscalar_logit_scale",
}  # fmt: skip
# How texts are cleaned. Others go to tokenizers of `transformers`, which take "trust_remote_code", or to files.
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language"}
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

Tokenizer = Callable[[Sequence[str]], Tensor]


class _Source(NamedTuple):
    """What a model is built from: its configuration, its weights, where its tokenizer's files and dense head are."""

    config: dict[str, Any]
    weights: Path
    tokenizer: str | Path | None
    head: Path | None = None


def load_clip(model: str, pretrained: str | None, grid: int | None) -> tuple[nn.Module, Tokenizer, DenseHead | None]:
    """Makes a CLIP model and its tokenizer from a name of open_clip, "hf-hub:<organisation>/<name>" or a folder.

    Folders and repositories give a configuration, safetensors weights and data for tokenizers; what their
    configuration may say is listed here, and nothing that it says loads code, another model or a pickle.
    A vision transformer without a dense head is made to see `grid` patches per side.

    Raises:
        UserError: if there is no such model, it cannot be had, or it asks for more than that.
    """
    is_foreign = model.startswith("hf-hub:") or Path(model).is_dir()
    if not is_foreign:
        _check_name(model, pretrained)
    try:
        with no_remote_code():
            if is_foreign:
                from_hub = model.startswith("hf-hub:")
                return _build(_download(model.removeprefix("hf-hub:")) if from_hub else _open(Path(model)), grid)
            config = open_clip.get_model_config(model)
            network = _create(model, pretrained, config, grid)
            return network, _tokenizer(config["text_cfg"], config["text_cfg"].get("hf_tokenizer_name")), None
    except UserError:
        raise
    except Exception as error:  # each format and each way of getting a file has exceptions of its own
        raise UserError(
            f"CLIP model {model}{':' + pretrained if pretrained and not is_foreign else ''} cannot be loaded "
            f"({error}); a download needs a network once (afterwards HF_HUB_OFFLINE=1 works), a folder with {CONFIG} "
            "and safetensors weights needs none, nor does annotator 'embedded'"
        ) from error


def _check_name(model: str, pretrained: str | None) -> None:
    """Says what is wrong with a name of open_clip before anything is downloaded."""
    if model not in open_clip.list_models():
        near = ", ".join(difflib.get_close_matches(model, open_clip.list_models(), 3, cutoff=0.3)) or "nothing like it"
        raise UserError(
            f"unknown CLIP model {model!r}: neither a folder nor a name that open_clip knows; the nearest are {near}"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags and not Path(str(pretrained)).is_file():
        raise UserError(
            f"CLIP model {model} has no weights called {pretrained!r}; expected a file or one of {', '.join(tags)}"
        )


def _open(folder: Path) -> _Source:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"expected {CONFIG} and a .safetensors file")
    config = _checked((folder / CONFIG).read_bytes())
    found = sorted({path.name for path in folder.glob("*.safetensors")} - {dense.FILE})
    names = [name for name in WEIGHTS if name in found] or found
    if not names:
        raise ValueError(f"there are no weights: expected {WEIGHTS[0]}; pickled ones (.bin, .pth, .pt) are not read")
    has_tokenizer = config["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
    has_head = "dense_head" in config
    return _Source(config, folder / names[0], folder if has_tokenizer else None, folder if has_head else None)


def _download(repository: str) -> _Source:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    config = _checked(Path(hf_hub_download(repository, CONFIG)).read_bytes())
    for name in WEIGHTS:
        with contextlib.suppress(EntryNotFoundError):
            weights = Path(hf_hub_download(repository, name))
            return _Source(config, weights, config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"))
    raise ValueError(f"it has no weights: expected {WEIGHTS[0]}; pickled ones (.bin, .pth, .pt) are not read")


def _build(source: _Source, grid: int | None) -> tuple[nn.Module, Tokenizer, DenseHead | None]:
    config = source.config["model_cfg"]
    # open_clip sees a folder with what was checked, and nothing else.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(source.config))
        (Path(folder) / WEIGHTS[0]).symlink_to(source.weights.resolve())
        network = _create(f"local-dir:{folder}", None, config, None if source.head else grid)
    head = None
    if source.head:
        head = _load_head(source.head, network.visual.output_dim, source.config["dense_head"]["width"])
    return network, _tokenizer(config["text_cfg"], source.tokenizer), head


def _load_head(folder: Path, dim: int, width: int) -> DenseHead:
    try:
        return DenseHead.load(folder, dim, width)
    except Exception as error:  # a file can be missing or damaged in many ways
        raise UserError(
            f"the dense head of the CLIP model in {folder} cannot be loaded ({error}); `semore-bench train-guidance` "
            "makes the embedded models anew"
        ) from error


def _create(name: str, pretrained: str | None, config: dict[str, Any], grid: int | None) -> nn.Module:
    vision = config["vision_cfg"]
    can_resize = grid is not None and "patch_size" in vision  # a plain vision transformer
    size = grid * vision["patch_size"] if can_resize else None
    # Weights that open_clip knows are pickles in part: torch.load(weights_only=True) runs no code.
    return open_clip.create_model(name, pretrained, require_pretrained=True, weights_only=True, force_image_size=size)


def _tokenizer(text: dict[str, Any], source: str | Path | None) -> Tokenizer:
    options = dict(text.get("tokenizer_kwargs") or {}, context_length=text.get("context_length", 77))
    if not source:
        return _ForgetfulTokenizer(**options)
    return HFTokenizer(source, tokenizer_mode=text.get("tokenizer_mode"), trust_remote_code=False, **options)


class _ForgetfulTokenizer(SimpleTokenizer):
    """The tokenizer of open_clip, which remembers every word that it ever met; captions bring new ones for ever."""

    max_words = 50_000
    cache: dict[str, str]

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        if len(self.cache) > self.max_words:
            self.cache = {token: token for token in map(self.decoder.get, self.all_special_ids)}
        return super().__call__(texts, context_length)


def _checked(document: bytes) -> dict[str, Any]:
    """The configuration, if it says nothing but numbers and names of architectures and vocabularies.

    Raises:
        ValueError: otherwise.
    """
    config = json.loads(document)
    model = _section(config, "model_cfg")
    _allow("model_cfg", model, _PARTS)
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    _allow("vision_cfg", vision, {field.name for field in dataclasses.fields(CLIPVisionCfg)})
    _allow("text_cfg", text, {field.name for field in dataclasses.fields(CLIPTextCfg)})
    if text.get("tokenizer_kwargs") is not None:
        _allow("tokenizer_kwargs", _section(text, "tokenizer_kwargs"), _TOKENIZER_OPTIONS)
    _check_name_in(vision, "timm_model_name", _is_timm_architecture, "an architecture of timm")
    _check_name_in(text, "hf_model_name", _text_towers().__contains__, "a text tower that open_clip uses itself")
    _check_name_in(text, "hf_tokenizer_name", _REPOSITORY.fullmatch, "a name on the hub")
    preprocessing = _section(config, "preprocess_cfg") if "preprocess_cfg" in config else {}
    for name in {"mean", "std"} & set(preprocessing):
        numbers = preprocessing[name]
        is_colour = isinstance(numbers, list) and all(isinstance(n, int | float) and abs(n) < 1e3 for n in numbers)
        if not is_colour or len(numbers) != 3:
            raise ValueError(f"{name} in preprocess_cfg of {CONFIG} must be three numbers, got {str(numbers)[:60]}")
    checked = {"model_cfg": model, "preprocess_cfg": preprocessing}
    if "dense_head" in config:  # which open_clip knows nothing of
        checked["dense_head"] = _section(config, "dense_head")
        if type(checked["dense_head"].get("width")) is not int:
            raise ValueError(f"dense_head in {CONFIG} has no width")
    return checked


def _section(config: Any, name: str) -> dict[str, Any]:
    if not isinstance(config, dict) or name not in config:
        raise ValueError(f"{CONFIG} has no {name}")
    if not isinstance(config[name], dict):
        raise ValueError(f"{name} in {CONFIG} must be an object with options by name, got {str(config[name])[:60]}")
    return config[name]


def _allow(section: str, given: dict[str, Any], allowed: set[str]) -> None:
    other = sorted(set(given) - allowed)
    if other:
        raise ValueError(f"{CONFIG} sets {', '.join(other)} in {section}, which is not for a model's files to say")


def _check_name_in(section: dict[str, Any], option: str, is_known: Callable[[str], Any], expected: str) -> None:
    value = section.get(option)
    if value and not (isinstance(value, str) and is_known(value)):
        raise ValueError(f"{CONFIG} asks for {option} {str(value)[:60]!r}: expected {expected}")


def _is_timm_architecture(name: str) -> bool:
    import timm

    return timm.is_model(name)  # false for what timm would read from a folder or from the hub


@functools.cache
def _text_towers() -> set[str]:
    """Text towers from `transformers` of models that open_clip itself describes: other names may hold code."""
    configs = map(open_clip.get_model_config, open_clip.list_models())
    return {config["text_cfg"]["hf_model_name"] for config in configs if config["text_cfg"].get("hf_model_name")}
