"""The embedded miniature: a small, genuine Stable Diffusion 3 pipeline on coloured handwritten digits."""
