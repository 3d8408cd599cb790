"""Lightning callbacks of percov2."""

from percov2.training.callbacks.codebook_usage import CodebookUsage
from percov2.training.callbacks.export import ExportModel
from percov2.training.callbacks.gradient_norm import GradientNorms
from percov2.training.callbacks.last_checkpoint import LastCheckpoint
from percov2.training.callbacks.non_finite import SkipNonFinite
from percov2.training.callbacks.rate_distortion import RateDistortionSamples
from percov2.training.callbacks.stop_on_signal import StopOnSignal
from percov2.training.callbacks.stream_faults import StreamFaults
from percov2.training.callbacks.throughput import Throughput
from percov2.training.callbacks.token_rate import TokenRate
from percov2.training.callbacks.weight_ema import WeightEMA

__all__ = [
    "CodebookUsage",
    "ExportModel",
    "GradientNorms",
    "LastCheckpoint",
    "RateDistortionSamples",
    "SkipNonFinite",
    "StopOnSignal",
    "StreamFaults",
    "Throughput",
    "TokenRate",
    "WeightEMA",
]
