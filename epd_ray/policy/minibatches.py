"""How an iteration's images are divided among gradient steps: pure functions of numbers."""

import numpy as np
import numpy.typing as npt

from epd_ray.randomness import Purpose, stream


def minibatch_problem(minibatch: int, images: int) -> str | None:
    """What is wrong with a minibatch size, if anything: RLlib fills up an incomplete minibatch with repeated images.

    Args:
        minibatch: images per gradient step; one at least as large as the iteration takes all images in one step.
        images: of an iteration, prompts times group size.
    """
    if minibatch >= images or images % minibatch == 0:
        return None
    divisors = [d for d in range(1, images + 1) if images % d == 0]
    below, above = max(d for d in divisors if d < minibatch), min(d for d in divisors if d > minibatch)
    return (
        f"is {minibatch}, which does not divide the {images} images of an iteration "
        f"(prompts_per_iteration * group_size): set {below} or {above}"
    )


def image_order(seed: int, iteration: int, images: int, epochs: int, shuffle: bool = True) -> npt.NDArray[np.int64]:
    """Rows [epochs * images] in the order in which the gradient steps take them; each epoch has every row once.

    The first epoch keeps the order of drawing: its prompts were chosen at random, and its groups stay together. Later
    epochs are shuffled.

    Args:
        seed: of the run.
        iteration: from 0.
        images: of an iteration.
        epochs: passes over them.
        shuffle: whether later epochs are shuffled.
    """
    rng, drawn = stream(Purpose.MINIBATCHES, seed, iteration), np.arange(images)
    later = [rng.permutation(drawn) if shuffle else drawn for _ in range(epochs - 1)]
    return np.concatenate([drawn, *later])
