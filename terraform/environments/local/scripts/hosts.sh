#!/bin/bash
# hosts.sh ACTION ...: hosts with systemd, sshd and addresses of their own on one Linux machine, as containers of systemd-nspawn.
#
#   fabric up|down              the network that they are on: a bridge in a network namespace of its own
#   start NAME ADDRESS          make the host if it is new, start it, and wait until its sshd answers
#   cut NAME                    cut its power: every process ends at once, and its disk stays
#   remove NAME                 cut its power, and remove its disk
#   console NAME                what its systemd said
#
# From the environment: LAB (folder of the hosts), NET (namespace of the network), GATEWAY (address of this machine there, with the
# length of the prefix), SSH_KEY (public key of the user `admin`), SHARED (folders that hosts see read-only: HERE:THERE,...).
set -euo pipefail
LAB=${LAB:?a folder for the hosts}
NET=${NET:-mesh-lab}
PREFIX=${GATEWAY:-10.77.0.1/24}
PREFIX=${PREFIX#*/}

die() { echo "hosts.sh: $*" >&2; exit 2; }
namespace() { echo "$NET-$1"; }
exists() { ip netns list | grep -qw -- "$1"; }
has_systemd() { [ -d /run/systemd/system ]; }

# The control groups of a host. Version 2 has one tree, version 1 one for each controller.
groups_of() {
  local tree
  if [ -f /sys/fs/cgroup/cgroup.controllers ]; then echo "/sys/fs/cgroup/$NET-$1"; return; fi
  for tree in systemd unified memory pids cpu freezer; do
    if [ -d "/sys/fs/cgroup/$tree" ]; then echo "/sys/fs/cgroup/$tree/$NET-$1"; fi
  done
}

processes_of() {
  local group
  for group in $(groups_of "$1"); do
    case $group in */freezer/*|/sys/fs/cgroup/"$NET"-*) find "$group" -name cgroup.procs -exec cat {} + 2>/dev/null || : ;; esac
  done | sort -u
}

running() {
  if has_systemd; then systemctl is-active --quiet "$NET-$1.service"; else [ -n "$(processes_of "$1")" ]; fi
}

fabric() {
  case ${1:?up or down} in
    up)
      mkdir -p "$LAB"
      exists "$NET" && return
      ip netns add "$NET"
      ip -n "$NET" link add br0 type bridge
      ip -n "$NET" addr add "${GATEWAY:-10.77.0.1/24}" dev br0
      ip -n "$NET" link set br0 up
      ip -n "$NET" link set lo up ;;
    down) if exists "$NET"; then ip netns del "$NET"; fi ;;
  esac
}

disk() {
  local name=$1 at=$LAB/hosts/$1
  mkdir -p "$at"/{changes,work,root}
  mountpoint -q "$at/root" || mount -t overlay overlay -o "lowerdir=$LAB/root,upperdir=$at/changes,workdir=$at/work" "$at/root"
  [ -f "$at/made" ] && return
  echo "$name" > "$at/root/etc/hostname"
  printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$name" > "$at/root/etc/hosts"
  chroot "$at/root" useradd --create-home --shell /bin/bash admin
  echo 'admin ALL=(ALL) NOPASSWD: ALL' > "$at/root/etc/sudoers.d/admin"
  chmod 0440 "$at/root/etc/sudoers.d/admin"
  install -d -m 0700 "$at/root/home/admin/.ssh"
  echo "${SSH_KEY:?the public key of the user admin}" > "$at/root/home/admin/.ssh/authorized_keys"
  chroot "$at/root" chown -R admin:admin /home/admin/.ssh
  rm -f "$at/root/etc/ssh/ssh_host_"*
  ssh-keygen -q -t ed25519 -N '' -C "$name" -f "$at/root/etc/ssh/ssh_host_ed25519_key"
  touch "$at/made"
}

cable() {
  local name=$1 address=$2 space line
  space=$(namespace "$name")
  line=v-$(echo -n "$name" | cksum | cut -d' ' -f1)
  exists "$space" && return
  ip netns add "$space"
  ip -n "$NET" link add "${line:0:15}" type veth peer name host0 netns "$space"
  ip -n "$NET" link set "${line:0:15}" master br0 up
  ip -n "$space" addr add "$address/$PREFIX" dev host0
  ip -n "$space" link set host0 up
  ip -n "$space" link set lo up
}

boot() {
  local name=$1 at=$LAB/hosts/$1 bind group
  local command=(systemd-nspawn --quiet --keep-unit --register=no "--machine=$name" -D "$at/root"
    "--network-namespace-path=/run/netns/$(namespace "$name")" --resolv-conf=off --capability=CAP_NET_ADMIN --console=read-only --boot)
  for bind in ${SHARED//,/ }; do command+=("--bind-ro=$bind"); done
  if has_systemd; then
    systemd-run --quiet --collect "--unit=$NET-$name" --property=Delegate=yes --property=RestartForceExitStatus=133 \
      --property=SuccessExitStatus=133 "${command[@]}" > "$at/console" 2>&1
    return
  fi
  for group in $(groups_of "$name"); do mkdir -p "$group"; done
  # the shell joins the groups, and the host with it; with 133 a host asks to be started again
  setsid bash -c 'for group in $1; do echo $$ > "$group/cgroup.procs"; done; shift; while "$@"; test $? = 133; do :; done' boot \
    "$(groups_of "$name")" "${command[@]}" < /dev/null > "$at/console" 2>&1 &
  disown
}

answers() {
  local address=$1
  for _ in $(seq 300); do
    ip netns exec "$NET" timeout 1 bash -c "exec 3<>/dev/tcp/$address/22 && head -c 3 <&3 | grep -q SSH" 2>/dev/null && return
    sleep 0.1
  done
  return 1
}

note_key() {
  local address=$1 key
  key=$(cut -d' ' -f1,2 "$LAB/hosts/$2/root/etc/ssh/ssh_host_ed25519_key.pub")
  ( flock 9
    touch "$LAB/known_hosts"
    grep -v "^$address " "$LAB/known_hosts" > "$LAB/known_hosts.new" || :
    echo "$address $key" >> "$LAB/known_hosts.new"
    mv "$LAB/known_hosts.new" "$LAB/known_hosts" ) 9> "$LAB/known_hosts.lock"
}

start() {
  local name=${1:?a name} address=${2:?an address}
  [ -f "$LAB/root/.complete" ] || die "$LAB/root is no image: make it with image.sh $LAB"
  if ! running "$name"; then
    disk "$name"
    cable "$name" "$address"
    boot "$name"
  fi
  note_key "$address" "$name"
  answers "$address" || { tail -n 5 "$LAB/hosts/$name/console" >&2; die "$name does not answer on port 22"; }
}

cut_power() {
  local name=${1:?a name} left group
  if has_systemd; then systemctl kill --signal=KILL "$NET-$name.service" 2>/dev/null || :; fi
  for _ in $(seq 100); do
    left=$(processes_of "$name")
    if [ -z "$left" ]; then break; fi
    # shellcheck disable=SC2086
    kill -9 $left 2>/dev/null || :
    sleep 0.05
  done
  if [ -n "$(processes_of "$name")" ]; then die "$name has processes that do not end"; fi
  for group in $(groups_of "$name"); do
    if [ -d "$group" ]; then find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null || :; fi
  done
}

remove() {
  local name=${1:?a name} at=$LAB/hosts/$1
  cut_power "$name"
  if exists "$(namespace "$name")"; then ip netns del "$(namespace "$name")"; fi
  for _ in $(seq 50); do
    mountpoint -q "$at/root" || break
    umount "$at/root" 2>/dev/null || sleep 0.1
  done
  if mountpoint -q "$at/root"; then die "$at/root is still in use"; fi
  rm -rf "$at"
}

case ${1:-} in
  fabric) fabric "${2:-}" ;;
  start) start "${2:-}" "${3:-}" ;;
  cut) cut_power "${2:-}" ;;
  remove) remove "${2:-}" ;;
  console) cat "$LAB/hosts/${2:?a name}/console" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
