"""One node of the operator with its function body, as a model for onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from benchmarks.support.operator_case import Case
from lminf_export.operator import contract
from lminf_export.operator.attention_body import OPSET, BodyFeatures, function_body


class OnnxNode:
    """One LambdaAttention node with its function body, in onnxruntime."""

    def __init__(
        self,
        case: Case,
        element=TensorProto.FLOAT,
        in_place: bool = False,
        kernels: Path | None = None,
        int8_cache: bool = False,
        key_bias: bool = False,
    ) -> None:
        self.case, self.in_place, self.int8_cache = case, in_place, int8_cache
        self.names = contract.input_names(int8_cache=int8_cache, key_bias=key_bias)
        features = BodyFeatures(
            rotary=bool(case.rotary_dim),
            alibi=case.alibi,
            softcap=bool(case.softcap),
            sink_logits=case.sink_logits,
            int8_cache=int8_cache,
            key_bias=key_bias,
        )
        model = one_node_model(case, function_body(features), element)
        options = ort.SessionOptions()
        if kernels is not None:
            options.register_custom_ops_library(str(kernels))
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, case, inputs):
        arrays = [np.ascontiguousarray(x.numpy()) for x in inputs]
        values = [ort.OrtValue.ortvalue_from_numpy(x) for x in arrays]
        binding = self.session.io_binding()
        named = dict(zip(self.names, values, strict=True))
        for name, value in named.items():
            binding.bind_ortvalue_input(name, value)
        for name in contract.output_names(int8_cache=self.int8_cache):
            is_constant = "sink" in name and not case.num_sink_tokens
            if self.in_place and name.startswith("present") and not is_constant:
                binding.bind_ortvalue_output(name, named[name.replace("present", "past")])
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if self.in_place:
            assert outputs[1].data_ptr() == values[3].data_ptr()
        return [torch.from_numpy(x.numpy().copy()) for x in outputs]


def one_node_model(case: Case, function, element) -> onnx.ModelProto:
    key_bias = function.name == contract.KEY_BIAS_OP_TYPE
    int8_cache = key_bias or function.name == contract.INT8_CACHE_OP_TYPE
    inputs = contract.inputs(int8_cache=int8_cache, key_bias=key_bias)
    outputs = contract.outputs(int8_cache=int8_cache)
    kinds = {
        "model": element,
        "ring": TensorProto.INT8 if int8_cache else element,
        "int64": TensorProto.INT64,
        "float32": TensorProto.FLOAT,
    }

    def infos(operands):
        return [helper.make_tensor_value_info(x.name, kinds[x.element], None) for x in operands]

    attributes = {**case.attributes(), "rotary_interleaved": int(case.interleaved)}
    node = helper.make_node(
        function.name,
        [x.name for x in inputs],
        [x.name for x in outputs],
        domain=contract.DOMAIN,
        plugin_namespace=contract.DOMAIN,
        **attributes,
    )
    graph = helper.make_graph([node], "one", infos(inputs), infos(outputs))
    return helper.make_model(
        graph,
        functions=[function],
        opset_imports=[
            helper.make_opsetid("", OPSET),
            helper.make_opsetid(contract.DOMAIN, 1),
        ],
        ir_version=11,
    )
