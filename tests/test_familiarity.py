"""Which frames the embedded models know: distances by the book, and files."""

import numpy as np
import pytest

from wrappers.backends.familiarity import FALSE_ALARMS, FILE, RIDGE, Familiarity, scene_features
from wrappers.errors import UserError


def kinds(seed: int = 0, count: int = 400, size: int = 6) -> list[np.ndarray]:
    """Three clouds with one covariance, of which one direction hardly varies."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(size, size)) @ np.diag([3.0, 2.0, 1.0, 1.0, 0.5, 1e-4])
    return [5.0 * kind + random.normal(size=(count, size)) @ mixing.T for kind in range(3)]


def test_distances_are_those_of_mahalanobis_to_the_nearest_kind():
    fitted = Familiarity.fit(kinds(), kinds(1)[0])
    points = np.random.default_rng(2).normal(scale=6, size=(50, 6))
    means = [cloud.mean(0) for cloud in kinds()]
    within = np.cov(np.concatenate([cloud - mean for cloud, mean in zip(kinds(), means, strict=True)]).T, bias=True)
    inverse = np.linalg.inv(within + RIDGE * np.trace(within) / 6 * np.eye(6))
    expected = [min(np.sqrt((p - mean) @ inverse @ (p - mean) / 6) for mean in means) for p in points]
    np.testing.assert_allclose(fitted.distances(points), expected, rtol=1e-3)


def test_a_few_known_frames_are_taken_for_unfamiliar_and_far_ones_are():
    held_out = np.concatenate(kinds(1))
    fitted = Familiarity.fit(kinds(), held_out)
    assert fitted.knows(held_out).mean() == pytest.approx(1 - FALSE_ALARMS, abs=1e-3)
    assert not fitted.knows(held_out + 100).any()
    assert fitted.distances(np.concatenate(kinds())).mean() == pytest.approx(0.9, abs=0.1)


def test_features_are_means_and_deviations_over_patches():
    tokens = np.random.default_rng(0).normal(size=(3, 10, 4)).astype(np.float16)
    features = scene_features(tokens)
    assert features.shape == (3, 8)
    assert features.dtype == np.float32
    for frame in range(3):
        for place in range(4):
            column = [float(token) for token in tokens[frame, :, place]]
            mean = sum(column) / 10
            deviation = (sum((value - mean) ** 2 for value in column) / 10) ** 0.5
            assert features[frame, [place, 4 + place]] == pytest.approx([mean, deviation], rel=1e-3, abs=1e-4)


def test_what_is_saved_is_loaded_and_without_a_file_there_is_none(tmp_path):
    assert Familiarity.load(tmp_path, 6) is None
    fitted = Familiarity.fit(kinds(), kinds(1)[0])
    fitted.save(tmp_path)
    loaded = Familiarity.load(tmp_path, 6)
    points = kinds(3)[1]
    np.testing.assert_array_equal(loaded.distances(points), fitted.distances(points))
    assert loaded.threshold == pytest.approx(fitted.threshold, rel=1e-6)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "sizes", "names", "nan", "nan mean"])
def test_a_damaged_file_is_one_line_with_what_to_type(tmp_path, damage):
    fitted = Familiarity.fit(kinds(), kinds(1)[0])
    if damage == "sizes":
        fitted.whitening = fitted.whitening[:, :4].copy()
    if damage == "nan":
        fitted.threshold = float("nan")
    if damage == "nan mean":
        fitted.means[1, 2] = np.nan
    fitted.save(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    content = {"cut": content[:-40], "empty": b"", "text": b"hello" * 50}.get(damage, content)
    (tmp_path / FILE).write_bytes(content.replace(b"means", b"beans") if damage == "names" else content)
    with pytest.raises(UserError, match=r"familiarity\.safetensors is damaged.*--keep all") as raised:
        Familiarity.load(tmp_path, 6)
    assert "\n" not in str(raised.value)


def test_a_file_of_another_model_is_refused(tmp_path):
    Familiarity.fit(kinds(), kinds(1)[0]).save(tmp_path)
    with pytest.raises(UserError, match="another model's"):
        Familiarity.load(tmp_path, 8)
