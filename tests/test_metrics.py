import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import linalg

from epd_ray.errors import MetricError, ModelError
from epd_ray.evaluation.metrics import EXTRACTORS
from epd_ray.evaluation.metrics.clip import ClipFeatures
from epd_ray.evaluation.metrics.diversity import diversity
from epd_ray.evaluation.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from epd_ray.evaluation.metrics.sharpness import sharpness
from epd_ray.evaluation.metrics.weights import weights_checksum
from epd_ray.rewards.clip import ClipHead

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 3, 20, 24), np.uint8)

# --- sharpness --------------------------------------------------------------------------------------------------------


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    """By OpenCV's definition: its kernel, and a border that repeats neither the edge nor anything beyond."""
    expected = []
    for picture in PICTURES.astype(np.float64):
        grey = 0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2]
        p = np.pad(grey, 1, mode="reflect")
        laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * grey
        expected.append(laplacian.var())
    found = sharpness(PICTURES)
    assert found.dtype == np.float32 and found.shape == (5,)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sharpness_by_hand_and_in_order() -> None:
    plain = np.full((1, 3, 8, 8), 77, np.uint8)
    board = np.broadcast_to(255 * (np.indices((8, 8)).sum(axis=0) % 2), (1, 3, 8, 8)).astype(np.uint8)
    assert sharpness(plain)[0] == pytest.approx(0, abs=1e-9)
    assert sharpness(board)[0] == pytest.approx((4 * 255) ** 2)  # -1020 on white, 1020 on black
    picture = Image.fromarray(PICTURES[0].transpose(1, 2, 0))
    softer = [picture.filter(ImageFilter.GaussianBlur(r)) for r in (0, 0.5, 1, 2)]
    values = sharpness(np.stack([np.asarray(p).transpose(2, 0, 1) for p in softer]))
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize("images", [PICTURES[0], PICTURES / 255, PICTURES.transpose(0, 2, 3, 1)])
def test_other_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(MetricError, match=r"images.*uint8 \[B, 3, H, W\]"):
        sharpness(images)


# --- diversity --------------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_over_pairs_of_a_prompt() -> None:
    features = RNG.normal(size=(9, 6))
    prompts = ["a", "b", "a", "c", "b", "a", "c", "a", "c"]
    found = diversity(features, prompts)
    assert list(found) == ["a", "b", "c"]
    for prompt, value in found.items():
        rows = torch.tensor(features[[p == prompt for p in prompts]])
        pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
        cosines = [torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i, j in pairs]
        assert value == pytest.approx(1 - np.mean(cosines))
    order = RNG.permutation(9)
    assert diversity(features[order], [prompts[i] for i in order]) == pytest.approx(found)
    assert diversity(features * RNG.uniform(1, 9, (9, 1)), prompts) == pytest.approx(found)


def test_diversity_by_hand() -> None:
    features = np.array([[1, 0], [2, 0], [1, 0], [0, 3], [1, 0], [-1, 0]], np.float32)
    assert diversity(features, list("aabbcc")) == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("features", "prompts", "message"),
    [
        (
            np.ones((4, 2)),
            ["a", "b", "a", "c"],
            r"prompt 'b' has 1 picture, .* 2 .*\(2 prompts have 1: ",
        ),
        (np.ones((3, 2)), ["a", "a"], "3 rows of features and 2 prompts"),
        (np.array([[1.0, 0], [0, 0]]), ["a", "a"], r"features\[1\] are all 0"),
        (np.array([[1.0, 0], [0, np.nan]]), ["a", "a"], r"features\[1, 1\] is nan"),
        (np.ones(3), ["a", "a", "a"], r"features have shape \[3\]"),
    ],
)
def test_what_diversity_cannot_use_is_named(features: np.ndarray, prompts: list[str], message: str) -> None:
    with pytest.raises(MetricError, match=message) as caught:
        diversity(features, prompts)
    assert "\n" not in str(caught.value)


# --- Frechet distance -------------------------------------------------------------------------------------------------


def samples(count: int, size: int, seed: int) -> np.ndarray:
    """Correlated features with an offset that would cost a float32 sum its digits."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + 100 * rng.normal(size=size)


def of(features: np.ndarray) -> Gaussian:
    return FeatureStatistics.of(features).gaussian()


def published(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """As pytorch-fid and clean-fid compute it."""
    diff = mu1 - mu2
    covmean = linalg.sqrtm(sigma1.dot(sigma2))
    if np.iscomplexobj(covmean):
        assert np.allclose(np.diagonal(covmean).imag, 0, atol=1e-3)
        covmean = covmean.real
    return float(diff.dot(diff) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(covmean))


def torch_fidelity(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    diff = mu1 - mu2
    tr_covmean = np.sum(np.sqrt(np.linalg.eigvals(sigma1.dot(sigma2)).astype("complex128")).real)
    return float(diff.dot(diff) + np.trace(sigma1) + np.trace(sigma2) - 2 * tr_covmean)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
@pytest.mark.parametrize("formula", [published, torch_fidelity])
def test_distance_is_the_published_one(size: int, formula: type[published]) -> None:
    a, b = samples(3 * size + 2, size, 1), samples(2 * size + 2, size, 2)
    expected = formula(
        a.mean(axis=0), np.atleast_2d(np.cov(a, rowvar=False)), b.mean(axis=0), np.atleast_2d(np.cov(b, rowvar=False))
    )
    assert frechet_distance(of(a), of(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(of(b), of(a)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_gaussians_in_closed_form() -> None:
    """Where the covariances commute, it is the sum of (std_a - std_b)^2 along their common axes."""
    axes = linalg.qr(RNG.normal(size=(8, 8)))[0]
    stds = RNG.uniform(0, 3, (2, 8))
    stds[0, :3] = 0  # a flat cloud is a Gaussian too
    means = RNG.normal(size=(2, 8))
    a, b = (Gaussian(m, (axes * s**2) @ axes.T) for m, s in zip(means, stds, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(stds[0] - stds[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), unique=True, max_size=6), seed=st.integers(0, 99))
def test_shards_and_order_change_nothing(cuts: list[int], seed: int) -> None:
    features = samples(40, 5, 3)
    whole, other = of(features), of(samples(30, 5, 4))
    shuffled = features[np.random.default_rng(seed).permutation(40)]
    merged = FeatureStatistics.merged(FeatureStatistics.of(part) for part in np.split(shuffled, sorted(cuts)))
    assert merged.count == 40
    np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.gaussian().covariance, np.cov(features, rowvar=False), rtol=1e-10)
    assert frechet_distance(merged.gaussian(), other) == pytest.approx(frechet_distance(whole, other), rel=1e-9)


def test_float32_features_lose_no_digits() -> None:
    features = (RNG.normal(size=(500, 4)) + 3000).astype(np.float32)
    found = FeatureStatistics.merged(FeatureStatistics.of(part) for part in np.split(features, 10)).gaussian()
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


def test_too_few_pictures_are_named() -> None:
    enough, few = of(samples(9, 8, 1)), of(samples(8, 8, 2))
    frechet_distance(enough, enough)
    message = r"Frechet distance: 8 pictures, expected at least 9 for 8 features \(draw more, or "
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(MetricError, match=message):
            frechet_distance(*pair)
    frechet_distance(enough, Gaussian(few.mean, few.covariance))  # a published file that does not say how many


def test_features_of_different_extractors_do_not_mix() -> None:
    a, b = FeatureStatistics.of(samples(9, 4, 1)), FeatureStatistics.of(samples(9, 5, 1))
    with pytest.raises(MetricError, match="between 4 and 5 features"):
        frechet_distance(a.gaussian(), b.gaussian())
    with pytest.raises(MetricError, match="4 and 5 features do not merge"):
        a.merge(b)
    with pytest.raises(MetricError, match=r"features\[2, 1\] is inf"):
        FeatureStatistics.of(np.array([[0, 0], [0, 0], [0, np.inf]]))


# --- CLIP's image embeddings ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> ClipFeatures:
    return ClipFeatures(device="cpu", batch_size=2)


def test_embeddings_are_those_that_the_head_compares(clip: ClipFeatures) -> None:
    """The cosine with the head's own text embedding is the head's score."""
    prompts = ["a small red circle in the center"] * len(PICTURES)
    head = ClipHead(model="shapes-clip", device="cpu")
    expected = head.score(torch.from_numpy(PICTURES).float() / 255, prompts)
    with torch.inference_mode():
        text = head._towers.network.get_text_features(**head._towers.tokens(prompts)).pooler_output
    found = clip.features(PICTURES)
    assert found.shape == (5, clip.dimension) and found.dtype == np.float32 and clip.dimension == 128
    assert torch.allclose(torch.cosine_similarity(torch.from_numpy(found), text), expected, atol=1e-6)
    assert np.ptp(found, axis=0).max() > 0.01
    assert clip.features(PICTURES[:0]).shape == (0, 128)


def test_revision_is_of_the_weights(clip: ClipFeatures) -> None:
    network = torch.nn.Linear(2, 2)
    before = weights_checksum(network)
    assert weights_checksum(network) == before and len(clip.revision) == len(before) == 16
    with torch.no_grad():
        network.bias[0] += 1e-6
    assert weights_checksum(network) != before


def test_extractors_by_name(clip: ClipFeatures) -> None:
    assert EXTRACTORS.names() == ["clip", "inception"]
    assert EXTRACTORS.get("clip") is ClipFeatures
    with pytest.raises(MetricError, match="images are float64"):
        clip.features(PICTURES / 255)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is no directory"):
        EXTRACTORS.build("clip", {"model": "./nowhere"})
