"""Bundles whose files were damaged on purpose: each command works with them or refuses them in one line."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.edge.bundle_write import write_bundle
from runtime.edge.hardware import Hardware
from runtime.edge.layout import aligned
from runtime.edge.manifest import MANIFEST, NEURONS, RESIDENT
from runtime.errors import BundleError
from storage.lake import Lake
from tasks.edge import Answering, Budget, BundleTalker, open_talker, plan_bundle, reply
from tasks.errors import USER_ERRORS, ModelError
from tests.runtime.edge.bundles import contents
from tests.runtime.edge.models import gated_model

PC = Hardware("pc", 1 << 30, 2, {4096: 100.0, 65536: 800.0}, 1500.0, 4, 10.0, 6.0)
KINDS = {"predictors": ("bfloat16", "relu"), "gates": ("int4", "silu")}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_policy_dir: Path) -> Mapping[str, Path]:
    """Of a random model, with a tokenizer."""
    found = {}
    for name, (weights, activation) in KINDS.items():
        model = gated_model(activation=activation, vocab_size=261)
        found[name] = tmp_path_factory.mktemp("bundle") / name
        write_bundle(found[name], contents(model, weights, tokenizer=tiny_policy_dir, threshold=0.05))
    return found


def rehash(folder: Path, name: str) -> None:
    """A liar adapts the manifest."""
    data = (folder / name).read_bytes()
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"][name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def used(folder: Path, lake: Lake) -> str:
    """What `winnow chat` and `winnow plan-edge` do with a bundle."""
    plan_bundle(str(folder), lake, PC, Budget(), None)
    talker = open_talker(str(folder), lake, Budget(share=0.6), verify=True)
    assert isinstance(talker, BundleTalker)
    with talker.model:
        return reply(talker, [("user", "Hi")], Answering(2, 0.0, 0), lambda text: None)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Cut, longer, with other bits, or with another length in front."""
    kind = data.draw(st.sampled_from(["cut", "longer", "bits", "length", "number"]))
    if kind == "cut":
        return content[: data.draw(st.integers(0, len(content)))]
    if kind == "longer":
        return content + data.draw(st.binary(min_size=1, max_size=5000))
    if kind == "length":
        return data.draw(st.integers(0, 2**64 - 1) | st.integers(0, len(content))).to_bytes(8, "little") + content[8:]
    found = bytearray(content)
    places = st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 4000) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        if kind == "number":  # digits are what headers and JSON count with
            place = next((at for at in range(place, len(found)) if chr(found[at]).isdigit()), place)
            found[place] = data.draw(st.sampled_from(b"0123456789-.e"))
        else:
            found[place] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(found)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_file_is_used_or_refused_in_one_line(
    kind: str, bundles: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(bundles[kind], tmp_path / "b", dirs_exist_ok=True))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from([MANIFEST, RESIDENT, RESIDENT, NEURONS, *names]))
    (folder / name).write_bytes(damaged(data, (folder / name).read_bytes()))
    if name != MANIFEST and data.draw(st.integers(0, 7)):
        rehash(folder, name)
    sizes = {(folder / one).stat().st_ino: (folder / one).stat().st_size for one in names}
    read = os.preadv

    def within(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        end = offset + sum(len(buffer) for buffer in buffers)
        assert end <= max(aligned(sizes[os.fstat(file).st_ino]), 4096)
        return read(file, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", within)
        try:
            assert isinstance(used(folder, Lake.open(str(tmp_path / "lake"))), str)
        except USER_ERRORS as error:
            assert "\n" not in str(error)


TOKENIZERS = {
    "no model": ("tokenizer.json", '{"model": []}'),
    "null": ("tokenizer.json", "null"),
    "a list": ("tokenizer_config.json", "[]"),
    "a class that is a number": ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    "a configuration that is a list": ("config.json", "[]"),
}


@pytest.mark.parametrize("case", [*TOKENIZERS, "impossible merge"])
def test_a_tokenizer_that_cannot_be_is_one_line(bundles: Mapping[str, Path], tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(bundles["predictors"], tmp_path / "b"))
    own = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    own["model"]["merges"] = [["zzz", "qqq"]]
    name, text = TOKENIZERS.get(case, ("tokenizer.json", json.dumps(own)))
    (folder / "tokenizer" / name).write_text(text)
    rehash(folder, f"tokenizer/{name}")
    with pytest.raises(ModelError, match="cannot load the tokenizer of .*; give a folder") as refused:
        used(folder, Lake.open(str(tmp_path / "lake")))
    assert "\n" not in str(refused.value)


RESIDENTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no frequency": (lambda t: t.pop("edge.0.frequency"), "lacks edge.0.frequency"),
    "bfloat16 frequency": (
        lambda t: t.update({"edge.0.frequency": t["edge.0.frequency"].bfloat16()}),
        "lacks edge.0.frequency",
    ),
    "nan": (lambda t: t["edge.1.frequency"].fill_(torch.nan), "edge.1.frequency has values that are no shares"),
    "a number": (lambda t: t.update({"edge.0.fc1": torch.tensor(1.0)}), "lacks edge.0.fc1"),
}


@pytest.mark.parametrize("case", RESIDENTS)
def test_a_plan_needs_what_the_engine_needs(bundles: Mapping[str, Path], tmp_path: Path, case: str) -> None:
    change, message = RESIDENTS[case]
    folder = Path(shutil.copytree(bundles["predictors"], tmp_path / "b"))
    tensors = load_file(folder / RESIDENT)
    change(tensors)
    save_file(tensors, folder / RESIDENT)
    rehash(folder, RESIDENT)
    with pytest.raises(BundleError, match=message):
        plan_bundle(str(folder), Lake.open(str(tmp_path / "lake")), PC, Budget(), None)
