"""Frozen diffusion models behind the protocol `Backbone`; each one is imported when first asked for."""

from typing import TYPE_CHECKING

from epd_ray.registry import Registry

if TYPE_CHECKING:  # epd_ray.types imports NumPy, and the names alone are often enough
    from epd_ray.types import Backbone

BACKBONES: "Registry[Backbone]" = Registry(
    "backbone",
    {
        "auto": "epd_ray.backbones.auto:open_backbone",
        "pipeline": "epd_ray.backbones.driver:open_driven",
        "gaussian": "epd_ray.backbones.gaussian:GaussianBackbone",
        "simulated": "epd_ray.backbones.simulated:SimulatedBackbone",
    },
)
