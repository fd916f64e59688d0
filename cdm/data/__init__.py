"""The data of the pipeline: prompts, embeddings, latents and samples, in tables of safetensors shards."""
