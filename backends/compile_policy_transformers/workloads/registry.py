"""All workloads, in the order of the table."""

from __future__ import annotations

from compile_policy_transformers.workloads import (
    adapters,
    caches,
    decoding,
    deployment,
    multimodal,
    precision,
    processes,
    trainers,
    training,
)
from compile_policy_transformers.workloads.workload import Workload

#: Heading -> workloads.
SECTIONS: dict[str, tuple[Workload, ...]] = {
    "Training": training.WORKLOADS,
    "Training loops": trainers.WORKLOADS,
    "Low precision": precision.WORKLOADS,
    "Adapters": adapters.WORKLOADS,
    "Pictures": multimodal.WORKLOADS,
    "Caches": caches.WORKLOADS,
    "Generation": decoding.WORKLOADS,
    "Around a model": (*deployment.WORKLOADS, *processes.WORKLOADS),
}
WORKLOADS = {workload.name: workload for section in SECTIONS.values() for workload in section}
