"""The operator `lminf::LambdaAttention`: its contract, its specification and its ONNX body."""
