"""Whether a GGUF file is what its clients read without a silent mistake; every file that is written here passes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from runtime.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter, ReaderTensor

PWRI, GGUF = b"PWRI", b"GGUF"
SPARSE_ARCHITECTURES = ("llama", "bamboo")
# PowerInfer's numbering of types is old: what came after it (BF16, IQ*, today's I32) does not load.
OLD_TYPES = ("F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
ROW_TYPES = ("F16", "Q4_0")  # in which PowerInfer reads ffn_down_t; any other gives nan
NUMBERS = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
)
LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}
# What reading a file raises that ends early, or was not written by a program.
UNREADABLE = (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError)
OPTIONAL = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_q_norm.weight", "attn_k_norm.weight")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name to write a file under; it gets its own when it is whole and checked, and nothing is left of others."""
    if path.exists():
        raise ConfigError(f'"{path}" exists already; give the path of a new file')
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.rename(path)
    except OSError as error:
        raise ConfigError(
            f'"{path}" cannot be written: {error.strerror or error}; give a writable disk with room for it'
        ) from error
    finally:
        with suppress(OSError):  # of a disk that cannot be written to, the first failure says what is wrong
            part.unlink(missing_ok=True)


def write_out(writer: "GGUFWriter") -> None:
    """Everything that was added, and close the file."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
    except OSError:
        with suppress(OSError):  # the first failure says what is wrong
            writer.close()
        raise
    writer.close()


def check(path: Path, expected: Mapping[str, object]) -> None:
    """ModelError with the first thing that is wrong. expected: keys that follow from the model, with their values."""
    raise_first(path, problems(path, expected))


def raise_first(path: Path, found: Sequence[str]) -> None:
    """ModelError with the first of what was found."""
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ModelError(f'"{path}": {found[0]}{more}')


def problems(path: Path, expected: Mapping[str, object] | None = None) -> list[str]:
    """Everything that is wrong with a file, by itself and by what is expected of its keys, in words."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic not in (PWRI, GGUF):
        return [f"magic is {magic!r}; GGUF files begin with GGUF, PowerInfer's with PWRI"]
    try:
        reader = open_gguf(path)
    except UNREADABLE as error:
        return [f"cannot be read to its end: {error}"]
    is_sparse = magic == PWRI
    found = _keys(reader, is_sparse)
    if found:
        return found
    for key, value in (expected or {}).items():
        if value_of(reader, key) != value:
            found.append(f"{key} is {value_of(reader, key)}, where the model has {value}")
    return [
        *found,
        *_file_type(reader),
        *_tensors(reader, is_sparse),
        *_vocabulary(reader),
        *(_powerinfer(reader) if is_sparse else []),
    ]


def open_gguf(path: Path, types: Mapping[int, int] | None = None) -> "GGUFReader":
    """A file with either magic, memory-mapped. types: today's number of each type of tensor that there may be."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Takes PowerInfer's magic for GGUF's."""

        def _get(self, offset: int, *arguments: Any, **more: Any) -> Any:
            found = super()._get(offset, *arguments, **more)
            return np.frombuffer(GGUF, dtype=np.uint32) if offset == 0 else found

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            known = types or {}
            for field in fields if known else ():
                number = int(field.parts[4][0])
                if number not in known:
                    raise ValueError(f"{field.name} has type {number}, not {', '.join(map(str, known))}")
                field.parts[4] = np.array([known[number]], dtype=np.uint32)
            super()._build_tensors(start_offs, fields)

    return Reader(path)


def value_of(reader: "GGUFReader", key: str) -> Any:
    """A key's value; None where it is not there."""
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _keys(reader: "GGUFReader", is_sparse: bool) -> list[str]:
    found = []
    architecture = value_of(reader, "general.architecture")
    if is_sparse and architecture not in SPARSE_ARCHITECTURES:
        found.append(f'architecture is "{architecture}"; PowerInfer knows {", ".join(SPARSE_ARCHITECTURES)}')
    for name in NUMBERS:
        value = value_of(reader, f"{architecture}.{name}")
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            found.append(f"{architecture}.{name} is {value}")
    if found:
        return found
    threshold = value_of(reader, "powerinfer.sparse_threshold")
    if is_sparse and not (isinstance(threshold, float) and math.isfinite(threshold)):
        found.append(f"powerinfer.sparse_threshold is {threshold}")
    return found


def _shapes(reader: "GGUFReader", is_sparse: bool) -> dict[str, tuple[int | None, ...]]:
    """Shape (rows, cols) of every tensor there must be; None: any."""
    architecture = value_of(reader, "general.architecture")
    number = {name: value_of(reader, f"{architecture}.{name}") for name in NUMBERS}
    n_rows, hidden = len(value_of(reader, "tokenizer.ggml.tokens") or []), number["embedding_length"]
    neurons, head = number["feed_forward_length"], _head_dim(reader)
    queries, keys = head * number["attention.head_count"], head * number["attention.head_count_kv"]
    layer: dict[str, tuple[int | None, ...]] = dict.fromkeys(LAYER, (neurons, hidden))
    layer |= {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (queries, hidden)}
    layer |= {"attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, queries)}
    if is_sparse:
        layer |= {"ffn_down_t": (neurons, hidden), "fc1": (None, hidden), "fc2": (neurons, None)}
    else:
        layer |= {"ffn_down": (hidden, neurons)}
    shapes: dict[str, tuple[int | None, ...]] = {
        "token_embd.weight": (n_rows, hidden),
        "output_norm.weight": (hidden,),
        "output.weight": (n_rows, hidden),
    }
    blocks = range(number["block_count"])
    return shapes | {f"blk.{i}.{name}.weight": shape for i in blocks for name, shape in layer.items()}


def _head_dim(reader: "GGUFReader") -> int:
    architecture = value_of(reader, "general.architecture")
    return cast(int, value_of(reader, f"{architecture}.rope.dimension_count"))


def _file_type(reader: "GGUFReader") -> list[str]:
    """Clients show it, and some choose kernels by it."""
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    kind, number = kinds.get("blk.0.attn_q.weight"), value_of(reader, "general.file_type")
    wanted = FILE_TYPES.get(str(kind))
    return [] if wanted in (None, number) else [f"general.file_type is {number}, but matrices are {kind} ({wanted})"]


def _tensors(reader: "GGUFReader", is_sparse: bool) -> list[str]:
    there, wanted = {tensor.name: tensor for tensor in reader.tensors}, _shapes(reader, is_sparse)
    is_tied = not is_sparse and "output.weight" not in there
    missing = [name for name in wanted if name not in there and not (is_tied and name == "output.weight")]
    extra = [name for name in there if name not in wanted and not (not is_sparse and name.endswith(OPTIONAL))]
    found = [f"tensor {name} is missing" for name in missing] + [f"tensor {name} is one too many" for name in extra]
    for name, shape in wanted.items():
        if name in there:
            found += _tensor(there[name], shape, is_sparse)
    return found


def _tensor(tensor: "ReaderTensor", wanted: tuple[int | None, ...], is_sparse: bool) -> list[str]:
    shape, kind, found = tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name, []
    if len(shape) != len(wanted) or any(w is not None and s != w for s, w in zip(shape, wanted, strict=False)):
        found.append(f"{tensor.name} has shape {shape}, not {wanted}")
    if len(wanted) == 1 and kind != "F32":
        found.append(f"{tensor.name} is {kind}; vectors are F32")
    if is_sparse and kind not in OLD_TYPES:
        found.append(f"{tensor.name} is {kind}, which PowerInfer cannot load")
    if is_sparse and tensor.name.endswith("ffn_down_t.weight") and kind not in ROW_TYPES:
        found.append(f"{tensor.name} is {kind}; PowerInfer computes nan from anything but F16 and Q4_0")
    if kind in ("F32", "F16") and not np.isfinite(tensor.data).all():
        found.append(f"{tensor.name} has numbers that are not finite")
    return found


def _vocabulary(reader: "GGUFReader") -> list[str]:
    model, tokens = (value_of(reader, f"tokenizer.ggml.{name}") for name in ("model", "tokens"))
    if model not in ("llama", "gpt2"):
        return [f'tokenizer.ggml.model is "{model}"; llama and gpt2 are known']
    found = []
    if len(set(tokens)) != len(tokens):
        found.append("tokenizer.ggml.tokens has a token twice")
    for name in ("scores", "token_type"):
        if len(value_of(reader, f"tokenizer.ggml.{name}") or []) != len(tokens):
            found.append(f"tokenizer.ggml.{name} is not as long as the list of tokens")
    if model == "llama" and "<0x0A>" not in tokens:
        found.append("the vocabulary has no byte token <0x0A>")
    if model == "gpt2" and ("\u010a" not in tokens or value_of(reader, "tokenizer.ggml.merges") is None):
        found.append("the vocabulary has no letter U+010A or no merges")
    return found


def _powerinfer(reader: "GGUFReader") -> list[str]:
    """What PowerInfer does wrong without a word."""
    architecture = value_of(reader, "general.architecture")
    hidden, neurons, heads = (
        value_of(reader, f"{architecture}.{name}")
        for name in ("embedding_length", "feed_forward_length", "attention.head_count")
    )
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    step, found = 64 if "Q4_0" in kinds else 8, []
    if neurons <= 1000:
        found.append(f"feed_forward_length is {neurons}; PowerInfer computes 1000 and less wrongly")
    if hidden % step:
        found.append(f"embedding_length is {hidden}, no multiple of {step}")
    if _head_dim(reader) * heads != hidden:
        found.append(f"rope.dimension_count is {_head_dim(reader)}, not embedding_length / head_count")
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    for name, (*_, rank) in shapes.items():
        if name.endswith("fc1.weight") and shapes.get(name.replace("fc1", "fc2"), [rank])[0] != rank:
            found.append(f"{name} and fc2 differ in their rank")
    return found
