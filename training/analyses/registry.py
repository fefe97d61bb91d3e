"""The analyses by name, in the paper's order."""

from __future__ import annotations

from training.analyses import ablations, cliff, efficiency, fastv, main_table, sensitivity, strips, transfer, video
from training.analyses.config import Analysis

ANALYSES: dict[str, Analysis] = {
    module.ANALYSIS.name: module.ANALYSIS
    for module in (cliff, sensitivity, fastv, strips, main_table, video, efficiency, transfer, ablations)
}
