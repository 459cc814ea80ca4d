"""Real hosts from terraform/environments/local with a mesh on them from ansible/, for the tests of `make test-provision`.

What takes long to make (the image, the wheels, the model) is kept in $MESH_PROVISION_FOLDER, and so are the hosts with
$MESH_PROVISION_KEEP: the next run then begins with them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ansible_tools import ANSIBLE, TOOLS
from places import ROOT
from terraform_tools import Environment
from unconnected import unconnected

__all__ = ["Lab", "Outcome"]

NETWORK = "mesh-lab"
PROMPTS = [[5, 17, 33, 90, 12], [90, 4, 4, 8], list(range(30, 70))]
TOKENS = 120


@dataclass
class Outcome:
    """What the clients saw while something was done to the mesh. `pause_s`: the longest gap that began or ended after it."""

    pause_s: float
    usual_s: float
    report: dict[str, Any]

    def require_nothing_lost(self) -> None:
        report = self.report
        assert not report["failed"], report["failed"][:3]
        assert (report["lost"], report["repeated"], report["wrong"]) == (0, 0, 0), report
        assert report["generations"] > 0


@dataclass
class Lab:
    folder: Path
    model: Path
    python: str = sys.executable
    rows: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.site = Environment(self.folder, "local")
        self.lab = self.folder / "lab"
        self.wheels = self.folder / "wheels"
        self.key = self.folder / "id"
        self.inventory = self.site.path / "inventory.yml"
        self.secrets = self.site.path / "secrets"

    # -- making ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        if not (self.wheels / "SHA256SUMS").exists():
            subprocess.run([ROOT / "deploy" / "provision" / "wheelhouse.sh", self.wheels, self.python], check=True)
        if not self.key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        self.mesh("plan", str(self.model), "--shards", "3", "--replicas", "2", "--nodes", "2x4GB", "--rows", "4", "--context", "1024",
                  "--terraform", str(self.site.path / "placement.auto.tfvars.json"))  # fmt: skip
        self.site.init()

    def apply(self, **values: Any) -> str:
        self.site.variables(
            ssh_public_key_file=f"{self.key}.pub",
            folder=str(self.lab),
            wheelhouse=str(self.wheels),
            model=str(self.model),
            network=NETWORK,
            vars={"mesh_worker_threads": "1", "coordinator_failover_timeout": "120s"},  # all hosts share the cores of this machine
            **values,
        )
        said = self.site.run("apply", "-auto-approve", "-input=false").stdout
        self.inventory.write_text(self.site.run("output", "-raw", "inventory").stdout)
        return said

    def destroy(self) -> None:
        self.site.run("destroy", "-auto-approve", "-input=false")

    def mesh(self, *words: str) -> str:
        done = subprocess.run([self.python, "-m", "mesh.cli", *words], capture_output=True, text=True, check=True)
        return done.stdout

    def play(self, playbook: str, *words: str, timeout_s: float = 1800) -> dict[str, dict[str, int]]:
        """Run a playbook; the counts of each host."""
        for socket in (Path.home() / ".ansible" / "cp").glob("*"):
            socket.unlink(missing_ok=True)  # connections to hosts that were another's
        command = [str(TOOLS / "ansible-playbook"), "-i", str(self.inventory), "--private-key", str(self.key), f"playbooks/{playbook}.yml"]
        environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"}
        mesh = f"mesh_command={Path(self.python).parent / 'mesh'}"
        log = self.folder / f"{playbook}.log"
        with log.open("w") as said:  # as it goes, so that one can look
            done = subprocess.run(
                [*command, "-e", mesh, *words], cwd=ROOT / "ansible", env=environment, stdout=said, stderr=said, timeout=timeout_s
            )
        text = log.read_text()
        assert done.returncode == 0, f"{playbook}: {text[-5000:]}"
        recap = text.partition("PLAY RECAP")[2].splitlines()[1:]
        counts = {}
        for line in recap:
            if ":" in line:
                host, _, rest = line.partition(":")
                counts[host.strip()] = {key: int(value) for key, value in (pair.split("=") for pair in rest.split())}
        return counts

    # -- hosts -------------------------------------------------------------------------------------------------------

    def address(self, host: str) -> str:
        return str(self.site.outputs()["addresses"][host])

    def on(self, host: str, command: str, *, check: bool = True, timeout_s: float = 120) -> str:
        options = [
            "-o",
            f"UserKnownHostsFile={self.lab}/known_hosts",
            "-o",
            f"ProxyCommand=ip netns exec {NETWORK} nc %h %p",
            "-o",
            "ConnectTimeout=5",
        ]
        done = subprocess.run(
            ["ssh", "-i", self.key, *options, f"admin@{self.address(host)}", f"sudo sh -c {json.dumps(command)}"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{host}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def hosts(self, *words: str) -> None:
        environment = {**os.environ, "LAB": str(self.lab), "NET": NETWORK, "SSH_KEY": Path(f"{self.key}.pub").read_text().strip()}
        environment["SHARED"] = f"{self.lab}/apt:/srv/mesh/apt,{self.wheels}:/srv/mesh/wheels,{self.model}:/srv/mesh/model"
        subprocess.run([self.site.path / "scripts" / "hosts.sh", *words], env=environment, check=True, stdout=subprocess.DEVNULL)

    def cut_power(self, host: str) -> None:
        self.hosts("cut", host)

    def power_on(self, host: str) -> None:
        self.hosts("start", host, self.address(host))

    def link(self, host: str, state: str) -> None:
        subprocess.run(["ip", "-n", f"{NETWORK}-{host}", "link", "set", "host0", state], check=True)

    @contextmanager
    def mute(self, host: str, hook: str) -> Iterator[None]:
        """The host's packets of one way are dropped: `output`, it is not heard; `input`, it hears nothing."""
        inside = ["ip", "netns", "exec", f"{NETWORK}-{host}", "nft"]
        loopback = "oifname lo accept" if hook == "output" else "iifname lo accept"
        rules = f"table inet drill {{ chain cut {{ type filter hook {hook} priority -300; policy drop; {loopback}; }} ; }}"
        subprocess.run([*inside, rules], check=True)
        try:
            yield
        finally:
            subprocess.run([*inside, "delete", "table", "inet", "drill"], check=True)

    # -- the mesh ----------------------------------------------------------------------------------------------------

    def environment(self, role: str) -> dict[str, str]:
        pki, users = self.secrets / "pki", self.secrets / "users"
        addresses = self.site.outputs()["addresses"]
        return {
            **unconnected(),
            "MESH_NATS_URLS": ",".join(f"tls://{addresses[f'control-{number}']}:4222" for number in (1, 2, 3)),
            "MESH_NATS_TLS_CA_FILE": str(pki / "ca.crt"),
            "MESH_NATS_TLS_CERT_FILE": str(pki / f"{role}.crt"),
            "MESH_NATS_TLS_KEY_FILE": str(pki / f"{role}.key"),
            "MESH_NATS_NKEY_SEED_FILE": str(users / f"{role}.nk"),
            "MESH_NATS_INBOX_PREFIX": f"_INBOX.{role}",
        }

    def outside(self, role: str, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """A command of mesh on this machine, which is outside for the hosts, as a user of that role."""
        command = ["ip", "netns", "exec", NETWORK, self.python, "-m", "mesh.cli", *words]
        return subprocess.run(command, env=self.environment(role), capture_output=True, text=True, timeout=timeout_s)

    def status(self) -> dict[str, Any]:
        done = self.outside("monitor", "status", "--json")
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        return found

    def until_whole(self, shards: int = 6, *, within_s: float = 180) -> float:
        """Seconds until so many shards are ready and a token can be generated. Its processes are on other hosts, so they are asked."""
        began = time.monotonic()
        while True:
            found = self.status()
            ready = [lease["shard"] for lease in found.get("shards", []) if lease["state"] == "ready"]
            if found.get("ready") and len(ready) == shards and len(found["coordinators"]) == 2:
                return time.monotonic() - began
            assert time.monotonic() - began < within_s, f"{len(ready)} of {shards} shards are ready: {found.get('reason')}"
            time.sleep(0.5)  # the processes are on other hosts: nothing here is told

    def expected(self) -> Path:
        """The prompts and what one process answers, undisturbed."""
        file = self.folder / "expected.json"
        if not file.exists():
            answers = []
            for prompt in PROMPTS:
                text = self.mesh(
                    "run", str(self.model), "--tokens", ",".join(map(str, prompt)), "--max-tokens", str(TOKENS), "--ignore-eos", "--json"
                )
                answers.append({"tokens": prompt, "answer": json.loads(text)["tokens"]})
            file.write_text(json.dumps(answers))
        return file

    @contextmanager
    def load(self, what: str) -> Iterator[Outcome]:
        """Clients outside generate while the block runs; afterwards the outcome says what they saw, and a row of the table is kept."""
        manifest = json.loads((self.model / "manifest.json").read_text())
        command = [
            "ip",
            "netns",
            "exec",
            NETWORK,
            self.python,
            str(ROOT / "tests" / "tools" / "outside_load.py"),
            str(self.expected()),
            manifest["name"],
        ]
        process = subprocess.Popen(command, env=self.environment("client"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None and process.stdout is not None
        outcome = Outcome(0.0, 0.0, {})
        try:
            assert process.stdout.readline().strip() == "started"
            began = time.time()
            yield outcome
            outcome.report = _ended(process.stdin, process.stdout)
        finally:
            process.kill()
            process.communicate()  # which closes its pipes
        gaps = [(at, length) for at, length in outcome.report["gaps"] if at + length > began]
        outcome.pause_s = max((length for _, length in gaps), default=0.0)
        report = outcome.report
        counts = [report[name] for name in ("generations", "tokens", "lost", "repeated", "wrong")]
        row = f"| {what} | {outcome.pause_s:.2f} | {' | '.join(map(str, counts))} | {len(report['failed'])} |"
        self.rows.append(row)
        print(row, flush=True)
        with (self.folder / "drills.md").open("a") as table:
            table.write(row + "\n")


def _ended(into: IO[str], out: IO[str]) -> dict[str, Any]:
    into.write("end\n")
    into.flush()
    report: dict[str, Any] = json.loads(out.readline())
    return report


def missing() -> str | None:
    """What the hosts of the lab lack on this machine; None where nothing does."""
    if os.geteuid() != 0:
        return "only root may start hosts"
    needed = ("terraform", "systemd-nspawn", "mmdebstrap", "dpkg-scanpackages", "ip", "nft", "ssh", "nc", "openssl")
    absent = [tool for tool in needed if shutil.which(tool) is None]
    if ANSIBLE is None:
        absent.append("ansible-playbook (make provision-tools)")
    return f"{', '.join(absent)}: not installed" if absent else None
