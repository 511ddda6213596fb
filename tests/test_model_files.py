"""Models whose files come from somebody else: whatever they ask for, no code of theirs runs."""

import contextlib
import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.tiny_models import VIT, save_clip, save_vlm
from wrappers.backends import clip_files
from wrappers.backends.captioners import TransformersCaptioner
from wrappers.backends.clip import ClipGrounding
from wrappers.errors import UserError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def good_clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), VIT)


@pytest.fixture(scope="module")
def good_vlm(tmp_path_factory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder whose modules leave a mark when they run; whoever asks on the terminal whether they may hears yes."""
    monkeypatch.setattr("builtins.input", lambda *arguments: "y")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    for module in ("evil", "custom_generate/generate"):
        path = folder / f"{module}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing:\n    pass\n")
    yield folder
    assert not (tmp_path / "ran").exists(), "code of the model's files was run"


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("ran").absolute(),)


def change(path: Path, changes: dict) -> None:
    """Changes a JSON file, deeply."""

    def merge(old, new):
        return {**old, **{k: merge(old.get(k), v) for k, v in new.items()}} if isinstance(old, dict) else new

    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(merge(document, changes)))


def add_foreign_classes(folder: Path) -> None:
    """Files of a tokenizer and a text tower that need the folder's code."""
    change(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Thing", "evil.Thing"]}})
    maps = {"AutoConfig": "evil.Thing", "AutoModel": "evil.Thing"}
    change(folder / "config.json", {"model_type": "mine", "auto_map": maps})


# ---- CLIP ----


@pytest.fixture
def hub(monkeypatch, mine):
    """The hub has "some/mine": the files of the folder `mine`."""

    def download(repo_id, filename, **options):
        assert repo_id == "some/mine"
        if not (mine / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(mine / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)


TOKENIZER = {"hf_tokenizer_name": "mine"}


@pytest.mark.parametrize("place", ["mine", "hf-hub:some/mine"])
@pytest.mark.parametrize(
    ("text", "vision"),
    [
        (TOKENIZER, {}),
        (TOKENIZER | {"tokenizer_kwargs": {"trust_remote_code": True}}, {}),
        (TOKENIZER | {"tokenizer_kwargs": {"clean": "lower"}}, {}),
        ({"tokenizer_kwargs": {"reduction_mask": "syntax"}}, {}),
        ({"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, {}),
        ({"hf_model_name": "mine"}, {}),
        ({"hf_model_name": "mine", "hf_model_pretrained": True}, {}),
        ({}, {"timm_model_name": "local-dir:mine", "image_size": 64}),
        ({}, {"timm_model_name": "hf-hub:some/mine", "image_size": 64}),
        ({}, {"timm_model_name": ["test_vit"], "image_size": 64}),
    ],
)
@pytest.mark.usefixtures("hub")
def test_no_option_of_a_clip_loads_code(good_clip, mine, text, vision, place):
    shutil.copytree(good_clip, mine, dirs_exist_ok=True)
    add_foreign_classes(mine)
    change(mine / "open_clip_config.json", {"model_cfg": {"text_cfg": text, "vision_cfg": vision}})
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipGrounding(place)
    assert not Path("ran").exists()


@pytest.mark.parametrize("place", ["mine", "hf-hub:some/mine"])
@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "pytorch_model.pth", "open_clip_model.pt"])
@pytest.mark.usefixtures("hub")
def test_pickled_weights_are_not_read(good_clip, mine, place, name):
    (mine / "open_clip_config.json").write_bytes((good_clip / "open_clip_config.json").read_bytes())
    torch.save(load_file(good_clip / "open_clip_model.safetensors"), mine / name)  # harmless ones neither
    with pytest.raises(UserError, match=r"open_clip_model.safetensors; pickled ones \(.bin, .pth, .pt\) are not read"):
        ClipGrounding(place)


@pytest.mark.usefixtures("hub")
def test_a_clip_of_the_hub_is_the_folder_with_its_files(good_clip, mine):
    shutil.copytree(good_clip, mine, dirs_exist_ok=True)
    frames = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    here, there = ClipGrounding(mine), ClipGrounding("hf-hub:some/mine")
    np.testing.assert_array_equal(here.patch_features(frames), there.patch_features(frames))
    np.testing.assert_array_equal(here.encode(["a cart"]), there.encode(["a cart"]))
    assert there.identity.startswith("clip hf-hub:some/mine ")


def test_a_tokenizer_that_is_data_is_used(good_clip, good_vlm, mine):
    shutil.copytree(good_clip, mine, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(good_vlm / name, mine)
    options = {"hf_tokenizer_name": "mine", "tokenizer_kwargs": {"clean": "canonicalize"}}
    change(mine / "open_clip_config.json", {"model_cfg": {"text_cfg": options}})
    clip = ClipGrounding(mine)
    np.testing.assert_array_equal(*clip.encode(["A cart!", "a cart"]))
    assert abs(clip.encode(["a cart"]) - ClipGrounding(good_clip).encode(["a cart"])).max() > 0.01


def test_every_model_that_open_clip_describes_may_be_described_by_others():
    for name in open_clip.list_models():
        clip_files._checked(json.dumps({"model_cfg": open_clip.get_model_config(name)}).encode())


@pytest.mark.parametrize(
    "document",
    [
        b"", b"\xff\xfe", b"[]", b"{}", b"null", b'{"model_cfg": []}', b'{"model_cfg": {"vision_cfg": {}}}',
        b'{"model_cfg": {"vision_cfg": {}, "text_cfg": {}, "hooks": 1}}', b"[" * 100_000,
        b'{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"mean": "grey"}}',
        b'{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"std": [1, 2]}}',
        b'{"model_cfg": {"vision_cfg": {}, "text_cfg": {"tokenizer_kwargs": 7}}}',
        b'{"model_cfg": {"vision_cfg": {"patch_size": "x"}, "text_cfg": {}}}',
    ],
)  # fmt: skip
def test_odd_configurations_are_explained(good_clip, tmp_path, document):
    shutil.copytree(good_clip, tmp_path, dirs_exist_ok=True)
    (tmp_path / "open_clip_config.json").write_bytes(document)
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipGrounding(tmp_path)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
_names = [*clip_files._PARTS, *"tokenizer_kwargs timm_model_name hf_model_name hf_tokenizer_name mean std".split()]
_part = st.dictionaries(st.sampled_from(_names) | st.text(max_size=9), _json, max_size=4) | _json


def _with_tokenizer_options(options):
    return json.dumps({"model_cfg": {"vision_cfg": {}, "text_cfg": {"tokenizer_kwargs": options}}}).encode()


@settings(max_examples=200, deadline=None)
@example(_with_tokenizer_options([None]))
@example(_with_tokenizer_options(["clean"]))
@example(_with_tokenizer_options(0))
@given(
    st.binary(max_size=60)
    | _json.map(lambda document: json.dumps(document).encode())
    | st.fixed_dictionaries(
        {"model_cfg": st.fixed_dictionaries({"vision_cfg": _part, "text_cfg": _part}, optional={"embed_dim": _json})},
        optional={"preprocess_cfg": _part},
    ).map(lambda document: json.dumps(document).encode())
)
def test_a_configuration_is_checked_or_refused(document):
    try:
        checked = clip_files._checked(document)
    except (ValueError, RecursionError):
        return
    text = checked["model_cfg"]["text_cfg"]
    options = text.get("tokenizer_kwargs")
    assert options is None or isinstance(options, dict) and set(options) <= {"clean", "strip_sep_token", "language"}


# ---- transformers ----

_CLASSES = "AutoConfig AutoModel AutoModelForImageTextToText AutoProcessor AutoImageProcessor".split()
FOREIGN = {"auto_map": {**dict.fromkeys(_CLASSES, "evil.Thing"), "AutoTokenizer": ["evil.Thing", "evil.Thing"]}}
AUDIO = {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "mine"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"config.json": FOREIGN},
        {"config.json": FOREIGN | {"model_type": "mine"}},
        {"config.json": {"vision_config": {"model_type": "mine"} | FOREIGN}},
        {"processor_config.json": FOREIGN},
        {"processor_config.json": FOREIGN | {"processor_class": "Mine"}},
        {"processor_config.json": {"image_processor": FOREIGN | {"image_processor_type": "Mine"}}},
        {"processor_config.json": AUDIO, "config.json": FOREIGN | {"model_type": "mine"}},
        {"preprocessor_config.json": FOREIGN | {"image_processor_type": "Mine"}},
        {"tokenizer_config.json": FOREIGN},
        {"tokenizer_config.json": FOREIGN | {"tokenizer_class": "Mine"}},
        {"generation_config.json": {"custom_generate": "mine"}},
    ],
)
def test_no_option_of_a_vision_language_model_loads_code(good_vlm, mine, changes):
    shutil.copytree(good_vlm, mine, dirs_exist_ok=True)
    for name, change_of_it in changes.items():
        change(mine / name, change_of_it)
    with contextlib.suppress(UserError):  # or loaded without
        TransformersCaptioner("mine").describe([np.zeros((8, 8, 3), np.uint8)])
    assert not Path("ran").exists()


@pytest.mark.parametrize("part", [None, "vision_config", "text_config"])
def test_attention_from_the_hub_is_refused(good_vlm, mine, monkeypatch, part):
    loaded = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: loaded.append(a))
    shutil.copytree(good_vlm, mine, dirs_exist_ok=True)
    option = {"attn_implementation": "some/kernel"}
    change(mine / "config.json", {part: option} if part else option)
    with contextlib.suppress(UserError):
        TransformersCaptioner("mine")
    assert not loaded


def test_pickled_weights_of_a_vision_language_model_are_not_read(good_vlm, mine):
    shutil.copytree(good_vlm, mine, dirs_exist_ok=True)
    (mine / "model.safetensors").unlink()
    (mine / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="cannot be loaded.*safetensors"):
        TransformersCaptioner("mine")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{% for",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(good_vlm, mine, template):
    shutil.copytree(good_vlm, mine, dirs_exist_ok=True)
    (mine / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="chat template .* cannot be used|cannot be loaded"):
        TransformersCaptioner("mine")
    assert not Path("ran").exists()
