"""Frozen streams with the model that wrote them: what this format has ever been must decode."""
