"""From a model of transformers to an ONNX graph without weights."""
