"""How the images of an iteration are divided among gradient steps: pure functions of numbers."""

import numpy as np
import numpy.typing as npt

from epd_ray.randomness import Purpose, stream


def minibatch_problem(minibatch: int, images: int) -> str | None:
    """An error message if a minibatch size does not divide the images of an iteration, otherwise None.

    RLlib would fill an incomplete minibatch with repeated images.

    Args:
        minibatch: images per gradient step; a size of at least `images` takes all of them in one step.
        images: images per iteration, prompts times group size.
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

    The first epoch keeps the order in which the images were drawn: their prompts were chosen at random, and groups stay
    together. Later epochs are shuffled.

    Args:
        seed: seed of the run.
        iteration: index of the iteration, from 0.
        images: images per iteration.
        epochs: passes over the images.
        shuffle: whether later epochs are shuffled.
    """
    rng, drawn = stream(Purpose.MINIBATCHES, seed, iteration), np.arange(images)
    later = [rng.permutation(drawn) if shuffle else drawn for _ in range(epochs - 1)]
    return np.concatenate([drawn, *later])
