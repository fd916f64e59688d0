"""CDM: continuous-time distribution matching for few-step diffusion distillation (arXiv 2605.06376)."""
