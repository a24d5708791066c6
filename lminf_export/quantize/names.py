"""Names of the parts of a quantised weight `x.weight` in a weights file, behind its own name."""

QUANTIZED, SCALES, ZERO_POINTS, OFFSETS = ".quantized", ".scales", ".zero_points", ".offsets"
