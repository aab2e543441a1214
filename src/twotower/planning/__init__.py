"""What a bundle will take, before anything is started: memory, disk and time by arithmetic."""

from twotower.planning.engines import EnginePlan
from twotower.planning.expert_path import on_gpus
from twotower.planning.fit import Alternative, GpuFit, fit
from twotower.planning.gpus import GPUS, GpuModel, gpu_at_hand, gpus_named
from twotower.planning.plan import Plan, plan_bundle
from twotower.planning.plan_options import PlanOptions
from twotower.planning.render import describe_plan
from twotower.planning.render_fits import describe_fits, refusal

__all__ = [
    "GPUS",
    "Alternative",
    "EnginePlan",
    "GpuFit",
    "GpuModel",
    "Plan",
    "PlanOptions",
    "describe_fits",
    "describe_plan",
    "fit",
    "gpu_at_hand",
    "gpus_named",
    "on_gpus",
    "plan_bundle",
    "refusal",
]
