import io
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epd_ray.actors.environments import EnvironmentFailure, install
from epd_ray.config.services import ClusterConfig
from epd_ray.errors import EpdRayError, MetricError, ModelError, PlacementError
from epd_ray.evaluation.metrics import inception
from epd_ray.evaluation.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from epd_ray.evaluation.metrics.inception import InceptionFeatures
from epd_ray.evaluation.metrics.pictures import picture_files
from epd_ray.evaluation.metrics.reference import read_statistics, reference_statistics, write_statistics
from epd_ray.evaluation.suites import feature_pool
from epd_ray.evaluation.suites.feature_pool import FeatureActor, FeaturePool, FeatureSpec
from tests.environments_fixture import real_home  # noqa: F401
from tests.fakes import Colours

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (9, 3, 12, 16), np.uint8)


# --- what is compared with --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PICTURES and one of another size, in a tree."""
    folder = tmp_path / "real"
    (folder / "more").mkdir(parents=True)
    for index, picture in enumerate([*PICTURES, PICTURES[0, :, :5, :5]]):
        name = f"more/{index}.png" if index > 4 else f"{index}.png"
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / name)
    return folder


def test_a_folder_is_looked_at_once(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epd_ray.evaluation.metrics.reference.BATCH", 4)
    colours = Colours()
    found = reference_statistics(folder, colours, tmp_path / "cache")
    assert sorted(colours.looked_at) == [1, 1, 4, 4]
    rows = [*PICTURES.mean(axis=(2, 3)), PICTURES[0, :, :5, :5].mean(axis=(1, 2))]
    expected = FeatureStatistics.of(np.array(rows, np.float32)).gaussian()
    assert found.count == 10
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9)
    again = reference_statistics(folder, colours, tmp_path / "cache")
    assert sum(colours.looked_at) == 10 and frechet_distance(again, found) == pytest.approx(0, abs=1e-9)
    Image.fromarray(PICTURES[0].transpose(1, 2, 0)).save(folder / "4.png")
    changed = reference_statistics(folder, colours, tmp_path / "cache")
    assert sum(colours.looked_at) == 20 and frechet_distance(changed, found) > 1e-3


def test_statistics_in_the_published_form(tmp_path: Path) -> None:
    """As other programs write them (no count), and as they read ours."""
    mean, covariance = RNG.normal(size=3), np.cov(RNG.normal(size=(3, 9)))
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance, arr_0=np.zeros((2, 2), np.uint8))
    theirs = reference_statistics(tmp_path / "theirs.npz", Colours(), tmp_path / "cache")
    assert theirs.count is None
    write_statistics(tmp_path / "ours.npz", Gaussian(theirs.mean, theirs.covariance, 9))
    with np.load(tmp_path / "ours.npz") as ours:
        np.testing.assert_array_equal(ours["mu"], mean)
        np.testing.assert_array_equal(ours["sigma"], covariance)
    assert read_statistics(tmp_path / "ours.npz").count == 9


class Trap:
    def __reduce__(self) -> tuple[type[Path], tuple[str, ...]]:
        raise AssertionError("was pickled")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: np.savez(p, mu=np.zeros(3)), r"has no sigma \(it has mu\): give an .npz with mu and sigma"),
        (lambda p: np.savez(p, mu=np.zeros(4), sigma=np.eye(3)), r"mu \[4\] and sigma \[3, 3\], expected"),
        (lambda p: np.savez(p, mu=np.zeros(3), sigma=np.full((3, 3), np.nan)), "a number that is not finite"),
        (lambda p: np.savez(p, mu=np.zeros(2), sigma=np.eye(2)), "is of 2 features, colours has 3: give statistics of"),
        (
            lambda p: np.savez(p, mu=np.array([{}]), sigma=np.eye(1)),
            "cannot be read as statistics .*allow_pickle",
        ),
        (lambda p: p.write_bytes(pickle.dumps([1])), "cannot be read as statistics"),
        (lambda p: p.write_bytes(b"PK\x03\x04rest"), "cannot be read as statistics"),
        (lambda p: p.write_bytes(b""), "cannot be read as statistics"),
        (lambda p: np.save(p.open("wb"), np.zeros(3)), "is one array: give an .npz"),
        (lambda p: None, "cannot be read as statistics .*No such file"),
    ],
)
def test_what_is_no_statistics_file_is_named(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "reference.npz"
    write(path)
    with pytest.raises(MetricError, match=message) as caught:
        reference_statistics(path, Colours(), tmp_path / "cache")
    assert "reference.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "3.png").write_bytes(b"no"),
            r"3.png cannot be read as a picture \(no known image format, expected one of PNG",
        ),
        (lambda f: (f / "3.png").write_bytes((f / "3.png").read_bytes()[:60]), "3.png cannot be read as a picture"),
        (lambda f: Image.new("I;16", (4, 4)).save(f / "3.png"), r"3.png .*mode I;16, expected 8 bits a channel"),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], "holds no pictures"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(
    tmp_path: Path, folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    with pytest.raises(MetricError, match=message):
        reference_statistics(folder, Colours(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_numbers_are_sorted_by_their_value(tmp_path: Path) -> None:
    names = ["9.png", "99.png", "101.png", "1000.png", "a2/1.png", "a10/1.png", "b.png"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in picture_files(tmp_path)] == names


def test_too_few_real_pictures_are_said_before_any_are_drawn(tmp_path: Path, folder: Path) -> None:
    for name in range(3, 10):
        next(folder.rglob(f"{name}.png")).unlink()
    for _ in "twice":  # the second time from the cache
        with pytest.raises(MetricError, match=rf"{folder}.*\b3 pictures.* 4 .*\b3 features"):
            reference_statistics(folder, Colours(), tmp_path / "cache")


# --- in actors --------------------------------------------------------------------------------------------------------


def test_a_pool_is_an_extractor(small_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_pool, "BATCH", 2)
    spec = FeatureSpec("tests.fakes:Colours", replicas=2, num_cpus=0.25)
    with FeaturePool(spec, ClusterConfig()) as pool:
        assert (pool.model_id, pool.revision, pool.dimension) == ("colours", "1", 3)
        np.testing.assert_array_equal(pool.features(PICTURES), Colours().features(PICTURES))
        assert pool.features(PICTURES[:0]).shape == (0, 3)
        with pytest.raises(MetricError, match="nothing but black"):
            pool.features(PICTURES * 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {"model": "./nowhere"}, "is no directory"),
        ("clipp", {}, "unknown feature extractor 'clipp'; did you mean 'clip'"),
        ("clip", {"modle": "x"}, "unexpected keyword argument 'modle'"),
        ("tests.fakes:Colours", {"fail": "boom"}, "Colours' cannot be built: RuntimeError: boom"),
    ],
)
def test_what_cannot_be_built_is_said(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(EpdRayError, match=message):
        FeatureActor(name, options).describe()


def test_an_actor_passes_its_words_on(small_ray: None) -> None:
    with pytest.raises(ModelError, match=r"Colours'.*RuntimeError: boom"):
        FeaturePool(FeatureSpec("tests.fakes:Colours", {"fail": "boom"}, num_cpus=0.25), ClusterConfig())


def test_an_actor_without_room_is_refused(small_ray: None) -> None:
    spec = FeatureSpec("tests.fakes:Colours", num_cpus=0, num_gpus=0.5)
    with pytest.raises(PlacementError, match=r"GPU: 0.5 asked, 0 free.*Colours': 1 x 0.5 GPU"):
        FeaturePool(spec, ClusterConfig(placement_timeout_s=0.5))


# --- Inception --------------------------------------------------------------------------------------------------------


def test_without_its_environment_inception_says_so(
    small_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPD_RAY_HOME", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match=r"'fid'.*rewards install fid"):
        FeaturePool(FeatureSpec("inception"), ClusterConfig())
    with pytest.raises(ModelError, match=r"torchvision.*rewards install fid"):
        InceptionFeatures()


class Package:
    """Stands in for torch-fidelity's module where it is not installed."""

    URL_INCEPTION_V3 = ""

    @staticmethod
    def FeatureExtractorInceptionV3(name: str, layers: list[str], *, feature_extractor_weights_path: str) -> Any:
        network = torch.nn.Linear(2, 2)
        network.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        return network


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_weights_are_tensors_alone_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inception.PACKAGES, "fid", Package)
    good = saved(tmp_path / "good.pth", torch.nn.Linear(2, 2).state_dict())
    assert InceptionFeatures(weights=str(good), device="cpu").revision
    with pytest.raises(ModelError, match=r"nowhere\.pth"):
        InceptionFeatures(weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(ModelError, match=r"other\.pth.*size mismatch") as caught:
        InceptionFeatures(weights=str(saved(tmp_path / "other.pth", torch.nn.Linear(3, 2).state_dict())))
    assert "\n" not in str(caught.value)
    for bad in (saved(tmp_path / "trap.pth", {"weight": io.StringIO}), tmp_path / "text.pth"):
        if not bad.exists():
            bad.write_text("not found")
        with pytest.raises(ModelError, match=f"{bad.name} cannot be loaded") as caught:
            InceptionFeatures(weights=str(bad))
        assert "\n" not in str(caught.value)


def test_weights_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inception.PACKAGES, "fid", Package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    served = saved(tmp_path / "weights-1.pth", torch.nn.Linear(2, 2).state_dict())
    monkeypatch.setattr(Package, "URL_INCEPTION_V3", served.as_uri())
    first = InceptionFeatures(device="cpu")
    served.unlink()
    assert InceptionFeatures(device="cpu").revision == first.revision
    (tmp_path / "hub/checkpoints/weights-1.pth").unlink()
    with pytest.raises(ModelError, match=r"weights-1\.pth"):
        InceptionFeatures(device="cpu")
    assert not list((tmp_path / "hub/checkpoints").iterdir())


# Random weights in torch-fidelity's own file format; its own functions compute the FID from them.
ALONE = """
import sys
from pathlib import Path
import numpy as np, torch
from epd_ray.rewards.package import PACKAGES
PACKAGES["fid"]()
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
folder = Path(sys.argv[1])
torch.manual_seed(0)
torch.nn.Module.load_state_dict, load = lambda *_: None, torch.nn.Module.load_state_dict
torch.save({}, folder / "empty.pth")
network = FeatureExtractorInceptionV3("new", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
torch.nn.Module.load_state_dict = load
for module in network.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.bias.uniform_(-0.5, 0.5)
        module.running_var.uniform_(0.02, 0.1)
torch.save(network.state_dict(), folder / "inception.pth")
sets = [torch.from_numpy(np.load(folder / f"{name}.npy")) for name in "ab"]
features = [network(images)[0].numpy() for images in sets]
np.savez(folder / "alone.npz", a=features[0], b=features[1])
class Pictures(torch.utils.data.Dataset):
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getitem__(self, index): return self.images[index]
found = torch_fidelity.calculate_metrics(
    input1=Pictures(sets[0]), input2=Pictures(sets[1]), fid=True, cuda=False, batch_size=50, cache=False, verbose=False,
    feature_extractor_weights_path=str(folder / "inception.pth"), save_cpu_ram=True)
print(found["frechet_inception_distance"])
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("real_home")
def test_inception_in_its_own_actor_says_what_it_says_alone(small_ray: None, tmp_path: Path) -> None:
    start = time.perf_counter()
    python = install("fid")
    building = time.perf_counter() - start
    a, b = RNG.integers(0, 256, (2, 24, 3, 32, 40), np.uint8)
    b = np.maximum(b, 128)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    alone = subprocess.run([python, "-W", "ignore", "-c", ALONE, tmp_path], capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    theirs = float(alone.stdout.split()[-1])

    spec = FeatureSpec("inception", {"weights": str(tmp_path / "inception.pth"), "device": "cpu"})
    start = time.perf_counter()
    with FeaturePool(spec, ClusterConfig()) as pool:
        sys.stdout.write(f"fid: built in {building:.0f} s, actor ready in {time.perf_counter() - start:.1f} s")
        assert (pool.model_id, pool.dimension) == ("inception-2015-12-05", 2048)
        found = {"a": pool.features(a), "b": pool.features(b)}
    with np.load(tmp_path / "alone.npz") as expected:
        for name, features in found.items():
            scale = expected[name].std()
            assert scale > 1e-3 and np.ptp(expected[name], axis=0).max() > 1e-3  # or any picture would do
            np.testing.assert_allclose(features, expected[name], atol=1e-4 * scale)
    # So few pictures make singular covariances, which the package does not mind; without the count, nor do we.
    ours = [FeatureStatistics.of(features).gaussian() for features in found.values()]
    distance = frechet_distance(*(Gaussian(g.mean, g.covariance) for g in ours))
    assert distance == pytest.approx(theirs, rel=1e-3)
    with pytest.raises(MetricError, match=r"\b24 pictures.*\b2049\b.*\b2048 "):
        frechet_distance(*ours)
