"""The embedded models from scratch: frames, losses, files that other libraries load, and numbers that are right."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import open_clip
import psutil
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from semore_bench.cli import run
from semore_bench.guidance import metrics
from semore_bench.guidance.dense import class_frequencies, class_losses, train_dense_head
from semore_bench.guidance.evaluation import annotate, class_ious, fit_familiarity, mean_class_iou, measure, true_shares
from semore_bench.guidance.frames import MASK_SIZE, UNKNOWN, Shard, collect, load_shard, make_shard, plan
from semore_bench.guidance.models import MEAN, STD, add_to_clip_config, answer_pieces, make_tokenizer
from semore_bench.guidance.training import (
    Corpus,
    Settings,
    contrastive_loss,
    dense_loss,
    normalise,
    patch_shares,
    plain_attention,
    schedule,
    train,
    used_tokens,
)
from tests.tiny_guidance import DENSE, TINY, toy_frames
from tests.waiting import IDLE_SECONDS, ended, wait_until
from wrappers.backends import familiarity
from wrappers.backends.annotation import SceneObject
from wrappers.backends.annotators import annotation_shape
from wrappers.backends.captioners import TransformersCaptioner, parse_answer
from wrappers.backends.clip import ClipGrounding, _dense_transformer
from wrappers.backends.dense import FILE, GRID, DenseHead
from wrappers.backends.embedded import UNFAMILIAR, EmbeddedAnnotator, learned_from
from wrappers.backends.scenes import BACKGROUND
from wrappers.backends.vision_language import VisionLanguageAnnotator
from wrappers.errors import UserError

torch.set_num_threads(1)


def test_loss_falls_and_held_out_frames_are_described(trained):
    folder, _, _, losses = trained
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    held_out = toy_frames("box", 40, 1)
    row = measure(folder, {"box": [held_out]})["box"]
    assert row.exact_match > 0.9
    assert row.attributes >= row.exact_match
    assert row.retrieval > 0.9
    assert row.relevance_iou > 0.8
    assert row.by_class == {"square": row.class_iou}
    assert row.class_iou > 0.8
    assert mean_class_iou({"box": row, "other": row._replace(class_iou=0.0)}, ["box"]) == row.class_iou
    assert row.unfamiliar < 0.1
    other = {"white": "orange", "orange": "white"}
    swapped = tuple(re.sub("white|orange", lambda colour: other[colour[0]], text) for text in held_out.captions)
    wrong = measure(folder, {"box": [replace(held_out, captions=swapped)]})["box"]
    assert wrong.exact_match < 0.1
    assert wrong.retrieval < 0.1
    assert wrong.attributes == pytest.approx(0.5, abs=0.05)


def test_saved_models_compute_what_was_trained(trained):
    folder, corpus, model, _ = trained
    clip = ClipGrounding(folder / "clip", device="cpu")
    frames = list(corpus.images[:4])
    images = torch.from_numpy(corpus.images[:4]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        features = model.see(normalise(images))
    patches = _dense_transformer(clip._model.visual, clip._images(frames), "clearclip")
    np.testing.assert_allclose(unit(patches), features.patches, atol=2e-2)  # saved in half precision
    np.testing.assert_allclose(clip.image_embeddings(frames), features.images, atol=2e-2)

    captioner = AutoModelForImageTextToText.from_pretrained(folder / "captioner", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "captioner")
    answers = torch.from_numpy(corpus.answers[:4])
    prompt = torch.full((4, 64), processor.image_token_id)
    with torch.no_grad():
        expected = model.answer_logits(features.tokens, answers)
        found = captioner(input_ids=torch.cat([prompt, answers[:, :-1]], 1), pixel_values=normalise(images)).logits[
            :, 63:
        ]
    torch.testing.assert_close(found, expected, atol=5e-2, rtol=5e-2)
    pixels = processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalise(images), atol=1e-4, rtol=1e-4)


def unit(vectors):
    return F.normalize(vectors, dim=-1)


def test_the_dense_head_computes_what_was_trained_wherever_the_folder_is_loaded(trained, tmp_path):
    folder, corpus, *_ = trained
    clip = ClipGrounding(folder / "clip", device="cpu")
    assert clip.grid == GRID == annotation_shape("openai:x#y", str(folder / "clip"))[1]
    frames = list(corpus.images[:4])
    again, _ = train_dense_head(corpus, clip, DENSE, folder / "dense.pt", width=8)
    features = clip.patch_features(frames)
    with torch.no_grad():
        expected = unit(again(normalise(torch.from_numpy(corpus.images[:4]).permute(0, 3, 1, 2) / 255)))
    np.testing.assert_allclose(features, expected, atol=2e-2)  # folded, and saved in half precision
    np.testing.assert_array_equal(clip.look(frames).patches, features)
    with pytest.raises(UserError, match="sees 16 x 16 patches and no other number"):
        ClipGrounding(folder / "clip", device="cpu", grid=8)
    with pytest.raises(UserError, match="16 x 16 patches apart and no other number, got --annotation-grid 8"):
        annotation_shape("openai:x#y", str(folder / "clip"), 8)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other sizes"])
def test_a_damaged_dense_head_is_explained(trained, tmp_path, damage):
    copied = shutil.copytree(trained[0] / "clip", tmp_path / "clip")
    if damage == "missing":
        (copied / FILE).unlink()
    elif damage == "truncated":
        (copied / FILE).write_bytes((copied / FILE).read_bytes()[:5000])
    else:
        add_to_clip_config(copied, dense_head={"grid": 16, "width": 12})
    with pytest.raises(UserError, match="dense head .* cannot be loaded"):
        ClipGrounding(copied, device="cpu")


def test_batch_norms_are_folded_into_convolutions(tmp_path):
    torch.manual_seed(0)
    head = DenseHead(16, 8)
    images = torch.randn(8, 3, 64, 64)
    for _ in range(3):
        head(images)  # moves the running means
    head.save(tmp_path)
    loaded = DenseHead.load(tmp_path, 16, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), head.eval()(images), atol=2e-2, rtol=2e-2)
    assert not any("running" in name for name in loaded.state_dict())


def test_the_embedded_annotator_says_what_its_models_say_one_by_one(trained):
    """It runs the shared tower once and writes by itself; the libraries' own ways are the reference."""
    folder, corpus, *_ = trained
    clip = ClipGrounding(folder / "clip", device="cpu")
    reference = VisionLanguageAnnotator(TransformersCaptioner(folder / "captioner", device="cpu"), clip)
    frames = list(corpus.images[:12])
    annotator = EmbeddedAnnotator(device="cpu", folder=folder)
    annotator.dtype = torch.float32
    assert (annotator.embedding_dim, annotator.grid) == (reference.embedding_dim, reference.grid)
    found, expected = annotator.annotate(frames, range(12)), reference.annotate(frames, range(12))
    assert len({annotation.caption for annotation in expected}) == 2
    for one, other in zip(found, expected, strict=True):
        assert (one.caption, one.objects, one.class_names) == (other.caption, other.objects, other.class_names)
        assert (one.frame_step, one.source) == (other.frame_step, "embedded")
        np.testing.assert_allclose(one.caption_embedding, other.caption_embedding, atol=1e-5)
        np.testing.assert_allclose(one.patch_probabilities, other.patch_probabilities, atol=1e-4)
    captions = [annotation.caption for annotation in expected]
    alone = annotator.annotate(frames[3:4], [7])[0]
    assert alone.caption == captions[3], "whatever else is in the batch"

    rough = EmbeddedAnnotator(device="cpu", folder=folder)
    rough.dtype = torch.bfloat16
    for one, other in zip(rough.annotate(frames, range(12)), expected, strict=True):
        assert (one.caption, one.objects) == (other.caption, other.objects)
        np.testing.assert_allclose(one.patch_probabilities, other.patch_probabilities, atol=0.05)
        assert np.linalg.norm(one.caption_embedding) == pytest.approx(1, abs=1e-5)


def test_a_clip_that_is_made_anew_takes_over_nothing_that_was_fitted_to_another(trained, tmp_path):
    folder, corpus, model, _ = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    fit_familiarity(tmp_path, [toy_frames("box", 40, 0)], [toy_frames("box", 40, 1)])
    assert {FILE, familiarity.FILE} <= {path.name for path in (tmp_path / "clip").iterdir()}
    model.save(tmp_path, used_tokens(corpus, model))
    assert not {FILE, familiarity.FILE} & {path.name for path in (tmp_path / "clip").iterdir()}


def test_open_clip_loads_the_folder_with_its_own_preprocessing(trained):
    folder, corpus, model, _ = trained
    clip = open_clip.create_model(f"local-dir:{folder / 'clip'}")
    assert tuple(open_clip.get_model_preprocess_cfg(clip)["mean"]) == MEAN
    assert tuple(open_clip.get_model_preprocess_cfg(clip)["std"]) == STD
    kept = clip.token_embedding.weight.abs().sum(1) > 0
    assert set(kept.nonzero().flatten().tolist()) <= set(used_tokens(corpus, model).tolist())
    add_to_clip_config(folder / "clip", more=-1.0)
    assert json.loads((folder / "clip" / "open_clip_config.json").read_text())["more"] == -1.0
    open_clip.create_model(f"local-dir:{folder / 'clip'}")


def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr("semore_bench.guidance.training.CHECKPOINT_EVERY", 2)
    corpus = Corpus([toy_frames("box", 16, 0), toy_frames("crate", 16, 1)])
    settings = Settings(updates=4, batch_size=8)
    whole, losses = train(corpus, settings, tmp_path / "whole.pt", TINY)

    calls = []

    def killed(progress):
        calls.append(progress)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return schedule(progress)

    with monkeypatch.context() as patch:
        patch.setattr("semore_bench.guidance.training.schedule", killed)
        with pytest.raises(KeyboardInterrupt):
            train(corpus, settings, tmp_path / "parts.pt", TINY)
    resumed, again = train(corpus, settings, tmp_path / "parts.pt", TINY)
    assert again == losses
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=0, rtol=0)
    other, _ = train(corpus, replace(settings, seed=1), tmp_path / "parts.pt", TINY)
    assert not torch.equal(other.head.weight, whole.head.weight), "a checkpoint of other settings is not continued"


def test_corpora_of_other_scenes_are_told_apart():
    """A checkpoint that has seen a domain must not be continued where that is left out."""
    both = [toy_frames(name, 4, 0) for name in ("box", "ball")]
    identities = {Corpus(parts).identity for parts in ([both[0]], [both[1]], both, both[::-1])}
    assert len(identities) == 4
    assert Corpus(both).identity in identities


def test_shards_are_seeded_complete_and_not_made_twice(tmp_path):
    shard = Shard("cartpole", "dm_control/cartpole-swingup-v0", "varied", 0, 6, seed=3)
    [frames] = collect([shard], tmp_path, workers=1)
    file = tmp_path / f"{shard.name}.npz"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert frames.images.shape == (6, 64, 64, 3)
    assert frames.class_names == ("pole", "cart", *BACKGROUND)
    assert {thing.name for thing in frames.objects} == {"pole", "cart"}
    before = file.stat().st_mtime_ns
    collect([shard], tmp_path, workers=1)
    assert file.stat().st_mtime_ns == before
    file.unlink()
    make_shard(shard, tmp_path)
    again = load_shard(shard, tmp_path)
    np.testing.assert_array_equal(again.images, frames.images)
    assert again.captions == frames.captions
    make_shard(replace(shard, split="plain"), tmp_path)
    plain = load_shard(replace(shard, split="plain"), tmp_path)
    assert (plain.classes == 0).any(), "the pole is seen"
    assert abs(plain.images.astype(int) - frames.images).mean() > 1


@pytest.mark.parametrize("whole_group", [False, True])  # the latter is what a terminal does
def test_ctrl_c_while_rendering_ends_all_at_once_and_the_same_command_goes_on(tmp_path, whole_group):
    cache = tmp_path / "cache"
    numbers = "--frames 30 --updates 2 --batch-size 8 --dense-updates 2 --domains pendulum cartpole".split()
    places = ["--output", str(tmp_path / "models"), "--cache", str(cache)]
    command = [sys.executable, "-m", "semore_bench", "train-guidance", *numbers, "--leave-out", "cartpole", *places]

    def rendered() -> int:
        return sum(1 for _ in cache.rglob("*.npz"))

    before = 0
    for _ in range(2):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stderr=log, start_new_session=True)
        wait_until(lambda: rendered() > before, process)  # noqa: B023
        before = rendered()
        rendering = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        assert ended(process) == 130
        assert rendered() < 40, "of some fifty: what waited was not begun"
        _, alive = psutil.wait_procs(rendering, timeout=IDLE_SECONDS)  # Python's resource tracker ends a moment later
        assert not alive
        assert "Traceback" not in (tmp_path / "log").read_text()
        before = rendered()


def test_a_scene_that_cannot_be_rendered_ends_the_others_at_once(tmp_path):
    shards = plan(["cartpole"], "plain", 5000, 0)
    with pytest.raises(UserError, match="cartpole-swingup"):
        collect([replace(shards[0], env_id="dm_control/cartpole-swing-v0"), *shards], tmp_path, workers=2)
    assert not multiprocessing.active_children()
    assert sum(1 for _ in tmp_path.glob("*.npz")) < len(shards)


def test_what_has_no_simulator_is_all_background(tmp_path):
    shard = Shard("unfamiliar", "CartPole-v1", "train", 0, 25, seed=0)
    make_shard(shard, tmp_path)
    frames = load_shard(shard, tmp_path)
    assert {frames.class_names[number] for number in np.unique(frames.classes)} == {"background"}
    assert (set(frames.captions), frames.objects) == ({UNFAMILIAR}, ())
    corners = frames.images[:, 0, 0]
    assert len(np.unique(corners, axis=0)) == 3, "a look for every ten frames"
    assert len({frame.tobytes() for frame in frames.images}) > 20


def test_distracted_frames_have_masks_of_what_they_show(tmp_path):
    """Behind the things there is something else, and the things are where the masks say."""
    shards = [
        Shard("cartpole", "dm_control/cartpole-swingup-v0", split, 0, 20, 0) for split in ("plain", "background-hard")
    ]
    for shard in shards:
        make_shard(shard, tmp_path)
    plain, distracted = (load_shard(shard, tmp_path) for shard in shards)
    assert plain.class_names == distracted.class_names
    cart, pole = (plain.class_names.index(name) for name in ("cart", "pole"))
    colours = []
    for frames in (plain, distracted):
        classes = frames.classes[:, 1::2, 1::2]
        colours.append([frames.images[classes == number].mean(0) for number in (cart, pole)])
        colours[-1].append(frames.images[~np.isin(classes, (cart, pole))].std(0))
    assert np.abs(np.subtract(colours[0][:2], colours[1][:2])).max() < 25, "things look as ever"
    assert np.abs(colours[0][2] - colours[1][2]).max() > 10, "all else does not"


def test_unfamiliar_scenes_have_no_objects(tmp_path):
    shard = Shard("unfamiliar", "dm_control/fish-swim-v0", "plain", 0, 2, seed=0)
    make_shard(shard, tmp_path)
    frames = load_shard(shard, tmp_path)
    assert frames.classes.shape == (2, MASK_SIZE, MASK_SIZE)
    assert set(frames.captions) == {UNFAMILIAR}
    assert frames.objects == ()
    assert frames.class_names == BACKGROUND
    assert set(np.unique(frames.classes)) <= set(range(len(BACKGROUND)))


def test_plan_holds_the_asked_for_frames():
    shards = plan(["cartpole", "metaworld", "unfamiliar"], "train", 1200, 0)
    frames = {}
    for shard in shards:
        frames[shard.domain] = frames.get(shard.domain, 0) + shard.frames
    assert frames == {"cartpole": 1200, "metaworld": 1200, "unfamiliar": 600}
    assert len({shard.name for shard in shards}) == len(shards)


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "added"])
def test_plain_attention_equals_pytorchs_own(mask):
    random = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=random, dtype=torch.float64, requires_grad=True)
    some = torch.rand(2, 1, 9, 9, generator=random) < 0.7
    some |= torch.eye(9, dtype=torch.bool)
    added = torch.where(some, torch.randn(some.shape, generator=random), -torch.inf).double()
    options = {"none": {}, "causal": {"is_causal": True}, "boolean": {"attn_mask": some}, "added": {"attn_mask": added}}

    def attended() -> tuple[torch.Tensor, ...]:
        result = F.scaled_dot_product_attention(query, key, value, scale=0.3, **options[mask])
        return result, *torch.autograd.grad(result.square().sum(), (query, key, value))

    own = attended()
    with plain_attention():
        plain = attended()
    for one, other in zip(plain, own, strict=True):
        torch.testing.assert_close(one, other)
    assert plain[0].grad_fn.name() != own[0].grad_fn.name()  # it was not PyTorch's own


def test_contrastive_loss_equals_loops():
    random = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 8, generator=random), dim=1) for n in (5, 4))
    labels = torch.tensor([0, 2, 0, 2, 1])  # text 3 belongs to none
    similar = (7 * images @ texts.T).double().numpy()
    rows = [-np.log(np.exp(similar[i])[labels[i]] / np.exp(similar[i]).sum()) for i in range(5)]
    columns = []
    for text in range(3):
        shares = np.exp(similar[:, text]) / np.exp(similar[:, text]).sum()
        columns.append(np.mean([-np.log(shares[i]) for i in range(5) if labels[i] == text]))
    expected = (np.mean(rows) + np.mean(columns)) / 2
    assert contrastive_loss(images, texts, labels, 7.0).item() == pytest.approx(expected, rel=1e-5)


def test_class_losses_are_small_for_right_patches_alone():
    texts, groups = torch.eye(4), torch.zeros(2, dtype=torch.long)
    ids = torch.tensor([[2, 1, -1]] * 2)
    shares = F.one_hot(torch.tensor([[[0] * 4 + [1] * 12] * 16] * 2), 3).float()
    frequency = torch.tensor([[0.25, 0.75, 0.0]] * 2)
    right = texts[torch.tensor([[[2] * 4 + [1] * 12] * 16] * 2)]
    small, large = (
        class_losses(features, texts, ids, shares, frequency, groups) for features in (right, right.flip(2))
    )
    assert all(value < 1e-6 for value in small.values())
    assert large["cross entropy"] > 10
    # 4 columns of each kind are wrong: of 4 none is found, of 12 columns 8.
    assert large["1 - IoU"].item() == pytest.approx(1 - (0 + 8 / 16) / 2, abs=1e-5)


def test_class_frequencies_are_means_of_shares():
    frames = toy_frames("box", 5, 0)
    [frequency] = class_frequencies(Corpus([frames]))
    np.testing.assert_allclose(frequency, true_shares(frames, 16).mean((0, 2, 3)), atol=1e-6)


def test_dense_loss_is_small_for_right_patches_alone():
    texts = torch.eye(4)
    shares = F.one_hot(torch.tensor([[[0] * 4 + [1] * 4] * 8]), 3).float()
    names = torch.tensor([[2, 1, -1]])
    right = texts[torch.tensor([[[2] * 4 + [1] * 4] * 8])]
    wrong = texts[torch.tensor([[[1] * 4 + [2] * 4] * 8])]
    assert dense_loss(right, texts, names, shares) < 1e-6
    assert dense_loss(wrong, texts, names, shares) > 10


def test_metrics_against_numbers_by_hand():
    true = ["the cart is left; the pole points up", "the cart is right; the pole points down"]
    said = ["the cart is left; the pole points up", "the cart is right; the pole points up and to the right"]
    assert metrics.exact_match(said, true) == 0.5
    assert metrics.attribute_accuracy(said, true) == 0.75
    assert metrics.attribute_accuracy(["", ""], true) == 0
    maps = np.random.default_rng(0).random((3, 8, 8))
    assert metrics.map_iou(maps, maps) == 1
    assert metrics.map_iou(maps, np.zeros_like(maps)) == 0
    assert metrics.map_iou(np.zeros((1, 8, 8)), np.zeros((1, 8, 8))) == 1
    masks = np.random.default_rng(1).random((2, 4, 8, 8)) > 0.5
    expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert metrics.map_iou(*masks.astype(float)) == pytest.approx(expected)


@pytest.mark.parametrize("grid", [8, 16])
def test_true_shares_are_what_a_patch_shows_of_each_class(grid):
    frames, side = toy_frames("box", 3, 0), MASK_SIZE // grid
    shares = true_shares(frames, grid)
    assert shares.shape == (3, 5, grid, grid)
    for image, row, column in np.ndindex(3, grid, grid):
        patch = frames.classes[image, row * side : (row + 1) * side, column * side : (column + 1) * side]
        for number in range(5):
            assert shares[image, number, row, column] == pytest.approx((patch == number).mean())
    corpus = Corpus([frames])
    found = patch_shares(corpus, np.array([2, 0]), grid).permute(0, 3, 1, 2)
    np.testing.assert_allclose(found, shares[[2, 0]], atol=1e-6)


def test_iou_of_things_is_over_all_frames_and_0_where_they_are_not_named():
    frames = toy_frames("box", 4, 0)
    shares = true_shares(frames, 16)[:, 0]
    right = [{"square": share} for share in shares]
    assert class_ious(right, [frames], 16) == {"square": 1.0}
    forgotten = [right[0], {}, right[2], {"box": shares[3]}]
    expected = shares[[0, 2]].sum() / shares.sum()
    assert class_ious(forgotten, [frames], 16)["square"] == pytest.approx(expected)
    assert class_ious([*right, *forgotten], [frames, frames], 16)["square"] == pytest.approx((1 + expected) / 2)


def test_answers_survive_the_tokenizer_and_the_parser():
    objects = [SceneObject("near leg", 0.8), SceneObject("ball", 1.0)]
    caption = "the hopper's foot is below and left of it, up (a.b); it points up and to the right and is far"
    pieces = answer_pieces(caption, objects)
    tokenizer = make_tokenizer([*pieces, *answer_pieces("the hopper's foot is below; it is far", [])])
    numbers = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    assert len(numbers) == len(pieces)
    assert tokenizer.decode(numbers, skip_special_tokens=True) == "".join(pieces)
    description = parse_answer(tokenizer.decode(numbers))
    assert description.caption == caption
    assert description.objects == tuple(objects)


def test_unusable_answers_count_as_wrong(trained):
    annotator = EmbeddedAnnotator(folder=trained[0])
    annotator._writer = lambda tokens: [""] * len(tokens)
    answers = annotate(annotator, toy_frames("box", 2, 0).images)
    assert answers.captions == ["", ""]
    assert not answers.relevance.any()


def test_the_command_makes_models_and_cards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wrappers.backends.writer.MAX_PIECES", 6)  # two updates do not teach it to come to an end
    monkeypatch.setitem(UNKNOWN, "unfamiliar", ("dm_control/fish-swim-v0",))
    monkeypatch.setitem(UNKNOWN, "never shown", ("CartPole-v1",))
    monkeypatch.setattr("semore_bench.guidance.command.DISTRACTED", ("background-hard", "camera-easy"))
    models = tmp_path / "models"
    numbers = "--frames 10 --updates 2 --batch-size 8 --dense-updates 2 --workers 1".split()
    names = "--domains pendulum cartpole --leave-out cartpole".split()
    places = ["--output", str(models), "--cache", str(tmp_path / "cache")]
    assert not run(["train-guidance", *numbers, *names, *places])
    said = capsys.readouterr().out
    assert re.search(r"cartpole \(left out\) +│", said)
    assert re.search(r"IoU per named thing, on average over the known domains, varied: 0\.\d+", said)
    assert learned_from(f"embedded:{models}") == {"domains": ["pendulum"], "left_out": "cartpole"}
    for name in ("clip", "captioner"):
        card = (models / name / "README.md").read_text()
        assert "--frames 10 --updates 2 --batch-size 8 --dense-updates 2 --seed 0 --leave-out cartpole" in card
        assert len(re.findall(r"^\| (pendulum|cartpole) \| (pole|cart) \| [01]\.\d\d \|", card, re.MULTILINE)) == 4
        assert re.search(r"^\| domain \| thing \| background-hard \| camera-easy \|$", card, re.MULTILINE)
        assert re.search(r"^\| pendulum \| pole \| [01]\.\d\d \| [01]\.\d\d \|$", card, re.MULTILINE)
        assert len(re.findall(r"^\| (other scenes|scenes never shown) \|[ |]+[01]\.\d\d \|", card, re.MULTILINE)) == 4
        assert len(re.findall(r"^\| pendulum \| [01]\.\d\d \|", card, re.MULTILINE)) == 2
        assert len(re.findall(r"^\| cartpole \(left out\) \| [01]\.\d\d \|", card, re.MULTILINE)) == 2
    assert sum(file.stat().st_size for file in models.rglob("*")) < 20e6
    annotator = EmbeddedAnnotator(folder=models)
    annotator.annotate([np.zeros((64, 64, 3), np.uint8)], [0])
    assert annotator.grid == GRID

    kept = (models / "captioner" / "model.safetensors").read_bytes()
    again = ["--frames", "10", "--updates", "9", "--batch-size", "8", "--dense-updates", "3", "--keep", "clip"]
    assert not run(["train-guidance", *again, *names, *places])
    assert (models / "captioner" / "model.safetensors").read_bytes() == kept
    card = (models / "clip" / "README.md").read_text()
    assert "2 updates of CLIP and captioner" in card
    assert "in 3 updates" in card
    assert "--keep clip" in card
    before = {path.name: path.read_bytes() for path in models.rglob("*.safetensors")}
    assert not run(["train-guidance", "--frames", "10", "--keep", "all", *names, *places])
    assert {path.name: path.read_bytes() for path in models.rglob("*.safetensors")} == before
    assert "in 3 updates" in (models / "clip" / "README.md").read_text()
    capsys.readouterr()
    assert run(["train-guidance", *again, "--domains", "pendulum", "cartpole", "--leave-out", "pendulum", *places]) == 2
    assert "learned from pendulum and not from cartpole: type the same" in capsys.readouterr().err


def test_mistakes_are_explained(tmp_path, capsys):
    assert run(["train-guidance", "--leave-out", "moon", "--cache", str(tmp_path)]) == 2
    assert "unknown domain 'moon'; expected one of cartpole" in capsys.readouterr().err
    assert run(["train-guidance", "--domains", "walkr", "--cache", str(tmp_path)]) == 2
    assert "unknown domain 'walkr'; did you mean 'walker'?" in capsys.readouterr().err
    assert run(["train-guidance", "--frames", "0", "--cache", str(tmp_path)]) == 2
    assert "--frames must be at least 1" in capsys.readouterr().err
    keep = ["train-guidance", "--output", str(tmp_path), "--cache", str(tmp_path), "--keep"]
    assert run([*keep, "clip"]) == 2
    assert "leave --keep clip out" in capsys.readouterr().err
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    assert run([*keep, "all"]) == 2
    assert "type --keep clip, and it is trained" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        collect([], tmp_path / "file" / "frames")
