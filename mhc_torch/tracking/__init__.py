"""Experiment tracking for Lightning, for any other loop, and for JAX: MLflow, W&B, TensorBoard, ClearML, Comet."""

from mhc_torch.tracking.experiment import Experiment
from mhc_torch.tracking.session import TrackingConfig, get_active_experiment, start_logging, stop_logging

__all__ = ["Experiment", "TrackingConfig", "get_active_experiment", "start_logging", "stop_logging"]
