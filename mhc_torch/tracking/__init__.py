"""Experiment tracking for Lightning, for any other loop, and for JAX: MLflow, W&B, TensorBoard, ClearML, Comet."""

try:
    import lightning.pytorch  # noqa: F401  says what to install
except ImportError as error:
    raise ImportError("mhc_torch.tracking needs Lightning: pip install 'mhc-jax[lightning]'") from error

from mhc_torch.tracking.experiment import Experiment
from mhc_torch.tracking.session import TrackingConfig, get_active_experiment, start_logging, stop_logging

__all__ = ["Experiment", "TrackingConfig", "get_active_experiment", "start_logging", "stop_logging"]
