"""Photographs and captions for training: LightningDataModules."""
