"""Mutated streams: each decodes or is refused, soon and in little memory."""
