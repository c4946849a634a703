"""The manifest of a bundle, and the checks by which a foreign one is taken or refused."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import cast, get_args

from runtime.edge.architectures import Activation
from runtime.edge.layout import ALIGN, RecordLayout, aligned
from runtime.edge.quantise import FLOATS, TOP
from runtime.edge.records import FfnShape, PredictorKind, WeightFormat
from runtime.errors import BundleError

FORMAT = "winnow-edge"
VERSION = 1
MANIFEST = "manifest.json"
RESIDENT = "resident.safetensors"
NEURONS = "neurons.bin"
MOST_MANIFEST_BYTES = 8 << 20
MOST_LAYERS = 1024
MOST_SIZE = 1 << 20  # of any dimension
MOST_FILE_BYTES = 1 << 46
MOST_TOKENIZER_BYTES = 1 << 28  # of each file, which is read as a whole
MOST_NUMBER = 1e30
_FILE_NAME = re.compile(r"(tokenizer/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the bundle."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """Where a layer's neurons lie in the neuron file, and what decides which are computed."""

    n_hot: int
    hot_offset: int
    cold_offset: int
    predictor: PredictorKind
    threshold: float  # of the predictor's score, or of |silu(gate)|
    recall: float
    predicted_active: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of a bundle without reading its weights."""

    config: Json  # of the Hugging Face model
    shape: FfnShape
    weight_format: WeightFormat
    group: int
    dtype: str  # of the resident weights, and what is computed in
    block: int  # neurons that are computed together
    layers: tuple[LayerEntry, ...]
    files: Mapping[str, FileEntry]
    quality: Json = field(default_factory=dict)
    plan: Json = field(default_factory=dict)

    @property
    def record(self) -> RecordLayout:
        """The layout of a neuron."""
        has_gate = not self.layers or self.layers[0].predictor != "gate"
        return RecordLayout(self.shape.hidden, self.weight_format, self.group, has_gate)

    def n_cold(self, layer: int) -> int:
        """Neurons of a layer that are not hot."""
        return self.shape.intermediate - self.layers[layer].n_hot

    @property
    def ffn_bytes(self) -> int:
        """Bytes of all neurons."""
        per_neuron = 3 * RecordLayout(self.shape.hidden, self.weight_format, self.group).part_bytes
        return self.shape.n_layers * self.shape.intermediate * per_neuron

    def to_json(self) -> str:
        """As it is written."""
        found = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(found, indent=1, allow_nan=False) + "\n"


def parse(text: bytes) -> Manifest:
    """The manifest in `text`, every field checked; BundleError names the first that does not fit."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is not JSON: {type(error).__name__}; export the bundle again") from error
    top = _object(found, "manifest")
    if top.get("format") != FORMAT:
        raise BundleError(f'{MANIFEST} has format {_shown(top.get("format"))}, not "{FORMAT}"; give a bundle')
    if top.get("version") != VERSION:
        raise BundleError(f"bundle version {_shown(top.get('version'))} is not {VERSION}; export it again")
    shape = _shape(_object(top.get("shape"), "shape"))
    listed = top.get("layers")
    if not isinstance(listed, list) or len(listed) != shape.n_layers:
        raise BundleError(f"{MANIFEST} must list {shape.n_layers} layers; export the bundle again")
    manifest = Manifest(
        config=_object(top.get("config"), "config"),
        shape=shape,
        weight_format=cast(WeightFormat, _choice(top, "weight_format", get_args(WeightFormat))),
        group=_integer(top, "group", 1, MOST_SIZE),
        dtype=_choice(top, "dtype", tuple(FLOATS)),
        block=_integer(top, "block", 1, MOST_SIZE),
        layers=tuple(_layer(_object(one, "layer"), shape) for one in listed),
        files={name: _file(name, one) for name, one in _object(top.get("files"), "files").items()},
        quality=_object(top.get("quality"), "quality"),
        plan=_object(top.get("plan"), "plan"),
    )
    check_places(manifest)
    return manifest


def check_places(manifest: Manifest) -> None:
    """Every layer's neurons lie in the neuron file, one after the other."""
    if missing := {RESIDENT, NEURONS} - set(manifest.files):
        raise BundleError(f"{MANIFEST} does not list {', '.join(sorted(missing))}; export the bundle again")
    if manifest.weight_format in TOP and manifest.shape.hidden % manifest.group:
        raise BundleError(f"group = {manifest.group} does not divide the hidden size {manifest.shape.hidden}")
    if manifest.block > manifest.shape.intermediate:
        raise BundleError(f"block = {manifest.block} is above the {manifest.shape.intermediate} neurons of a layer")
    if len({layer.predictor == "gate" for layer in manifest.layers}) > 1:
        raise BundleError("some layers have resident gates and some have not; export the bundle again")
    end, record = 0, manifest.record
    for index, layer in enumerate(manifest.layers):
        hot_end = layer.hot_offset + aligned(layer.n_hot * record.record_bytes)
        if layer.hot_offset != end or layer.cold_offset != hot_end:
            raise BundleError(f"layer {index} lies at {layer.hot_offset} and {layer.cold_offset}, not at {end}")
        end = hot_end + aligned(manifest.n_cold(index) * record.stride)
    size = manifest.files[NEURONS].size_bytes
    if size != end:
        raise BundleError(f"{NEURONS} must have {end} bytes but is listed with {size}; export the bundle again")


def _shape(found: Json) -> FfnShape:
    return FfnShape(
        _integer(found, "n_layers", 1, MOST_LAYERS),
        _integer(found, "hidden", 1, MOST_SIZE),
        _integer(found, "intermediate", 1, MOST_SIZE),
        cast(Activation, _choice(found, "activation", get_args(Activation))),
    )


def _layer(found: Json, shape: FfnShape) -> LayerEntry:
    return LayerEntry(
        n_hot=_integer(found, "n_hot", 0, shape.intermediate),
        hot_offset=_offset(found, "hot_offset"),
        cold_offset=_offset(found, "cold_offset"),
        predictor=cast(PredictorKind, _choice(found, "predictor", get_args(PredictorKind))),
        threshold=_number(found, "threshold"),
        recall=_number(found, "recall"),
        predicted_active=_number(found, "predicted_active"),
    )


def _file(name: str, value: object) -> FileEntry:
    found = _object(value, "file")
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise BundleError(f"{MANIFEST} lists a file {_shown(name)}, which cannot be part of a bundle")
    sha256 = found.get("sha256")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise BundleError(f"{name} has sha256 {_shown(sha256)}; export the bundle again")
    most = MOST_TOKENIZER_BYTES if name.startswith("tokenizer/") else MOST_FILE_BYTES
    return FileEntry(_integer(found, "size_bytes", 0, most), sha256)


def _object(value: object, name: str) -> Json:
    if not isinstance(value, dict):
        raise BundleError(f"{name} in {MANIFEST} is {_shown(value)}, not an object")
    return value


def _integer(found: Json, name: str, low: int, high: int) -> int:
    value = found.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BundleError(f"{name} = {_shown(value)} in {MANIFEST} is not a whole number from {low} to {high}")
    return value


def _offset(found: Json, name: str) -> int:
    value = _integer(found, name, 0, MOST_FILE_BYTES)
    if value % ALIGN:
        raise BundleError(f"{name} = {value} in {MANIFEST} is not a multiple of {ALIGN}")
    return value


def _number(found: Json, name: str) -> float:
    value = found.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -MOST_NUMBER <= value <= MOST_NUMBER:
        raise BundleError(f"{name} = {_shown(value)} in {MANIFEST} is not a number")
    return float(value)


def _choice(found: Json, name: str, choices: tuple[str, ...]) -> str:
    value = found.get(name)
    if value not in choices or not isinstance(value, str):
        raise BundleError(f"{name} = {_shown(value)} in {MANIFEST} is none of {', '.join(choices)}")
    return value


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int | float | bool | None) else f"{str(value)[:40]!r}"
