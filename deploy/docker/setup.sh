#!/bin/sh
# Makes what the containers of compose.yaml need to trust each other, once: an authority, a certificate and a NATS user for each role, the
# configuration of the server, and the secret of HTTP tokens. Each process mounts the folder of its role alone. The authority's own folder is
# mounted by no process: `docker compose run --rm --entrypoint mesh setup pki rotate --folder /keys/authority/pki` renews.
set -eu
umask 077
cd /keys/authority
if [ -e done ]; then
  echo "the keys are there already"
  exit 0
fi
rm -rf pki users nats.conf

# give FOLDER CERTIFICATE: what a process of that folder shows to others, and what it trusts.
give() {
  cp pki/ca.crt "/keys/$1/ca.crt"
  cp "pki/$2.crt" "/keys/$1/tls.crt"
  cp "pki/$2.key" "/keys/$1/tls.key"
}

mesh pki init --folder pki
mesh pki issue nats --kind server --host nats,localhost,127.0.0.1 --days 365 --folder pki
mesh pki issue edge --kind server --host "${MESH_HOSTS}" --days 365 --folder pki
mesh nats users --folder users >/dev/null
give nats nats
give edge edge
for role in coordinator shard provisioner; do
  mesh pki issue "$role" --days 365 --folder pki
  give "$role" "$role"
  cp "users/$role.nk" "/keys/$role/user.nk"
done
# The paths are those of the server's container, where the folder is /keys/own.
mesh nats config --listen 0.0.0.0:4222 --cert /keys/nats/tls.crt --key /keys/nats/tls.key --ca /keys/nats/ca.crt \
  --store /var/lib/mesh/jetstream --sync-interval 10s --folder users --out nats.conf
sed 's|/keys/nats/|/keys/own/|g' nats.conf >/keys/nats/nats.conf
python3 -c 'import secrets; print(secrets.token_hex(32))' >/keys/coordinator/token-secret
touch done
echo "the keys are made"
