"""Real hosts, a real mesh on them, and what happens to it: `make test-provision`, in the order of this file.

The clients are on this machine, which is outside for the hosts; every token is compared with what one undisturbed process answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from demo_model import smollm2_gguf
from lab import Lab, missing

from mesh import __version__

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("MESH_TEST_PROVISION"), reason="takes half an hour: make test-provision"),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

LAST_S = 6.0  # so long the load goes on after a disturbance is over


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    chosen = os.environ.get("MESH_PROVISION_FOLDER")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("provision")
    folder.mkdir(parents=True, exist_ok=True)
    model = Path(os.environ.get("MESH_PROVISION_MODEL", folder / "model"))
    if not (model / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "mesh.cli", "import", str(smollm2_gguf()), str(model)], check=True)
    made = Lab(folder, model)
    made.prepare()
    made.apply()
    for host in made.site.outputs()["addresses"]:
        made.power_on(host)  # one that an earlier run has left without
    yield made
    if not os.environ.get("MESH_PROVISION_KEEP"):
        made.destroy()
        assert not list((made.lab / "hosts").glob("*"))


def goes_on(seconds: float = LAST_S) -> None:
    """The load goes on for so long: that is what the clients do meanwhile, and no wait for anything."""
    time.sleep(seconds)  # the pace of the drill


def test_a_mesh_from_hosts_with_nothing(lab: Lab) -> None:
    assert len(lab.site.outputs()["addresses"]) == 5
    began = time.monotonic()
    lab.play("site")
    print(f"site.yml: {time.monotonic() - began:.0f} s")
    lab.until_whole()
    assert {lease["kernels"] for lease in lab.status()["shards"]} <= {
        "amx",
        "avx512bf16",
        "avx512vnni",
        "avx512",
        "avx2",
        "neon",
        "portable",
    }  # the wheel has them


def test_a_second_run_changes_nothing(lab: Lab) -> None:
    assert {host: counts["changed"] for host, counts in lab.play("site").items() if counts["changed"]} == {}
    assert {host: counts["changed"] for host, counts in lab.play("site", "--check").items() if counts["changed"]} == {}


def test_tokens_over_https_and_over_nats_from_outside(lab: Lab) -> None:
    expected = json.loads(lab.expected().read_text())[0]
    words = ["--tokens", ",".join(map(str, expected["tokens"])), "--max-tokens", "20", "--ignore-eos", "--json"]
    done = lab.outside("client", "generate", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == expected["answer"][:20]
    refused = lab.outside("client", "drain", "shard-1")
    assert refused.returncode == 2  # a client may not

    key = str(lab.secrets / "tokens.key")
    token = lab.mesh("token", "issue", "--subject", "test", "--expiry", "60s", "--algorithm", "EdDSA", "--private-key-file", key).strip()
    gateway = f"https://{lab.address('control-3')}/api/v1/inference"
    body = json.dumps({"prompt": "What is rain?", "max_tokens": 5, "temperature": 0})
    curl = ["ip", "netns", "exec", "mesh-lab", "curl", "-sS", "--cacert", str(lab.secrets / "pki" / "ca.crt")]
    curl += ["-H", "Content-Type: application/json", "-d", body, "-w", "\n%{http_code}"]
    answer, code = subprocess.run(
        [*curl, "-H", f"Authorization: Bearer {token}", gateway], capture_output=True, text=True, check=True
    ).stdout.rsplit("\n", 1)
    assert code == "200" and json.loads(answer)["usage"]["completion_tokens"] == 5
    assert subprocess.run([*curl, gateway], capture_output=True, text=True, check=True).stdout.endswith("401")


def test_the_units_are_hardened_and_the_firewall_is_closed(lab: Lab) -> None:
    for host, unit in (("control-1", "mesh-coordinator"), ("control-1", "mesh-nats"), ("node-1", "mesh-shard@1")):
        found = lab.on(host, f"systemd-analyze security --no-pager {unit}.service | tail -n 1")
        print(unit, found.split("→")[-1].strip())
        assert float(found.rsplit(": ", 1)[1].split()[0]) < 3.0
    open_ports = [port for port in (8101, 9201, 4222, 22) if _reaches(lab, "node-1", port)]
    assert open_ports == [22]
    assert [port for port in (4222, 6222, 8080, 8222, 9091) if _reaches(lab, "control-1", port)] == [4222, 8080]


def _reaches(lab: Lab, host: str, port: int) -> bool:
    command = ["ip", "netns", "exec", "mesh-lab", "nc", "-z", "-w", "1", lab.address(host), str(port)]
    return subprocess.run(command, check=False).returncode == 0


def test_a_power_cut_of_a_host_with_shards(lab: Lab) -> None:
    with lab.load("power cut of a host with three shards") as outcome:
        goes_on(2)
        lab.cut_power("node-1")
        goes_on()
    outcome.require_nothing_lost()
    lab.power_on("node-1")
    print(f"whole again {lab.until_whole():.1f} s after the host answered")


def test_a_reboot(lab: Lab) -> None:
    before = lab.on("node-2", "cat /proc/sys/kernel/random/boot_id")
    with lab.load("reboot of a host with three shards") as outcome:
        goes_on(2)
        lab.on("node-2", "systemctl reboot", check=False)
        goes_on(12)
    outcome.require_nothing_lost()
    lab.until_whole()
    assert lab.on("node-2", "cat /proc/sys/kernel/random/boot_id") != before


def test_a_partition_both_ways(lab: Lab) -> None:
    with lab.load("a host with three shards cut off, both ways") as outcome:
        goes_on(2)
        lab.link("node-1", "down")
        goes_on(10)
        lab.link("node-1", "up")
        goes_on()
    outcome.require_nothing_lost()
    lab.until_whole()


@pytest.mark.parametrize(("hook", "what"), [("output", "a host is not heard"), ("input", "a host hears nothing")])
def test_a_partition_one_way(lab: Lab, hook: str, what: str) -> None:
    with lab.load(what) as outcome:
        goes_on(2)
        with lab.mute("node-2", hook):
            goes_on(10)
        goes_on()
    outcome.require_nothing_lost()
    lab.until_whole()


def test_the_loss_of_a_nats_server(lab: Lab) -> None:
    with lab.load("power cut of a NATS server and the gateway") as outcome:
        goes_on(2)
        lab.cut_power("control-3")
        goes_on(10)
    outcome.require_nothing_lost()
    lab.power_on("control-3")
    lab.until_whole()


def test_the_loss_of_a_nats_server_with_a_coordinator(lab: Lab) -> None:
    with lab.load("power cut of a NATS server and a coordinator") as outcome:
        goes_on(2)
        lab.cut_power("control-2")
        goes_on(10)
    outcome.require_nothing_lost()
    lab.power_on("control-2")
    lab.until_whole()


def test_new_certificates_and_a_new_authority(lab: Lab) -> None:
    with lab.load("new certificates and a new authority, in three steps") as outcome:
        lab.play("rotate_certificates", "-e", "mesh_rotate=ca")
        lab.play("rotate_certificates")
        lab.play("rotate_certificates", "-e", "mesh_rotate=finish")
        goes_on(2)
    outcome.require_nothing_lost()
    lab.until_whole()


def test_a_shard_is_added_and_removed(lab: Lab) -> None:
    plan = json.loads((lab.site.path / "placement.auto.tfvars.json").read_text())["placement"]
    extra = {**plan["shards"][0], "shard_id": 7, "node": "node-3"}
    with lab.load("a host and a shard more, and away again") as outcome:
        assert "1 added" in lab.apply(extra_shards=[extra])
        lab.play("site")
        lab.until_whole(7)
        goes_on()
        frames = _frames(lab, "shard-7")
        lab.play("remove_shard", "-e", "mesh_shard=7")
        lab.until_whole(6)
    outcome.require_nothing_lost()
    assert frames > 0  # it took its part of the load
    assert "1 destroyed" in lab.apply()
    lab.play("site")


def _frames(lab: Lab, shard: str) -> int:
    """How many frames the shard has computed, as it says itself."""
    said = {each["shard"]: each for each in json.loads(lab.outside("operator", "status", "--json").stdout)["shards"]}
    url = said[shard]["http"] + "/api/v1/stats"
    return int(
        json.loads(lab.on("node-3", f"python3 -c 'import urllib.request as u; print(u.urlopen(\"{url}\").read().decode())'"))["frames_in"]
    )


def test_every_process_starts_again_one_after_the_other(lab: Lab) -> None:
    before = _instances(lab)
    with lab.load("restart of every process, one after the other") as outcome:
        lab.play("restart")
        goes_on(2)
    outcome.require_nothing_lost()
    after = _instances(lab)
    assert before.keys() == after.keys() and not set(before.items()) & set(after.items())


def _instances(lab: Lab) -> dict[str, str]:
    """Which process it is that serves as each shard and coordinator, and each NATS server."""
    found = lab.status()
    servers = {
        host: lab.on(host, "systemctl show --value -p MainPID mesh-nats").strip() for host in ("control-1", "control-2", "control-3")
    }
    shards = {lease["shard"]: lease["instance"] for lease in found["shards"]}
    return servers | shards | {each["coordinator"]: each["instance"] for each in found["coordinators"]}


def test_an_upgrade_of_everything(lab: Lab) -> None:
    current = lab.on("node-1", "readlink /opt/mesh/current").strip().removeprefix("releases/")
    following = f"{current}.post1"
    if not list(lab.wheels.glob(f"stagemesh-{following}-*.whl")):
        _wheel(lab, following)
    with lab.load(f"rolling upgrade of every process, {current} to {following}") as outcome:
        lab.play("upgrade", "-e", f"mesh_version={following}", "-e", "mesh_again=true")
        goes_on(2)
    outcome.require_nothing_lost()
    assert {lease["version"] for lease in lab.status()["shards"]} == {following}


def test_going_back_to_the_version_before(lab: Lab) -> None:
    lab.play("upgrade")
    assert {lease["version"] for lease in lab.status()["shards"]} == {__version__}
    assert not any(counts["changed"] for counts in lab.play("site").values())


def _wheel(lab: Lab, version: str) -> None:
    """The wheel that the hosts have, as another version. Nothing is compiled, so it has the same kernels. pip does not mind a file whose
    hash in RECORD is another one."""
    (built,) = lab.wheels.glob(f"stagemesh-{__version__}-*.whl")
    says = ('__version__ = "{}"', "\nVersion: {}\n", "stagemesh-{}.dist-info")
    with ZipFile(built) as old, ZipFile(lab.wheels / built.name.replace(__version__, version, 1), "w", ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "mesh/__init__.py" or ".dist-info/" in name:
                for text in says:
                    content = content.replace(text.format(__version__).encode(), text.format(version).encode())
            new.writestr(name.replace(says[2].format(__version__), says[2].format(version)), content)
    subprocess.run("sha256sum -- *.whl > SHA256SUMS", shell=True, cwd=lab.wheels, check=True)


def test_jetstream_is_lost_and_brought_back(lab: Lab, tmp_path: Path) -> None:
    requests = tmp_path / "batch.jsonl"
    requests.write_text("".join(json.dumps({"prompt": f"What is {word}?", "max_tokens": 8}) + "\n" for word in ("rain", "snow", "wind")))
    number = f"kept-{os.getpid()}"
    submitted = lab.outside("client", "batch", "submit", str(requests), "--wait", "--id", number)
    assert submitted.returncode == 0, submitted.stderr
    before = lab.outside("client", "batch", "result", number).stdout
    assert before.count("\n") >= 3
    backup = tmp_path / "backup"
    lab.play("backup", "-e", f"mesh_backup={backup}")
    with lab.load("all JetStream data lost, and restored") as outcome:
        for host in ("control-1", "control-2", "control-3"):
            lab.on(host, "systemctl kill --signal=KILL mesh-nats.service; systemctl stop mesh-nats.service; rm -rf /var/lib/mesh-nats/*")
        for host in ("control-1", "control-2", "control-3"):
            lab.on(host, "systemctl start mesh-nats.service")
        lab.play("restore", "-e", f"mesh_backup={backup}.tar")
        goes_on()
    outcome.require_nothing_lost()
    lab.until_whole()
    assert lab.outside("client", "batch", "result", number).stdout == before
