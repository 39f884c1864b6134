"""Writes both encoders as ONNX models for any batch size (docs/export.md)."""

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from flip.export.load import TrainedModel
from flip.models.clip import CLIPModel
from flip.runs.errors import ConfigError

IMAGE = "image_encoder.onnx"
TEXT = "text_encoder.onnx"
_SINGLE_FILE_BYTES = 1 << 30
"""Larger weights go to a second file NAME.onnx.data: a protobuf file holds at most 2 GiB."""


def check_packages() -> None:
    """Raises ConfigError if a package that torch's exporter needs is not installed."""
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            remedy = f"Install it: pip install {package}"
            raise ConfigError("a package is missing", "--to onnx", package, remedy)


def write(folder: Path, loaded: TrainedModel) -> set[str]:
    """Write the files IMAGE and TEXT to ``folder``. Returns the names of the parameters that they compute with."""
    shape = loaded.config.model
    model = copy.deepcopy(loaded.model).cpu().eval()
    pixels = torch.zeros(2, 3, shape.image.size, shape.image.size)
    used = _write(_PixelEncoder(model, shape.image.patch), pixels, "pixel_values", "image_embeds", folder / IMAGE)
    tokens = torch.ones(2, shape.text.length, dtype=torch.int64)
    return used | _write(_TokenEncoder(model), tokens, "input_ids", "text_embeds", folder / TEXT)


class _PixelEncoder(nn.Module):
    """Normalised pixels (n, 3, size, size) -> image features (n, E) of norm 1."""

    def __init__(self, model: CLIPModel, patch: int) -> None:
        super().__init__()
        self.model = model
        self.patch = patch
        model.image.pixel_scale.fill_(1.0)  # pixels are normalised already
        model.image.pixel_offset.zero_()

    def forward(self, pixel_values: Tensor) -> Tensor:
        n, _, size, _ = pixel_values.shape
        side = size // self.patch
        grid = pixel_values.reshape(n, 3, side, self.patch, side, self.patch)
        return self.model.encode_image(grid.permute(0, 2, 4, 3, 5, 1).reshape(n, side * side, -1))


class _TokenEncoder(nn.Module):
    """Token ids (n, T) int64 -> text features (n, E) of norm 1."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model
        model.text.packed = False  # the shapes of packed captions depend on the data

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)


def _write(encoder: nn.Module, example: Tensor, source: str, target: str, path: Path) -> set[str]:
    """Write one graph. Returns the names of the model's parameters and buffers that its operations read."""
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch about itself
        # torch.export refuses a batch that is a constant of the graph; torch.onnx.export alone would write it.
        program = torch.export.export(encoder, (example,), dynamic_shapes=shapes)
        exported = torch.onnx.export(
            program, dynamic_shapes=shapes, input_names=[source], output_names=[target], verbose=False
        )
    assert exported is not None
    for node in exported.model.graph:
        node.metadata_props.clear()  # torch's stack traces, which have paths of this machine
    weights = [value.const_value for value in exported.model.graph.initializers.values() if value.const_value]
    exported.save(path, external_data=sum(value.nbytes for value in weights) > _SINGLE_FILE_BYTES)
    return _used(program)


def _used(program: torch.export.ExportedProgram) -> set[str]:
    signature = program.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.users]
    return {tensors[node.name].removeprefix("model.") for node in inputs if node.name in tensors}
