import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.edge.budget import Needs, RunSettings, budget_of, divide, fixed_bytes, needs
from runtime.edge.bundle import open_bundle
from runtime.edge.engine import EdgeModel
from runtime.edge.hardware import Cores, Hardware, load, memory_bytes, probe
from runtime.edge.planner import hit_rate, plan, plan_for_speed
from runtime.edge.quantise import FLOATS
from runtime.edge.skeleton import build
from runtime.errors import ConfigError
from tests.runtime.edge.bundles import written

FLOAT32 = FLOATS["float32"]
PC = Hardware(
    name="pc",
    memory_bytes=1 << 30,
    cores=2,
    disk_mb_s={4096: 100.0, 65536: 800.0, 524288: 1500.0},
    sequential_mb_s=1500.0,
    io_threads=4,
    dense_gb_s=10.0,
    gather_gb_s=6.0,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Needs:
    bundle = open_bundle(written(tmp_path_factory.mktemp("plan") / "b"))
    resident = bundle.resident()
    return needs(bundle.manifest, resident, build(bundle.manifest, resident, FLOAT32).config)


def test_more_memory_never_makes_a_plan_slower(found: Needs) -> None:
    settings = RunSettings(max_tokens=64)
    budgets = [budget_of(found, settings, FLOAT32, share) for share in (0.4, 0.6, 0.8, 1.0)]
    plans = [plan(found, PC, budget, 64) for budget in budgets]
    assert [one.hit_rate for one in plans] == sorted(one.hit_rate for one in plans)
    assert [one.tokens_per_s for one in plans] == sorted(one.tokens_per_s for one in plans)
    assert plans[0].read_bytes > plans[-1].read_bytes == 0
    for one, budget in zip(plans, budgets, strict=True):
        assert one.pinned_bytes + one.cached_bytes <= budget == one.budget_bytes


def test_a_speed_is_reached_with_the_least_memory(found: Needs) -> None:
    slow_disk = replace(PC, disk_mb_s={4096: 0.4, 65536: 0.4})
    wanted = plan(found, slow_disk, None, 64).tokens_per_s * 0.5
    made = plan_for_speed(found, slow_disk, wanted, 64)
    assert made.tokens_per_s >= wanted
    assert made.budget_bytes < plan(found, slow_disk, None, 64).budget_bytes
    less = made.budget_bytes - 20 * 1600
    assert plan(found, slow_disk, less, 64).tokens_per_s < wanted
    with pytest.raises(ConfigError, match="predicted to reach"):
        plan_for_speed(found, slow_disk, 1e9, 64)


def test_a_budget_that_cannot_work_is_refused(found: Needs) -> None:
    for budget in (0, 1000):
        with pytest.raises(ConfigError, match=f"a budget of {budget} bytes is below .* needs at least"):
            plan(found, PC, budget, 64)
    with pytest.raises(ConfigError, match="above the 1000000 of"):
        plan(found, replace(PC, memory_bytes=10**6), 2 * 10**6 - 1, 1024)


def test_a_phone_is_modelled_and_says_so(found: Needs) -> None:
    phone = replace(PC, npu_gb_s=50.0, clusters=(Cores("big", 1, 12.0), Cores("little", 4, 3.0)))
    made = plan(found, phone, None, 64)
    assert set(made.modelled) == {"npu", "big", "little"}
    assert all("not executed here" in str(one) for one in made.modelled.values())
    assert plan(found, PC, None, 64).modelled == {}


def test_what_is_planned_is_what_the_engine_takes(tmp_path: Path) -> None:
    bundle = open_bundle(written(tmp_path / "b"))
    with EdgeModel(bundle, None, RunSettings(max_tokens=64)) as whole:
        made = plan(whole.needs, PC, int(whole.memory.total * 0.95), 64)
    with EdgeModel(bundle, made.budget_bytes, made.settings(64)) as model:
        assert model.memory.slots == made.slots
        assert sum(model.memory.fixed.values()) == made.pinned_bytes
        assert model.forward([5, 6, 7]).shape == (3, 67)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.integers(0, 40))
def test_a_hit_rate_is_a_share_and_grows_with_the_cache(frequency: list[float], n_slots: int) -> None:
    p = np.array(frequency, dtype=np.float32)
    small, large = hit_rate(p, n_slots), hit_rate(p, n_slots + 1)
    assert 0 <= small <= large + 1e-9 <= 1 + 1e-9
    assert hit_rate(p, len(p)) == 1


def test_the_hit_rate_is_that_of_a_simulated_cache() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 2.7, 300)
    last, hits, uses = np.full(300, -1), 0, 0
    for tick in range(1500):
        wanted = np.flatnonzero(rng.random(300) < p)
        held = set(np.argsort(-last, kind="stable")[:120][last[np.argsort(-last, kind="stable")[:120]] >= 0].tolist())
        if tick > 300:
            hits, uses = hits + len(held & set(wanted.tolist())), uses + len(wanted)
        last[wanted] = tick
    assert hit_rate(p.astype(np.float32), 120) == pytest.approx(hits / uses, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_slots_go_where_neurons_are_used(found: Needs, share: float) -> None:
    busy = tuple(np.full_like(one, 0.9 if layer == 1 else 0.01) for layer, one in enumerate(found.frequency))
    skewed = replace(found, frequency=busy)
    settings = RunSettings(max_tokens=64)
    least = sum(min(len(one), found.manifest.block) for one in busy)
    n_cold = sum(map(len, busy))
    fixed = sum(fixed_bytes(skewed, settings, FLOAT32).values())
    slot_bytes = divide(skewed, settings, FLOAT32, None).slot_bytes
    memory = divide(skewed, settings, FLOAT32, fixed + slot_bytes * (least + int(share * n_cold)))
    assert sum(memory.slots) == least + int(share * n_cold)
    assert memory.slots[0] == memory.slots[2] == found.manifest.block
    assert memory.slots[1] == found.manifest.block + int(share * n_cold)


def test_a_probe_measures_this_machine_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.edge.hardware.FILE_BYTES", 4 << 20)
    monkeypatch.setattr("runtime.edge.hardware.SECONDS", 0.02)
    measured = probe(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all(rate > 0 for rate in measured.disk_mb_s.values())
    assert measured.dense_gb_s > 0 and measured.gather_gb_s > 0
    (tmp_path / "pc.toml").write_text(measured.to_toml())
    assert load(tmp_path / "pc.toml") == measured


def test_a_phone_is_described_in_toml(tmp_path: Path) -> None:
    phone = replace(PC, name="phone", npu_gb_s=56.0, clusters=(Cores("big", 1, 10.0),))
    (tmp_path / "phone.toml").write_text(phone.to_toml())
    assert load(tmp_path / "phone.toml") == phone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cores = 0", "cores = 0 is not a whole number above 0"),
        ("colour = 1", '"colour" in'),
        ("dense_gb_s = -1", "dense_gb_s = -1 is not a number above 0"),
        ("dense_gb_s = 1e400", "dense_gb_s = inf is not a number above 0"),
        ('memory_bytes = "much"', "memory_bytes = 'much' is not a whole number above 0"),
        ("memory_bytes = 8e9", "memory_bytes = 8000000000.0 is not a whole number above 0"),
        ("io_threads = true", "io_threads = True is not a whole number above 0"),
        ('npu_gb_s = "fast"', "npu_gb_s = 'fast' is not a number above 0"),
        ("npu_gb_s = false", "npu_gb_s = False is not a number above 0"),
        ("is_direct = 1", "is_direct = 1 is neither true nor false"),
        ("name = 3", "name = 3 is not a text"),
        ("disk_mb_s = {}", "disk_mb_s must be a table of a rate per block size"),
        ("disk_mb_s = 100.0", "disk_mb_s must be a table of a rate per block size"),
        ('disk_mb_s = {"0" = 5}', '"0" in disk_mb_s is not a block size'),
        ('disk_mb_s = {"4k" = 5}', '"4k" in disk_mb_s is not a block size'),
        ('disk_mb_s = {"4096" = "5"}', "disk_mb_s.\"4096\" = '5' is not a number above 0"),
        ("clusters = 5", "clusters must be tables"),
        ('clusters = [{name = "big"}]', "has name, not name, count and dense_gb_s"),
        ('clusters = [{name = "big", count = 1.5, dense_gb_s = 1}]', "count = 1.5 is not a whole number"),
        ("cores = [", "cannot be read"),
    ],
)
def test_a_hardware_file_with_a_mistake_is_refused(tmp_path: Path, change: str, message: str) -> None:
    key = change.split(" = ")[0]
    text = PC.to_toml() if key != "disk_mb_s" else PC.to_toml().partition("[disk_mb_s]")[0]
    lines = [line for line in text.splitlines() if not line.startswith(f"{key} =")]
    (tmp_path / "pc.toml").write_text("\n".join([change, *lines]))
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        load(tmp_path / "pc.toml")
    assert "\n" not in str(refused.value)


def test_a_hardware_file_that_lacks_a_rate_says_which(tmp_path: Path) -> None:
    (tmp_path / "pc.toml").write_text(PC.to_toml().replace("gather_gb_s", "# gather_gb_s"))
    with pytest.raises(ConfigError, match='lacks "gather_gb_s"'):
        load(tmp_path / "pc.toml")


def test_an_interrupted_probe_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.edge.hardware.FILE_BYTES", 2 << 20)

    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.fsync", interrupt)
        probe(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".winnow-probe").write_text("of another run")
    with pytest.raises(ConfigError, match="if an earlier run left it"):
        probe(tmp_path)
    assert (tmp_path / ".winnow-probe").read_text() == "of another run"


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("4:memory:/a/b", "memory/a/memory.limit_in_bytes"),
        ("4:memory:/of/the/host", "memory/memory.limit_in_bytes"),
        ("0::/a/b", "a/b/memory.max"),
    ],
)
def test_the_memory_of_a_container_is_what_its_control_group_allows(tmp_path: Path, group: str, file: str) -> None:
    whole = memory_bytes(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:pids:/x\n{group}\n")
    assert memory_bytes(tmp_path) == whole > 5_000_000
    limit = tmp_path / "sys/fs/cgroup" / file
    limit.parent.mkdir(parents=True)
    for text, wanted in (("5000000\n", 5_000_000), ("max\n", whole), (f"{1 << 62}\n", whole)):
        limit.write_text(text)
        assert memory_bytes(tmp_path) == wanted


def test_a_folder_that_cannot_be_written_cannot_be_probed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="writable folder"):
        probe(tmp_path / "missing")
