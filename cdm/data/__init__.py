"""What the stages pass on: prompts, embeddings, latents and samples, in tables of safetensors shards."""
