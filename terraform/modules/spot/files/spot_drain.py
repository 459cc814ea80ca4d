#!/usr/bin/python3
"""Waits for the notice that this spot instance is taken back, or is to be replaced; then drains its shard, and lets it go.

    spot_drain.py --unit mesh-join.service --group GROUP --hook drain --region REGION [--metadata URL] [--aws COMMAND]

The metadata service is asked every 2 s. `systemctl stop` sends SIGTERM, with which a shard moves its sessions to other replicas. Only the
standard library is used, and `aws` for the last word.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request

EVERY_S = 2.0
TOKEN_S = 21600
# what AWS says when it takes the instance back; when it advises to replace it; when the group ends it (in the state Terminated)
NOTICES = ("spot/instance-action", "events/recommendations/rebalance")
TARGET = "autoscaling/target-lifecycle-state"


class Metadata:
    """The instance metadata service, by sessions (IMDSv2)."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._token = ""
        self._until = 0.0

    def get(self, path: str) -> str | None:
        """The text at `path`; None where there is none. OSError: the service does not answer."""
        if time.monotonic() > self._until:
            self._new_session()
        request = urllib.request.Request(f"{self._url}/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": self._token})
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            if error.code == 401:
                self._until = 0.0
            if error.code in (401, 404):
                return None
            raise

    def _new_session(self) -> None:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
        request = urllib.request.Request(f"{self._url}/latest/api/token", method="PUT", headers=headers)
        with urllib.request.urlopen(request, timeout=2) as answer:
            self._token = answer.read().decode()
        self._until = time.monotonic() + TOKEN_S / 2


def notice(metadata: Metadata) -> str | None:
    """Why this instance is to end; None while it may stay."""
    for path in NOTICES:
        said = metadata.get(path)
        if said:
            return f"{path}: {said}"
    return "the group ends it" if metadata.get(TARGET) == "Terminated" else None


def wait_for_notice(metadata: Metadata) -> str:
    while True:
        try:
            why = notice(metadata)
        except OSError as error:  # it is asked again: a service that is away for a moment is no notice
            print(f"the metadata service does not answer: {error}", file=sys.stderr)
            why = None
        if why:
            return why
        time.sleep(EVERY_S)


def complete(command: list[str], instance: str, args: argparse.Namespace) -> int:
    """Say that the termination may go on. Where the instance is not in that state, as after an advice, AWS refuses, and that is well."""
    words = ["autoscaling", "complete-lifecycle-action", "--region", args.region, "--auto-scaling-group-name", args.group]
    words += ["--lifecycle-hook-name", args.hook, "--instance-id", instance, "--lifecycle-action-result", "CONTINUE"]
    return subprocess.run([*command, *words], check=False, timeout=60).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--hook", required=True)
    parser.add_argument("--region", required=True)
    parser.add_argument("--metadata", default="http://169.254.169.254")
    parser.add_argument("--aws", default="aws")
    parser.add_argument("--systemctl", default="systemctl")
    args = parser.parse_args()
    metadata = Metadata(args.metadata)
    why = wait_for_notice(metadata)
    print(json.dumps({"event": "drain", "why": why}), flush=True)
    began = time.monotonic()
    stopped = subprocess.run([*shlex.split(args.systemctl), "stop", args.unit], check=False).returncode
    print(json.dumps({"event": "drained", "after_s": round(time.monotonic() - began, 2), "code": stopped}), flush=True)
    completed = complete(shlex.split(args.aws), metadata.get("instance-id") or "", args)
    print(json.dumps({"event": "completed", "code": completed}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
