"""Tokens and caption to latents to image."""
