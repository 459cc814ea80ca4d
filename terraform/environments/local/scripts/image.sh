#!/bin/bash
# image.sh FOLDER: makes FOLDER/root, a Debian root with systemd and sshd, and FOLDER/apt, a repository of the packages that the
# playbooks install, so that the hosts need no network. Both stay if they are there already.
set -euo pipefail
FOLDER=${1:?a folder for the image}
SUITE=${SUITE:-bookworm}
BASE=systemd-sysv,dbus,openssh-server,python3,python3-apt,ca-certificates,iproute2,procps,sudo,udev,kmod,less
LATER=(python3-venv nginx-light nftables chrony prometheus prometheus-node-exporter)

[ -f "$FOLDER/root/.complete" ] && exit 0
for tool in mmdebstrap dpkg-scanpackages; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install mmdebstrap dpkg-dev" >&2; exit 2; }
done
mkdir -p "$FOLDER"
FOLDER=$(realpath "$FOLDER")
rm -rf "$FOLDER/root" "$FOLDER/apt"
mkdir -p "$FOLDER/apt"
# mmdebstrap gives its hooks the configuration of apt for the new root: packages are fetched as those of the root were
export LATER_PACKAGES="${LATER[*]}" DEBS="$FOLDER/apt"
mmdebstrap --quiet --variant=minbase --include="$BASE" \
  --aptopt='APT::Install-Recommends "false"' \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook='APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get --quiet --yes --download-only install $LATER_PACKAGES' \
  --customize-hook='cp "$1"/var/cache/apt/archives/*.deb "$DEBS"' \
  "$SUITE" "$FOLDER/root"
(cd "$FOLDER/apt" && dpkg-scanpackages --multiversion . > Packages 2>/dev/null)
: > "$FOLDER/root/etc/apt/sources.list"
rm -f "$FOLDER/root/etc/apt/sources.list.d/"* "$FOLDER/root/etc/ssh/ssh_host_"* "$FOLDER/root/etc/machine-id"
echo uninitialized > "$FOLDER/root/etc/machine-id"
touch "$FOLDER/root/.complete"
du -sh "$FOLDER/root" "$FOLDER/apt" >&2
