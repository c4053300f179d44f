"""The warning about prompts that are longer than a model reads."""

import logging

log = logging.getLogger(__name__)


def warn_of_truncation(cut: int, total: int) -> None:
    """Log one line where a model does not read some prompts to their ends.

    Args:
        cut: how many prompts are longer than the model reads, see `Backbone.truncated`.
        total: how many prompts there are.
    """
    if cut:
        log.warning("%d of %d prompts are longer than the model reads: their ends are cut", cut, total)
