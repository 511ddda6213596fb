"""CLIP grounding: dense features against slow loops, probabilities, towers, and what is said when there is no model."""

import copy
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.tiny_models import VIT, save_clip
from wrappers.backends.annotation import TextEncoder
from wrappers.backends.clip import ClipGrounding
from wrappers.errors import UserError

torch.set_num_threads(1)

RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TIMM = {"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), VIT)


def random_frames(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def normalised(frames: np.ndarray) -> torch.Tensor:
    pixels = (frames / 255 - [0.2, 0.4, 0.6]) / [0.5, 0.6, 0.7]
    return torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)


def load(folder: Path) -> torch.nn.Module:
    return open_clip.create_model(f"local-dir:{folder}").eval()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def layer_norm(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    weight, bias = (parameter.detach().numpy().astype(float) for parameter in (norm.weight, norm.bias))
    return (x - x.mean()) / np.sqrt(x.var() + norm.eps) * weight + bias


@torch.no_grad()
def loop_reference(visual: torch.nn.Module, images: torch.Tensor, mode: str) -> np.ndarray:
    """The method in words: every image, head and token on its own, in double precision."""
    seen = []
    last = visual.transformer.resblocks[-1]
    handle = last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    visual(images)
    handle.remove()
    tokens = seen[0].numpy().astype(float)

    def array(parameter):
        return parameter.numpy().astype(float)

    heads, width = last.attn.num_heads, tokens.shape[2]
    weights = np.split(array(last.attn.in_proj_weight), 3)
    biases = np.split(array(last.attn.in_proj_bias), 3)
    scale = getattr(last.ls_1, "gamma", None)
    grid = int(np.sqrt(tokens.shape[1] - 1))
    result = np.empty((len(images), grid, grid, visual.output_dim))
    for image, sequence in enumerate(tokens):
        inputs = [layer_norm(token, last.ln_1) for token in sequence]
        query, _, value = ([weights[i] @ token + biases[i] for token in inputs] for i in range(3))
        for patch in range(1, len(sequence)):
            mixed = []
            for head in range(heads):
                part = slice(head * width // heads, (head + 1) * width // heads)
                if mode == "maskclip":
                    mixed.append(value[patch][part])
                    continue
                similar = [query[patch][part] @ other[part] / np.sqrt(width / heads) for other in query]
                mixed.append(sum(a * v[part] for a, v in zip(softmax(np.array(similar)), value, strict=True)))
            output = array(last.attn.out_proj.weight) @ np.concatenate(mixed) + array(last.attn.out_proj.bias)
            if scale is not None:
                output = output * array(scale)
            row, column = divmod(patch - 1, grid)
            result[image, row, column] = layer_norm(output, visual.ln_post) @ array(visual.proj)
    return unit(result)


@pytest.mark.parametrize("mode", ["clearclip", "maskclip"])
@pytest.mark.parametrize("extra", [{}, {"ls_init_value": 0.5}, {"pool_type": "avg", "final_ln_after_pool": True}])
def test_dense_features_equal_slow_loops(tmp_path, mode, extra):
    folder = save_clip(tmp_path, {**VIT, **extra})
    frames = random_frames(3)
    features = ClipGrounding(folder, mode=mode).patch_features(frames)
    assert features.shape == (3, 4, 4, 8)
    np.testing.assert_allclose(features, loop_reference(load(folder).visual, normalised(frames), mode), atol=2e-5)


def test_modes_differ(folder):
    frames = random_frames(1)
    clear, mask = (ClipGrounding(folder, mode=mode).patch_features(frames) for mode in ("clearclip", "maskclip"))
    assert abs(clear - mask).max() > 0.05


def test_probabilities_are_the_softmax_at_scale_50(folder):
    clip = ClipGrounding(folder)
    names = ["cart", "pole", "floor"]
    frames = random_frames(2)
    probabilities = clip.patch_probabilities(frames, names)
    assert probabilities.shape == (2, 3, 4, 4)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    features, classes = clip.patch_features(frames), clip.encode_classes(names)
    for image, row, column in [(0, 0, 0), (1, 3, 2)]:
        expected = softmax(50 * (classes @ features[image, row, column]).astype(float))
        np.testing.assert_allclose(probabilities[image, :, row, column], expected, rtol=1e-4)


@torch.no_grad()
def test_resnet_applies_value_and_output_projection_at_every_location(tmp_path):
    folder = save_clip(tmp_path, RESNET)
    clip = ClipGrounding(folder)
    assert clip.grid == 2
    frames = random_frames(2, 64)
    visual = load(folder).visual
    features = visual.forward_intermediates(normalised(frames), indices=1)["image_intermediates"][-1]
    pool = visual.attnpool
    for image in range(2):
        for row in range(2):
            for column in range(2):
                value = pool.v_proj.weight @ features[image, :, row, column] + pool.v_proj.bias
                expected = unit((pool.c_proj.weight @ value + pool.c_proj.bias).numpy())
                np.testing.assert_allclose(clip.patch_features(frames)[image, row, column], expected, atol=1e-5)


@torch.no_grad()
def test_timm_towers_average_to_the_image_embedding(tmp_path):
    folder = save_clip(tmp_path, TIMM)
    clip = ClipGrounding(folder)
    frames = random_frames(2, 64)
    trunk = clip._dense(normalised(frames)).numpy()
    assert trunk.shape == (2, clip.grid, clip.grid, 8)
    expected = load(folder).encode_image(normalised(frames)).numpy()
    np.testing.assert_allclose(trunk.mean((1, 2)), expected, atol=1e-5)
    np.testing.assert_allclose(clip.image_embeddings(frames), unit(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({**VIT, "attentional_pool": True}, "pools patches by attention"),
        ({**VIT, "qk_norm": True}, "attention is not the standard one"),
        ({**TIMM, "timm_model_name": "test_vit", "image_size": 160, "timm_pool": ""}, "gives no map of features"),
        (
            {**TIMM, "timm_model_name": "test_efficientnet", "timm_pool": "rot_attn"},
            "pools locations by timm's attention",
        ),
        ({**VIT, "image_size": [32, 48]}, "only square grids"),
    ],
)
def test_towers_without_patches_are_refused_with_the_reason(tmp_path, vision, reason):
    with pytest.raises(UserError, match=reason):
        ClipGrounding(save_clip(tmp_path, vision))


def test_texts_are_embedded_as_open_clip_does(folder):
    clip = ClipGrounding(folder)
    assert isinstance(clip, TextEncoder)
    texts = ["the cart is left", "", "the pole is up", "the cart is left"]
    embeddings = clip.encode(texts)
    assert embeddings.shape == (4, clip.dim)
    assert embeddings.dtype == np.float32
    with torch.no_grad():
        expected = load(folder).encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    np.testing.assert_array_equal(clip.encode(texts[::-1]), embeddings[::-1])
    assert clip.encode([]).shape == (0, clip.dim)


def test_words_and_texts_are_not_kept_for_ever(folder, monkeypatch):
    clip, fresh = ClipGrounding(folder), ClipGrounding(folder)
    monkeypatch.setattr(type(clip._tokenizer), "max_words", 20)
    monkeypatch.setattr("wrappers.backends.clip._MAX_REMEMBERED", 8)
    for number in range(50):
        embeddings = clip.encode([f"word{'abcdefghij'[number % 10]} {'x' * number} <start_of_text>"])
        assert len(clip._tokenizer.cache) < 30
        assert len(clip._texts) <= 8
    np.testing.assert_array_equal(embeddings, fresh.encode([f"wordj {'x' * 49} <start_of_text>"]))


def test_class_embeddings_are_averages_over_templates(folder):
    clip = ClipGrounding(folder, templates=("a {}.", "no {} here"))
    sentences = clip.encode(["a cart.", "no cart here", "a {curly}.", "no {curly} here"]).reshape(2, 2, -1)
    np.testing.assert_allclose(clip.encode_classes(["cart", "{curly}"]), unit(sentences.mean(1)), atol=1e-6)


def test_frames_are_resized_and_independent_of_their_batch(folder):
    clip = ClipGrounding(folder)
    [large], [small] = random_frames(1, 64), random_frames(1, 32)
    wide = np.concatenate([large, large], axis=1)
    together = clip.patch_features([large, small, wide])
    for frame, features in zip([large, small, wide], together, strict=True):
        np.testing.assert_allclose(clip.patch_features([frame])[0], features, atol=1e-5)
    shrunk = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(together[0], clip.patch_features([shrunk])[0], atol=0.05)
    flat = [np.full((size, 2 * size, 3), 90, np.uint8) for size in (84, 32)]
    np.testing.assert_allclose(*clip.patch_features(flat), atol=1e-4)


@pytest.mark.parametrize("mode", ["clearclip", "maskclip"])
def test_a_finer_grid_sees_a_larger_image(folder, mode):
    clip = ClipGrounding(folder, mode=mode, grid=6)
    assert clip.grid == 6
    frames = random_frames(2, 48)
    visual = open_clip.create_model(f"local-dir:{folder}", force_image_size=48).eval().visual
    expected = loop_reference(visual, normalised(frames), mode)
    np.testing.assert_allclose(clip.patch_features(frames), expected, atol=2e-5)
    assert ClipGrounding(folder, mode=mode, grid=4).identity == ClipGrounding(folder, mode=mode).identity


def test_a_tower_that_sees_one_size_alone_refuses_another_grid(tmp_path):
    folder = save_clip(tmp_path, RESNET)
    assert ClipGrounding(folder, grid=2).grid == 2
    with pytest.raises(UserError, match="sees 2 x 2 patches and no other number.*3 per side.*ViT-B-16"):
        ClipGrounding(folder, grid=3)


def test_identity_tells_models_and_settings_apart(folder, tmp_path):
    other = save_clip(tmp_path / "other", {**VIT, "layers": 2})
    grounding = [
        ClipGrounding(folder),
        ClipGrounding(folder, mode="maskclip"),
        ClipGrounding(folder, templates=("{}",)),
        ClipGrounding(other),
    ]
    assert len({clip.identity for clip in grounding}) == 4
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert ClipGrounding(folder).identity == grounding[0].identity
    assert ClipGrounding(moved).identity == grounding[0].identity, "the place does not matter"


def test_copies_share_the_weights(folder):
    clip = ClipGrounding(folder)
    assert copy.deepcopy({"clip": clip})["clip"] is clip


def test_what_is_no_model_is_explained(tmp_path, folder):
    with pytest.raises(UserError, match="nearest are .*ViT-B-16"):
        ClipGrounding("ViT-B-61", "openai")
    with pytest.raises(UserError, match="one of .*laion2b_s34b_b88k"):
        ClipGrounding("ViT-B-16", "laion9b")
    with pytest.raises(UserError, match="unknown mode 'sharp'"):
        ClipGrounding(folder, mode="sharp")
    with pytest.raises(UserError, match="expected open_clip_config.json"):
        ClipGrounding(tmp_path)


def test_weights_that_cannot_be_downloaded_are_explained(monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("open_clip.factory.download_pretrained", fail)
    with pytest.raises(UserError, match=r"no route to host.*annotator 'embedded'"):
        ClipGrounding("ViT-B-16", "laion2b_s34b_b88k")


@pytest.mark.parametrize("damage", ["missing", "truncated", "other shapes"])
def test_damaged_weights_are_explained(folder, tmp_path, damage):
    copied = tmp_path / "copy"
    copied.mkdir()
    (copied / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    weights = copied / "open_clip_model.safetensors"
    if damage == "truncated":
        weights.write_bytes((folder / "open_clip_model.safetensors").read_bytes()[:5000])
    if damage == "other shapes":
        save_file({"visual.proj": torch.zeros(3, 3)}, weights)
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipGrounding(copied)


def test_weights_never_run_code(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    copied = tmp_path / "copy"
    copied.mkdir()
    (copied / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    (copied / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipGrounding(copied)
    assert not (tmp_path / "exploded").exists()
