"""Running a bundle: sessions, states, generation. Needs numpy, tokenizers and an engine only."""
