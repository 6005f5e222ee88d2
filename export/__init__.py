"""Exporters, which write the encoders to files for other runtimes, and the gate that proves them."""

from importlib.util import find_spec

from finelip_fast.errors import EngineError

_MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
if _MISSING:
    raise EngineError(f"exporting needs {', '.join(_MISSING)}: pip install 'finelip-fast[onnx]'")
