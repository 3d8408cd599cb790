"""Lightning callbacks of percov2."""

from percov2.training.callbacks.export import ExportModel
from percov2.training.callbacks.weight_ema import WeightEMA

__all__ = ["ExportModel", "WeightEMA"]
