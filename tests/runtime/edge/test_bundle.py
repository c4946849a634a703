"""Bundles that are not what their manifest says are refused, and nothing is read past what it says."""

import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.edge.budget import RunSettings
from runtime.edge.bundle import open_bundle
from runtime.edge.bundle_write import write_bundle
from runtime.edge.engine import EdgeModel
from runtime.edge.manifest import MANIFEST, NEURONS, RESIDENT, parse
from runtime.errors import BundleError, ConfigError, ModelError, WinnowError
from tests.runtime.edge.bundles import contents, written
from tests.runtime.edge.models import gated_model

SMALL = RunSettings(max_tokens=16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("bundle") / "b", "bfloat16")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _rehash(folder: Path, name: str) -> None:
    """A liar adapts the hashes too."""
    entry = {"size_bytes": (folder / name).stat().st_size}
    entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    _edit(folder, lambda m: m["files"].__setitem__(name, entry))


def test_a_bundle_is_read_back_as_it_was_written(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest == parse((bundle / MANIFEST).read_bytes())
    assert {path.name for path in bundle.iterdir()} == {MANIFEST, RESIDENT, NEURONS}
    assert (bundle / NEURONS).stat().st_size % 4096 == 0
    for layer in opened.manifest.layers:
        assert layer.hot_offset % 4096 == layer.cold_offset % 4096 == 0


@pytest.mark.parametrize("name", [RESIDENT, NEURONS])
def test_one_changed_byte_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} has another sha256"):
        open_bundle(copy)


@pytest.mark.parametrize("name", [RESIDENT, NEURONS])
def test_a_truncated_file_is_found_without_reading_it(copy: Path, name: str) -> None:
    os.truncate(copy / name, 5000)
    with pytest.raises(BundleError, match=f"{name} has 5000 bytes"):
        open_bundle(copy, verify=False)


def test_a_file_that_is_cut_while_it_is_in_use_is_noticed(copy: Path) -> None:
    with EdgeModel(open_bundle(copy), None, SMALL) as model:
        os.truncate(copy / NEURONS, 4096)
        with pytest.raises(BundleError, match="became shorter"):
            model.forward([5, 6, 7])
        with pytest.raises(BundleError, match="open it again"):
            model.step(5)


def test_a_link_is_no_file_of_a_bundle(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / NEURONS, tmp_path / "elsewhere")
    (copy / NEURONS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="cannot be read"):
        open_bundle(copy)


def test_a_pipe_does_not_block(copy: Path) -> None:
    (copy / NEURONS).unlink()
    os.mkfifo(copy / NEURONS)
    with pytest.raises(BundleError, match="has 0 bytes"):
        open_bundle(copy)


def test_a_huge_manifest_is_not_read(copy: Path) -> None:
    with (copy / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: a terabyte
    with pytest.raises(BundleError, match="is larger than"):
        open_bundle(copy)


def test_deep_nesting_is_no_manifest() -> None:
    with pytest.raises(BundleError, match="is not JSON"):
        parse(b"[" * 100_000)


def test_a_huge_header_is_refused(copy: Path) -> None:
    data = bytearray((copy / RESIDENT).read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    (copy / RESIDENT).write_bytes(data)
    _rehash(copy, RESIDENT)
    with pytest.raises(BundleError, match="has a header of 1099511627776 bytes"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), 'not "winnow-edge"'),
        (lambda m: m.update(version=2), "bundle version 2 is not 1"),
        (lambda m: m["layers"][1].update(cold_offset=1 << 40), "layer 1 lies at"),
        (lambda m: m["layers"][1].update(hot_offset=100), "not a multiple of 4096"),
        (lambda m: m["layers"][0].update(n_hot=97), "n_hot = 97"),
        (lambda m: m["layers"][0].update(n_hot=True), "n_hot = True"),
        (lambda m: m["layers"][0].update(threshold=float("nan")), "threshold = nan"),
        (lambda m: m["layers"].pop(), "must list 3 layers"),
        (lambda m: m["shape"].update(n_layers=10**9), "n_layers = 1000000000"),
        (lambda m: m["shape"].update(hidden=64), "not at|must have|lies at"),
        (lambda m: m.update(block=0), "block = 0"),
        (lambda m: m.update(block=97), "block = 97 is above the 96 neurons of a layer"),
        (lambda m: m.update(weight_format="int3"), "'int3'"),
        (lambda m: m["files"].update({"../x": m["files"][NEURONS]}), "cannot be part of a bundle"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"][NEURONS]}), "cannot be part of a bundle"),
        (lambda m: m["files"].pop(NEURONS), "does not list neurons.bin"),
        (lambda m: m["files"][NEURONS].update(size_bytes=1 << 60), "size_bytes = "),
        (lambda m: m["files"][NEURONS].update(sha256="x"), "has sha256 'x'"),
        (lambda m: m["config"].update(auto_map={"AutoConfig": "evil.py"}), "'auto_map', which is not known"),
        (lambda m: m["config"].update(model_type="gpt2"), "model type 'gpt2'"),
        (lambda m: m["config"].update(num_hidden_layers=9), "shape and its model configuration differ"),
        (lambda m: m["config"].update(num_attention_heads=0), "configuration|missing or not"),
        (lambda m: m["config"].update(vocab_size=1 << 40), "vocab_size = 1099511627776, above 16777216"),
        (lambda m: m["config"].update(vocab_size=641), "missing or not"),
        (lambda m: m["config"].update(rope_parameters={"rope_type": "dynamic"}), "rope"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_in_one_line(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _edit(copy, change)
    with pytest.raises(ModelError, match=message) as refused:
        EdgeModel(open_bundle(copy), None, SMALL)
    assert "\n" not in str(refused.value)


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_manifest_breaks_anything_but_itself(bundle: Path, data: st.DataObject) -> None:
    """Any value anywhere in a manifest: either the bundle still opens and computes, or it is refused as what it is."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    place: Any = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(JUNK)
    try:
        found = parse(json.dumps(manifest).encode())
        with EdgeModel(replace(open_bundle(bundle), manifest=found), None, SMALL) as model:
            assert torch.isfinite(model.forward([5, 6, 7])).all() or found != open_bundle(bundle).manifest
    except WinnowError as error:
        assert "\n" not in str(error)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_no_bytes_are_taken_for_a_manifest(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse(data)


def test_a_folder_with_files_is_left_alone(bundle: Path) -> None:
    before = sorted(bundle.iterdir())
    with pytest.raises(ConfigError, match="is not empty"):
        write_bundle(bundle, contents(gated_model()))
    assert sorted(bundle.iterdir()) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the kernel's refusal, as of a full disk
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            write_bundle(tmp_path / "new", contents(gated_model()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "new").exists()


def test_a_model_that_the_engine_would_compute_wrongly_is_refused(tmp_path: Path) -> None:
    windowed = gated_model("mistral", sliding_window=8)
    with pytest.raises(ModelError, match="sliding window"):
        write_bundle(tmp_path / "new", contents(windowed))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_supported_architecture_computes_the_same_as_transformers(tmp_path: Path, kind: str, tied: bool) -> None:
    changes: dict[str, object] = {"tie_word_embeddings": tied}
    changes |= {"sliding_window": None} if kind == "mistral" else {}
    model = gated_model(kind, **changes)
    write_bundle(tmp_path / "new", contents(model))
    with EdgeModel(open_bundle(tmp_path / "new"), None, SMALL) as found, torch.inference_mode():
        ids = [5, 17, 33, 9, 60]
        torch.testing.assert_close(found.forward(ids), model(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4)
