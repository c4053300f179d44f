"""ODE solvers `solve(drift, x, sigmas, ...) -> x`, and the learned table that people take home."""

from epd_ray.solvers.baselines import dpm2, edm, euler, heun, ipndm
from epd_ray.solvers.epd import Callback, epd
from epd_ray.solvers.fit import check_fit
from epd_ray.solvers.solver import Solver
from epd_ray.solvers.table import SolverTable, dpm2_table, heun_table
from epd_ray.types import Form

__all__ = [
    "Callback",
    "Form",
    "Solver",
    "SolverTable",
    "check_fit",
    "dpm2",
    "dpm2_table",
    "edm",
    "epd",
    "euler",
    "heun",
    "heun_table",
    "ipndm",
]
