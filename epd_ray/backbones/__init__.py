"""Frozen diffusion models behind one protocol; each entry loads when first asked for."""

from typing import TYPE_CHECKING

from epd_ray.registry import Registry

if TYPE_CHECKING:
    from epd_ray.types import Backbone

BACKBONES: "Registry[Backbone]" = Registry(
    "backbone",
    {
        "auto": "epd_ray.backbones.auto:open_backbone",
        "gaussian": "epd_ray.backbones.gaussian:GaussianBackbone",
        "simulated": "epd_ray.backbones.simulated:SimulatedBackbone",
    },
)
