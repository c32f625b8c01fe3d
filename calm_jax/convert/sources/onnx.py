"""ONNX files of DINOv2 encoders, such as that of a larger network that torch exported: names, shapes and geometry of
transformers' Dinov2Model, from how the graph uses its constants.

torch's exporter leaves weights of linear layers transposed and without names (`onnx::MatMul_1966`), and may keep one of
several equal tensors. The nodes that use them are named after the layer
(`/backbone/encoder/layer.0/mlp/fc1/MatMul`): names are taken from there. What comes after the encoder is not used.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from calm_jax import json_files
from calm_jax.convert import hf_config, torch_files
from calm_jax.convert.torch_files import FileError, Tensor
from calm_jax.text.tokenizers import Tokenizer

LARGEST = (1 << 31) - 1  # bytes; protobuf has no larger messages
# onnx's number of a type -> NumPy's.
DTYPES = {1: np.dtype(np.float32), 10: np.dtype(np.float16), 16: np.dtype(ml_dtypes.bfloat16)}
NUMBERS = {1, 6, 7, 10, 11}  # types of small constants: float32, int32, int64, float16, float64
QUANTISED = {"DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "QLinearConv",
             "ConvInteger", "MatMulNBits"}
REMEDY = "give the encoder's Hugging Face folder"
# A layer of the encoder within the name of a node or of a constant, whatever the network around it is called.
LAYER = re.compile(r"(?:^|[./])(embeddings(?:[./]patch_embeddings[./]projection)?|encoder[./]layer\.\d+[./][\w./]+?|"
                   r"layernorm)$")
PARAMETER = re.compile(r"(?:^|\.)((?:embeddings\.(?:patch_embeddings\.projection\.(?:weight|bias)|cls_token|mask_token|"
                       r"register_tokens|position_embeddings))|encoder\.layer\.\d+\.[\w.]+\.(?:weight|bias|lambda1)|"
                       r"layernorm\.(?:weight|bias))$")
EMBEDDINGS = "embeddings"
# Layers as transformers from 5 on calls them in memory -> their names in published files.
RENAMED = ((r"\.attention\.q_proj\.", ".attention.attention.query."),
           (r"\.attention\.k_proj\.", ".attention.attention.key."),
           (r"\.attention\.v_proj\.", ".attention.attention.value."),
           (r"\.attention\.o_proj\.", ".attention.output.dense."), (r"\.mlp\.down_proj\.", ".mlp.weights_out."))
LONGEST = 500  # characters of a name


class Onnx:
    """See `convert.sources.Source`.

    Raises:
      FileError: the file is damaged, or holds no encoder of a kind that is read.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._graph = _read(path)
        with _walking(path):
            self._look()

    def _look(self) -> None:
        """Finds the constants of the encoder.

        Raises:
          FileError: there is none, or it is of a kind that is not read.
        """
        self._constants = {constant.name: constant for constant in self._graph.initializer}
        if len(self._constants) < len(self._graph.initializer):
            raise self._refuse("two of its constants have one name")
        self._makers = {output: node for node in self._graph.node for output in node.output}
        found = {node.op_type for node in self._graph.node} & QUANTISED
        if found:
            raise self._refuse(f"its weights were quantised ({', '.join(sorted(found))})")
        self._places = self._named()
        if "embeddings.patch_embeddings.projection.weight" not in self._places:
            raise self._refuse("there is no DINOv2 encoder that was exported by torch in it: no node is named after "
                               "its embeddings/patch_embeddings/projection")
        used = {constant.name for parts in self._places.values() for constant, _ in parts}
        unused = [name for name, constant in self._constants.items() if name not in used
                  and constant.data_type in DTYPES]
        self.notes = (f"of {self.path.name}, {len(unused)} tensors are of no use to an encoder: {', '.join(unused[:3])}"
                      f"{', ...' if len(unused) > 3 else ''}",) if unused else ()

    def config(self) -> json_files.Table:
        with _walking(self.path):
            return json_files.Table(self._config(), str(self.path), REMEDY, hf_config.GeometryError)

    def _config(self) -> dict[str, Any]:
        patches = self._shape("embeddings.patch_embeddings.projection.weight")
        stored = self._shape("embeddings.position_embeddings")
        side = math.isqrt(max(stored[1] - 1, 0)) if len(stored) == 3 else 0
        if len(patches) != 4 or patches[2] != patches[3] or not side or side * side + 1 != stored[1]:
            raise self._refuse(f"its patches {patches} and position embeddings {stored} are not those of a square grid "
                               "with a class token")
        layers = {int(found[1]) for name in self._places if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
        if layers != set(range(len(layers))) or not layers or len(layers) > hf_config.BLOCKS:
            raise self._refuse(f"the {len(layers)} blocks of its encoder are not numbered from 0 on")
        width, gated = patches[0], "encoder.layer.0.mlp.weights_in.weight" in self._places
        registers = "embeddings.register_tokens" in self._places
        hidden = 4 * width if gated else self._shape("encoder.layer.0.mlp.fc1.weight")[0]
        heads = self._heads(width, len(layers))
        self._check(gated, len(layers))
        self._check_scale(width // heads, len(layers))
        self._check_patches(patches[2])
        return {
            "model_type": "dinov2_with_registers" if registers else "dinov2", "hidden_size": width,
            "num_hidden_layers": len(layers), "num_attention_heads": heads,
            "patch_size": patches[2], "num_channels": patches[1], "image_size": side * patches[2],
            "layer_norm_eps": self._eps(len(layers)), "hidden_act": "gelu", "use_swiglu_ffn": gated,
            "mlp_ratio": hidden // width if hidden % width == 0 else hidden / width,
            "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in self._places,
            **({"num_register_tokens": self._shape("embeddings.register_tokens")[1]} if registers else {})}

    def tensors(self) -> dict[str, Tensor]:
        return {name: self._tensor(name) for name in self._places}

    def tokenizer(self) -> Tokenizer:
        raise self._refuse("it is an encoder's file, which has no tokenizer")

    def licence(self) -> str:
        return torch_files.licence(self.path)

    def _refuse(self, reason: str) -> FileError:
        return FileError(f"{self.path}: {reason}; {REMEDY}")

    # ---- names -------------------------------------------------------------------------------------------------------

    def _named(self) -> dict[str, list[tuple[Any, bool]]]:
        """A name in transformers -> the constants that it is made of, and whether each has to be transposed."""
        found: dict[str, list[tuple[Any, bool]]] = {}
        for node in self._graph.node:
            for name, *parts in self._of_node(node):
                name = _published(name)
                if name in found and [(one.name, turned) for one, turned in found[name]] != [
                        (one.name, turned) for one, turned in parts]:
                    raise self._refuse(f"{name} is two different tensors")
                found[name] = parts
        for constant in self._graph.initializer:  # those that kept their names, and of which no node tells more
            own = PARAMETER.search(constant.name) if len(constant.name) < LONGEST else None
            if own:
                found.setdefault(_published(own[1]), [(constant, False)])
        for name in [name for name in found if ".mlp.gate_proj." in name]:  # one matrix in published files
            other = name.replace("gate_proj", "up_proj")
            if other in found:
                found[name.replace("gate_proj", "weights_in")] = [*found.pop(name), *found.pop(other)]
        return found

    def _of_node(self, node: Any) -> Iterator[tuple[Any, ...]]:
        """Parameters that a node of the encoder computes with."""
        layer = LAYER.search(_folder(node))
        if not layer:
            return
        path, kind = layer[1].replace("/", "."), node.op_type
        constants = [self._constant(name) for name in node.input]
        last = path.rpartition(".")[2]
        if kind == "MatMul" and len(constants) == 2 and constants[1] and len(constants[1][0].dims) == 2:
            constant, turned = constants[1]
            yield f"{path}.weight", (constant, not turned)
        elif kind == "Gemm" and len(constants) >= 2 and constants[1]:
            options = _attributes(node)
            if options.get("alpha", 1.0) != 1 or options.get("beta", 1.0) != 1 or options.get("transA", 0):
                raise self._refuse(f"{node.name} scales or turns what it multiplies")
            yield f"{path}.weight", (constants[1][0], constants[1][1] == bool(options.get("transB", 0)))
            if len(constants) > 2 and constants[2]:
                yield f"{path}.bias", constants[2]
        elif kind in ("Conv", "LayerNormalization"):
            for name, constant in zip(("weight", "bias"), constants[1:3], strict=False):
                if constant:
                    yield f"{path}.{name}", constant
        elif path == EMBEDDINGS:
            yield from self._of_embeddings(node, constants)
        elif kind in ("Add", "Mul"):
            own = next((constant for constant in constants if constant and len(constant[0].dims) == 1), None)
            name = "bias" if kind == "Add" else "lambda1" if last.startswith("layer_scale") else "weight"
            if own and (kind == "Add" or last.startswith(("norm", "layernorm", "layer_scale"))):
                yield f"{path}.{name}", own

    def _of_embeddings(self, node: Any, constants: list[tuple[Any, bool] | None]) -> Iterator[tuple[Any, ...]]:
        """The class token, which is expanded to every image, and position embeddings: one constant that is added, or,
        where they are interpolated, that of the class token joined with what was a grid, `[1, side * side, D]`."""
        held = [constant for constant in constants if constant and len(constant[0].dims) == 3]
        if not held:
            return
        constant, shape = held[0], tuple(held[0][0].dims)
        if node.op_type == "Expand" and shape[:2] == (1, 1):
            yield f"{EMBEDDINGS}.cls_token", constant
        elif node.op_type == "Add":
            yield f"{EMBEDDINGS}.position_embeddings", constant
        elif node.op_type == "Concat" and shape[:2] == (1, 1):
            grid = next((self._grid(name) for name in node.input if name and not self._constant(name)), None)
            if grid is not None:
                yield f"{EMBEDDINGS}.position_embeddings", constant, grid

    def _grid(self, name: str) -> tuple[Any, bool] | None:
        """The constant that a value is interpolated from: back along the nodes that move or resize it."""
        for _ in range(16):
            node = self._makers.get(name)
            if node is None or node.op_type not in ("Reshape", "Transpose", "Resize", "Cast", "Identity"):
                return None
            if node.op_type == "Resize":
                options = {"coordinate_transformation_mode": b"half_pixel", "mode": b"nearest", "cubic_coeff_a": -0.75,
                           "antialias": 0, **_attributes(node)}
                if options["mode"] != b"cubic" or options["coordinate_transformation_mode"] not in (
                        b"half_pixel", b"pytorch_half_pixel") or options["cubic_coeff_a"] != -0.75:
                    raise self._refuse("its position embeddings are not interpolated bicubically as torch does")
            name = node.input[0]
            constant = self._constant(name)
            if constant:
                return constant
        return None

    def _constant(self, name: str) -> tuple[Any, bool] | None:
        """The constant behind a value, and whether it is transposed on the way."""
        turned = False
        for _ in range(8):
            if name in self._constants:
                return self._constants[name], turned
            node = self._makers.get(name)
            if node is None:
                return None
            if node.op_type == "Transpose" and list(_attributes(node).get("perm", [1, 0])) == [1, 0]:
                turned = not turned
            elif node.op_type != "Identity":
                return None
            name = node.input[0]
        return None

    # ---- geometry ----------------------------------------------------------------------------------------------------

    def _within(self, layer: str) -> list[Any]:
        """The nodes of a layer."""
        return self._layers.get(layer, [])

    @functools.cached_property
    def _layers(self) -> dict[str, list[Any]]:
        layers: dict[str, list[Any]] = {}
        for node in self._graph.node:
            layer = LAYER.search(_folder(node))
            if layer:
                layers.setdefault(layer[1], []).append(node)
        return layers

    def _numbers(self, name: str, depth: int = 4) -> list[float] | None:
        """The numbers of a value that the graph states: a constant, or several that are joined; where one of several is
        computed it is -1."""
        constant = self._constants.get(name)
        node = self._makers.get(name)
        if constant is None and node is not None and node.op_type == "Constant":
            constant = _attributes(node).get("value")
        if constant is not None and hasattr(constant, "dims"):
            import onnx
            if math.prod(constant.dims) > 16 or constant.data_location == 1 or constant.data_type not in NUMBERS:
                return None
            return [float(value) for value in onnx.numpy_helper.to_array(constant).reshape(-1)]
        if node is not None and node.op_type == "Concat" and depth and len(node.input) <= 8:
            parts = [self._numbers(part, depth - 1) for part in node.input]
            return [number for part in parts for number in (part or [-1.0])]
        return None

    def _heads(self, width: int, layers: int) -> int:
        """Attention heads, from the last but one number of the shape that queries, keys and values are given."""
        heads: set[int] = set()
        for layer in range(layers):
            found = set()
            for node in (*self._within(f"encoder/layer.{layer}/attention/attention"),
                         *self._within(f"encoder/layer.{layer}/attention")):
                if node.op_type == "Reshape" and len(node.input) == 2:
                    shape = self._numbers(node.input[1]) or []
                    if len(shape) == 4 and shape[3] > 0:
                        found.add(int(shape[2]) if shape[2] > 0 else width // int(shape[3]))
            if layer and found != heads:
                raise self._refuse("its blocks differ in attention heads")
            heads = found
        if len(heads) != 1:
            raise self._refuse("nothing in it says how many attention heads it has")
        return heads.pop()

    def _eps(self, layers: int) -> float:
        """The epsilon of the LayerNorms: an attribute, or the number that is added to the variance."""
        found = set()
        for layer in range(layers):
            for norm in ("norm1", "norm2"):
                own = set()
                for node in self._within(f"encoder/layer.{layer}/{norm}"):
                    if node.op_type == "LayerNormalization":
                        own.add(float(np.float32(_attributes(node).get("epsilon", 1e-5))))
                    elif node.op_type == "Add":
                        own.update(numbers[0] for name in node.input
                                   if (numbers := self._numbers(name)) and len(numbers) == 1)
                if len(own) != 1:
                    raise self._refuse(f"the epsilon of {norm} in its block {layer} was not found")
                found |= own
        if len(found) != 1:
            raise self._refuse("its blocks have no one epsilon of LayerNorm")
        return float(str(np.float32(found.pop())))  # 1e-06, not 9.999999974752427e-07

    def _check(self, gated: bool, layers: int) -> None:
        """Raises FileError for another activation than the exact GELU, or, gated, SiLU."""
        kinds: dict[int, set[str]] = {}
        for path, nodes in self._layers.items():
            within = re.match(r"encoder/layer\.(\d+)/mlp(?:/|$)", path)
            if within:
                kinds.setdefault(int(within[1]), set()).update(
                    node.op_type for node in nodes if node.op_type != "Gelu"
                    or _attributes(node).get("approximate", b"none") == b"none")
        for layer in range(layers):
            found = kinds.get(layer, set())
            if not found & ({"Sigmoid"} if gated else {"Erf", "Gelu"}) or found & {"Tanh", "Relu"}:
                raise self._refuse(f"the activation of block {layer} is not that of DINOv2")

    def _check_scale(self, head: int, layers: int) -> None:
        """Raises FileError where attention is not divided by the root of the channels of a head: at once, or queries
        and keys by its root each. A scale that the graph computes from a shape has a root in it."""
        for layer in range(layers):
            scale, rooted = 1.0, False
            for node in (*self._within(f"encoder/layer.{layer}/attention/attention"),
                         *self._within(f"encoder/layer.{layer}/attention")):
                rooted |= node.op_type == "Sqrt"
                numbers = [found[0] for name in node.input if (found := self._numbers(name)) and len(found) == 1
                           ] if node.op_type in ("Mul", "Div") else []
                if len(numbers) == 1:
                    scale = scale * numbers[0] if node.op_type == "Mul" else scale / numbers[0] if numbers[0] else 0.0
            if not rooted and not math.isclose(scale, head ** -0.5, rel_tol=1e-3):
                raise self._refuse(f"the attention of block {layer} is scaled by {scale:.6g}, not by the "
                                   f"{head ** -0.5:.6g} of heads of {head} channels")

    def _check_patches(self, side: int) -> None:
        """Raises FileError where patches overlap, or do not cover the image."""
        for node in self._within("embeddings/patch_embeddings/projection"):
            if node.op_type == "Conv":
                options = {"strides": [1, 1], "pads": [0], "dilations": [1], "group": 1, **_attributes(node)}
                if list(options["strides"]) != [side, side] or any(options["pads"]) or set(
                        options["dilations"]) != {1} or options["group"] != 1 or options.get(
                        "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
                    raise self._refuse("its patches are not squares beside each other")

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._places:
            raise self._refuse(f"no node in it uses {name}")
        first, *others = [tuple(constant.dims)[::-1] if turned else tuple(constant.dims)
                          for constant, turned in self._places[name]]
        axis = _axis(name)
        if any(len(shape) != len(first) or len(first) <= axis for shape in others):
            raise self._refuse(f"{name} is made of two tensors that do not fit together")
        return (*first[:axis], sum(shape[axis] for shape in (first, *others)), *first[axis + 1:]) if others else first

    def _tensor(self, name: str) -> Tensor:
        parts, shape = self._places[name], self._shape(name)
        flaw = next((flaw for constant, _ in parts if (flaw := _flaw(constant))), "")
        if flaw:
            sentence = f"{name} in {self.path} {flaw}; {REMEDY}"

            def refuse() -> np.ndarray:
                raise FileError(sentence)

            return Tensor(name, shape, np.dtype(np.float32), refuse, sentence)

        def read() -> np.ndarray:
            import onnx
            try:
                values = [onnx.numpy_helper.to_array(constant) for constant, _ in parts]
                values = [value.T if turned else value for value, (_, turned) in zip(values, parts, strict=True)]
                found = values[0] if len(values) == 1 else np.concatenate(values, _axis(name))
            except (TypeError, ValueError) as error:
                raise FileError(f"{self.path} is damaged: {name} cannot be read ({error}); fetch it again") from None
            if found.shape != shape:
                raise FileError(f"{self.path} is damaged: {name} has the shape {found.shape} instead of {shape}; fetch "
                                "it again")
            return found

        return Tensor(name, shape, DTYPES[parts[0][0].data_type], read)


@contextlib.contextmanager
def _walking(path: pathlib.Path) -> Iterator[None]:
    """Makes a sentence of what a damaged graph does to those who walk through it: nodes may lack inputs, have
    attributes of other types and constants of other sizes than their kind says."""
    try:
        yield
    except FileError:
        raise
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise FileError(f"{path} is damaged: a node in its graph is not as its kind has to be "
                        f"({torch_files.reason(error)}); fetch it again") from None


def _read(path: pathlib.Path) -> Any:
    """The graph of a file; its tensors stay as they are in it, and none outside of it is touched.

    Raises:
      FileError: it is missing, no regular file, too large or no ONNX file.
    """
    import onnx
    try:
        if not path.is_file():  # nobody may ever write into a pipe
            raise FileError(f"{path} is {'no regular file' if path.exists() else 'missing'}; fetch it again")
        if path.stat().st_size > LARGEST:
            raise FileError(f"{path} has {path.stat().st_size:,} bytes, and no ONNX file has more than {LARGEST:,}; "
                            f"{REMEDY}")
        graph = onnx.load(str(path), load_external_data=False).graph
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}; fetch it again") from None
    except Exception:  # protobuf raises its own kinds
        raise FileError(f"{path} is truncated or no ONNX file; fetch it again") from None
    if not graph.node:
        raise FileError(f"{path} is truncated or no ONNX file: there is no graph in it; fetch it again")
    return graph


def _published(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _axis(name: str) -> int:
    """The axis along which a tensor is joined where it is made of two constants."""
    return 1 if name.endswith("position_embeddings") else 0


def _folder(node: Any) -> str:
    """The path of the layer that a node was exported from; of none with a name that no exporter gives."""
    return node.name.rpartition("/")[0] if len(node.name) < LONGEST else ""


def _attributes(node: Any) -> dict[str, Any]:
    import onnx
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _flaw(constant: Any) -> str:
    """Why a constant cannot be read, or nothing."""
    if constant.data_location == 1:
        return "lies in another file"
    if constant.data_type not in DTYPES:
        return "is no float32, float16 or bfloat16"
    count = math.prod(constant.dims)
    held = len(constant.raw_data) // DTYPES[constant.data_type].itemsize if constant.raw_data else len(
        constant.float_data if constant.data_type == 1 else constant.int32_data)
    return "" if count == held and min(constant.dims, default=1) > 0 else "has not as many values as its shape"
