"""Many requests over one session: slots, continuous batching, and streams of tokens."""
