"""Stage 1: annotated clips in, sealed shards of latents and text embeddings out."""
