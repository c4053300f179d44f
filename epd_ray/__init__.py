"""Fine-tune the ODE solver of a frozen diffusion model; what a pipeline needs of it loads when first asked for."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epd_ray.deploy.parallelize import parallelize
    from epd_ray.deploy.scheduler import EPDScheduler
    from epd_ray.solvers import Solver
else:
    _EXPORTS = {
        "EPDScheduler": "epd_ray.deploy.scheduler",
        "Solver": "epd_ray.solvers",
        "parallelize": "epd_ray.deploy.parallelize",
    }

    def __getattr__(name: str) -> object:
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_EXPORTS[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_EXPORTS})


__all__ = ["EPDScheduler", "Solver", "parallelize"]
