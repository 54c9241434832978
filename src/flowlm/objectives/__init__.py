"""What the flows minimise; `flowlm.families.Objective` says what the training loop asks of an objective."""

from __future__ import annotations

from flowlm.objectives.flow import FlowObjective
from flowlm.objectives.flow_map import FlowMapConfig, FlowMapObjective

__all__ = ["FlowMapConfig", "FlowMapObjective", "FlowObjective"]
