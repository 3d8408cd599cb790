"""LightningModules of the training stages: thin, the mathematics lives in the packages above."""

from percov2.training.autoencoder_stage import AutoencoderStage
from percov2.training.entropy_stage import EntropyStage
from percov2.training.flow_stage import FlowStage

__all__ = ["AutoencoderStage", "EntropyStage", "FlowStage"]
