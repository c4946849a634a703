"""What determines a stage's result, and the version that follows from it before anything runs."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from storage.lake import DatasetRef, Lake, fingerprint
from storage.refs import parse_ref
from storage.schema import SCHEMA_VERSION
from storage.writer import Provenance, VersionWriter
from tasks.errors import ConfigError
from tasks.settings import StageConfig

# Raise a stage's number when its code starts to give other results for the same inputs.
STAGE_VERSIONS = {
    "ingest": 1,
    "import": 1,
    "generate": 2,
    "calibrate": 2,
    "adapt": 1,
    "align": 2,
    "score": 1,
    "assemble": 2,
    "finetune": 2,
    "reference": 1,
    "evaluate": 1,
    "compare": 1,
    "export": 2,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One stage, ready to run: its configuration with pinned inputs, and where the result goes.

    inputs: role -> kind/name@version or the hash of a source file. models: role -> content hash or models/NAME@version.
    """

    stage: str
    kind: str
    name: str
    config: StageConfig
    inputs: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Fingerprint of everything above."""
        return fingerprint(
            {
                "stage": self.stage,
                "stage_version": STAGE_VERSIONS[self.stage],
                "schema_version": SCHEMA_VERSION,
                "config": self.config.model_dump(mode="json"),
                "inputs": dict(self.inputs),
                "models": dict(self.models),
            }
        )

    @property
    def ref_text(self) -> str:
        """kind/name@version of the result."""
        return f"{self.kind}/{self.name}@{self.version}"

    def published(self, lake: Lake) -> DatasetRef | None:
        """The result, when the lake has it already."""
        return lake.find(self.kind, self.name, self.version)

    def writer(self, lake: Lake) -> VersionWriter:
        """Start or continue the result."""
        return lake.writer(self.kind, self.name, self.version)

    def provenance(self, stats: Mapping[str, JsonValue], ancestors: Mapping[str, str] | None = None) -> Provenance:
        """What goes into the manifest beside the files; `ancestors` are inputs of the inputs worth naming."""
        config = self.config.model_dump(mode="json")
        inputs = {**(ancestors or {}), **self.inputs, **self.models}
        command = " ".join(["winnow", *sys.argv[1:]]) if sys.argv[0].endswith("winnow") else f"flow {self.stage}"
        return Provenance(self.stage, config, inputs, stats, command)


def pin(lake: Lake, text: str, default: str) -> str:
    """`text` (or `default` where it is empty) with its version; a given version is taken as it is."""
    kind, name, version = parse_ref(text or default)
    wanted = default.partition("/")[0]
    if kind != wanted:
        raise ConfigError(f'"{text}" is of kind {kind}; this stage needs {wanted}/NAME')
    return str(lake.ref(kind, name, version)) if version else str(lake.resolve(f"{kind}/{name}"))


def digest_file(data: bytes) -> str:
    """sha256 of a source file, as it appears among the inputs."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
