"""Tasks: what is shown and asked, and the metric Q in [0, 1] of an answer that becomes the reward (docs/tasks.md)."""

from training.metrics import exact_match
from training.tasks.base import Sample, Task
from training.tasks.factory import TASKS, make_task
from training.tasks.model import (
    DTYPES,
    QUANTIZATIONS,
    answer,
    check_stages,
    device_of,
    encode,
    load_model,
    read_answers,
)
from training.tasks.scene_task import SceneTask

__all__ = [
    "DTYPES",
    "QUANTIZATIONS",
    "TASKS",
    "Sample",
    "SceneTask",
    "Task",
    "answer",
    "check_stages",
    "device_of",
    "encode",
    "exact_match",
    "load_model",
    "make_task",
    "read_answers",
]
