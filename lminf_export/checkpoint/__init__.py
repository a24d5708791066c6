"""Models of Hugging Face on disk: configuration and tensors, decoded, with adapters merged."""
