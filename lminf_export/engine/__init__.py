"""From a prepared graph to a TensorRT plan; importing this imports no TensorRT."""
