"""Text to batches: sources, tokenizers, packing, pipelines. Imports neither the model nor the trainer."""
