"""Models in GGUF files: their configuration, tensors and tokenizer under transformers' names."""
