"""Tokens and caption to bits and back."""
