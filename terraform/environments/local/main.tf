# Hosts with systemd and sshd on this machine: three that carry NATS, the coordinators, the gateway and monitoring, and one for each node
# of the plan. Built-in resources only: no provider is fetched.

locals {
  control = {
    control-1 = ["nats", "coordinators"]
    control-2 = ["nats", "coordinators"]
    control-3 = ["nats", "gateway", "monitoring"]
  }
  # in the order in which nodes appear, so that a further one changes no address
  nodes = distinct([for shard in concat(var.placement.shards, var.extra_shards) : shard.node])
  hosts = merge(
    { for name, groups in local.control : name => { address = cidrhost(var.cidr, 11 + index(keys(local.control), name)), groups = groups, node = null } },
    { for index, node in local.nodes : node => { address = cidrhost(var.cidr, 21 + index), groups = ["shards"], node = node } },
  )
  folder = abspath(var.folder)
  settings = {
    LAB     = local.folder
    NET     = var.network
    GATEWAY = "${cidrhost(var.cidr, 1)}/${split("/", var.cidr)[1]}"
    SSH_KEY = trimspace(file(var.ssh_public_key_file))
    SHARED  = "${local.folder}/apt:/srv/mesh/apt,${abspath(var.wheelhouse)}:/srv/mesh/wheels,${abspath(var.model)}:/srv/mesh/model"
  }
  scripts = abspath("${path.module}/scripts")
}

resource "terraform_data" "image" {
  triggers_replace = [local.folder, filesha256("${path.module}/scripts/image.sh")]

  provisioner "local-exec" {
    command = "${local.scripts}/image.sh ${local.folder}"
  }
}

resource "terraform_data" "fabric" {
  input            = { script = "${local.scripts}/hosts.sh", settings = local.settings }
  triggers_replace = [var.network, var.cidr, local.folder]

  provisioner "local-exec" {
    command     = "${self.input.script} fabric up"
    environment = self.input.settings
  }
  provisioner "local-exec" {
    when        = destroy
    command     = "${self.input.script} fabric down"
    environment = self.input.settings
  }
}

resource "terraform_data" "host" {
  for_each         = local.hosts
  input            = { script = "${local.scripts}/hosts.sh", settings = local.settings }
  triggers_replace = [each.value.address, terraform_data.fabric.id, terraform_data.image.id]

  provisioner "local-exec" {
    command     = "${self.input.script} start ${each.key} ${each.value.address}"
    environment = self.input.settings
  }
  provisioner "local-exec" {
    when        = destroy
    command     = "${self.input.script} remove ${each.key}"
    environment = self.input.settings
  }
}

module "inventory" {
  source       = "../../modules/inventory"
  placement    = var.placement
  extra_shards = var.extra_shards
  hosts = {
    for name, host in local.hosts : name => {
      ansible_host = host.address
      address      = host.address
      groups       = host.groups
      node         = host.node
    }
  }
  vars = merge({
    ansible_user            = "admin"
    ansible_ssh_common_args = "-o UserKnownHostsFile=${local.folder}/known_hosts -o ProxyCommand=\"ip netns exec ${var.network} nc %h %p\""
    mesh_wheelhouse         = "/srv/mesh/wheels"
    mesh_model_directory    = "/srv/mesh/model"
    mesh_apt_repository     = "deb [trusted=yes] file:/srv/mesh/apt ./"
    mesh_network            = var.cidr
    mesh_time_sync          = "false" # the hosts share this machine's clock
  }, var.vars)

  depends_on = [terraform_data.host]
}
