"""Stage 2: sealed shards in, a LoRA out. Nothing here loads, imports or runs a VAE or a text encoder."""
