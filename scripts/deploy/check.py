#!/usr/bin/env python3
"""Renders the chart with Helm's own library and checks all of deploy/ with the tools of its trade.

    check.py DUET          DUET: the `duet` program

Each manifest is validated strictly for every Kubernetes minor release that the chart says it runs on;
a JobSet against the types that Kubeflow generates from its CRD, and each Job inside as a batch/v1 Job.
What a ConfigMap and the containers' environment make together goes through `duet config`.
`make deploy-check` installs what this imports.
"""

import copy
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import helm_python
import kubernetes_validate
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "duet"
RELEASES = [f"1.{minor}" for minor in range(30, 38)]
TOOLS = pathlib.Path(sys.executable).parent
DIGEST = "@sha256:" + "0" * 64
# What nobody should have to switch off: package versions of a base image that is named by digest.
HADOLINT_IGNORED = ["DL3008"]

failures = []


def check(what, good, why=""):
    print(f"{'ok  ' if good else 'FAIL'} {what}{'' if good else f': {why}'}")
    if not good:
        failures.append(what)


def merged(base, over):
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def settings():
    """Values to render with: name -> values."""
    plain = {
        "config": (ROOT / "configs" / "qwen-image-64gpu.toml").read_text(),
        "images": {"coordinator": f"registry/duet-coordinator{DIGEST}", "gpu": f"registry/duet-gpu{DIGEST}"},
        "store": {"url": "s3://bucket/run"},
        "network": {"trusted": True},
    }
    everything = merged(plain, {
        "config": (ROOT / "configs" / "qwen-image-8gpu.toml").read_text(),
        "set": {"rollout.lag": "1", "run.name": "another"},
        "images": {"pullSecrets": ["registry"]},
        "store": {"secretName": "store"},
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "mounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
        "scorer": {"url": "http://judge:8200/score"},
        "tls": {"secretPrefix": "duet-tls"},
        "network": {"trusted": False, "monitoring": {"namespaceSelector": {}}},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/duet"}},
        "kueue": {"queue": "research", "priorityClass": "low", "topology": "example.com/rack"},
        "coordinator": {"nodeSelector": {"pool": "cpu"}, "priorityClassName": "high"},
        "trainer": {"replicas": 2, "disruptionBudget": True},
        "rollout": {"replicas": 6},
    })
    folder = merged(plain, {"store": {"url": "/shared/run"}, "network": {"policy": False},
                            "serviceAccount": {"create": False}, "coordinator": {"disruptionBudget": False}})
    return {"plain": plain, "everything": everything, "folder": folder}


def dropped(given, kept, path=""):
    """Keys of `given` that a round trip through typed models lost."""
    if isinstance(given, dict):
        lost = []
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                lost += [f"{path}/{key}"] if value not in (None, {}, []) else []
            else:
                lost += dropped(value, kept[key], f"{path}/{key}")
        return lost
    if isinstance(given, list):
        return [lost for i, (a, b) in enumerate(zip(given, kept)) for lost in dropped(a, b, f"{path}/{i}")]
    return []


def validated(name, document):
    for release in RELEASES:
        try:
            kubernetes_validate.validate(document, release, strict=True)
        except Exception as error:
            return check(f"{name} for Kubernetes {release}", False, str(error).splitlines()[0])
    check(f"{name} for Kubernetes {RELEASES[0]} to {RELEASES[-1]}", True)


def jobset(name, document, duet, config):
    try:
        typed = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document)).to_dict()
        check(f"{name}: JobSet's types", not (lost := dropped(document, typed)), f"no such field: {lost}")
    except Exception as error:
        check(f"{name}: JobSet's types", False, str(error))
    environments = []
    for role in document["spec"]["replicatedJobs"]:
        metadata = merged(role["template"].get("metadata", {}), {"name": role["name"]})
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": role["template"]["spec"]}
        validated(f"{name}: Job {role['name']}", job)
        container = job["spec"]["template"]["spec"]["containers"][0]
        environments.append({item["name"]: item["value"] for item in container["env"]})
    check(f"{name}: all processes have one configuration", all(e == environments[0] for e in environments))
    answer = subprocess.run([duet, "config", "/dev/stdin"], input=config, env=environments[0],
                            capture_output=True, text=True, timeout=60)
    check(f"{name}: `duet config` takes it", answer.returncode == 0, answer.stderr)
    ranks = document["spec"]["replicatedJobs"][1]["template"]["spec"]["completions"]
    check(f"{name}: as many ranks as trainer pods", f"world_size = {ranks}\n" in answer.stdout)


def rendered(name, values, duet):
    report = helm_python.lint(str(CHART), values, strict=True)
    bad = [message for message in report["messages"] if message["severity"] >= 2]
    check(f"{name}: helm lint", not bad and not report["errors"], f"{bad} {report['errors']}")
    chart = helm_python.Chart.load(str(CHART))
    chart.validate_schema(values)
    texts = chart.render(values, name="a", namespace="research")
    documents = [d for path, text in texts.items() if path.endswith(".yaml") for d in yaml.safe_load_all(text) if d]
    config = next(d for d in documents if d["kind"] == "ConfigMap")["data"]["run.toml"]
    for document in documents:
        if document["kind"] == "JobSet":
            jobset(name, document, duet, config)
        else:
            validated(f"{name}: {document['kind']} {document['metadata']['name']}", document)


def refused(name, values, because):
    try:
        chart = helm_python.Chart.load(str(CHART))
        chart.validate_schema(values)
        chart.render(values, name="a", namespace="research")
    except Exception as error:
        return check(f"refused: {name}", because in str(error), str(error))
    check(f"refused: {name}", False, "it was rendered")


def tool(name, command):
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    check(name, answer.returncode == 0, answer.stdout + answer.stderr)


def scripts():
    shell = ["deploy/images/duet-node", "deploy/images/build.sh", "deploy/slurm/task.sh", "deploy/slurm/duet.sbatch",
             "scripts/deploy/slurm_test.sh"]
    tool("shellcheck", [TOOLS / "shellcheck", *(ROOT / path for path in shell)])
    ignored = [part for rule in HADOLINT_IGNORED for part in ("--ignore", rule)]
    tool("hadolint", [TOOLS / "hadolint", *ignored, *sorted((ROOT / "deploy" / "images").glob("*.Dockerfile"))])


def units():
    """The units as they are, with a program that is there."""
    if not shutil.which("systemd-analyze"):
        print("skip systemd-analyze: not on this machine")
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "deploy" / "systemd", folder, dirs_exist_ok=True)
        names = []
        for path in sorted(pathlib.Path(folder).glob("*.*")):
            if path.is_file():
                path.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", path.read_text()))
                names.append(path.name.replace("@.", "@0."))
        answer = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True,
                                env=dict(os.environ, SYSTEMD_UNIT_PATH=f"{folder}:"), timeout=120)
        said = answer.stdout + answer.stderr
        check("systemd-analyze verify", answer.returncode == 0 and not said, said)


def main():
    duet = str(pathlib.Path(sys.argv[1]).resolve())
    every = settings()
    for name, values in every.items():
        rendered(name, values, duet)
    plain = every["plain"]
    refused("no configuration", merged(plain, {"config": ""}), "configs/qwen-image-64gpu.toml")
    refused("an image by tag", merged(plain, {"images": {"gpu": "duet:latest"}}), "gpu")
    refused("no store", merged(plain, {"store": {"url": ""}}), "store.url")
    refused("credentials in the store's address", merged(plain, {"store": {"url": "s3://key@bucket/a"}}), "url")
    refused("plaintext by default", merged(plain, {"network": {"trusted": False}}), "tls.secretPrefix")
    refused("no trainers", merged(plain, {"trainer": {"replicas": 0}}), "replicas")
    refused("a misspelt value", merged(plain, {"trainer": {"replica": 2}}), "replica")
    refused("a number where text is needed", merged(plain, {"set": {"coordinator.step_ms": 3600000}}), "step_ms")
    scripts()
    units()
    if failures:
        print(f"{len(failures)} checks failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
