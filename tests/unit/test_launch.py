"""What starts runs elsewhere: scripts without findings, a manifest of the right form, images of what exists."""

import re

import yaml

from tests.helpers.paths import ROOT


def test_the_manifest_is_a_jobset_of_one_pod_per_host():
    manifest = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    topology = [
        int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    ]
    assert (
        spec["parallelism"]
        == spec["completions"]
        == topology[0] * topology[1] * topology[2] // chips
    )
    # A lost pod fails the job, and the set restarts together.
    assert pod["restartPolicy"] == "Never"
    assert spec["backoffLimit"] == 0
    assert {"name": "IDGRPO_DISTRIBUTED", "value": "auto"} in container["env"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert (ROOT / container["command"][2]).is_file()


def test_images_hold_what_exists():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()), line
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert stages == ["base", "cuda", "tpu"]
    assert all(f"'.[{stage}]'" in text for stage in stages[1:])
