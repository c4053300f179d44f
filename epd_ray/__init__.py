"""Fine-tune the ODE solver of a frozen diffusion model; what a pipeline needs of it loads when first asked for."""

from typing import TYPE_CHECKING

from epd_ray.registry import lazy_names

if TYPE_CHECKING:
    from epd_ray.deploy.parallelize import guide, parallelize
    from epd_ray.deploy.scheduler import EPDScheduler
    from epd_ray.rdpo.algorithm import RDPO
    from epd_ray.rdpo.config import RDPOConfig
    from epd_ray.solvers.solver import Solver
else:  # torch, diffusers and Ray take seconds to import
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "EPDScheduler": "epd_ray.deploy.scheduler",
            "RDPO": "epd_ray.rdpo",
            "RDPOConfig": "epd_ray.rdpo",
            "Solver": "epd_ray.solvers.solver",
            "guide": "epd_ray.deploy.parallelize",
            "parallelize": "epd_ray.deploy.parallelize",
        },
    )


__all__ = ["RDPO", "EPDScheduler", "RDPOConfig", "Solver", "guide", "parallelize"]
