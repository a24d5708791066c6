"""Defaults of a validation's options; imports nothing, as a command's help needs it."""

DEFAULT_MAX_HOURS = 24.0
