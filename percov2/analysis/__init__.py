"""Image to latents to tokens, and the caption."""
