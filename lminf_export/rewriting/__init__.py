"""Rewriting of ONNX language models that other tools exported."""
