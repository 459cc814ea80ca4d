# Four kinds of hosts, each spread over the zones. The name of a kind is also that of its security group and of its group in the inventory.

locals {
  kinds = {
    nats = {
      hosts   = { for index in range(var.nats_servers) : "nats-${index + 1}" => { subnet_id = local.subnet[index], instance_type = var.nats_instance_type } }
      disk_gb = local.nats_disk_gb
    }
    coordinators = {
      hosts   = { for index in range(var.coordinators) : "coordinator-${index + 1}" => { subnet_id = local.subnet[index], instance_type = var.coordinator_instance_type } }
      disk_gb = local.nats_disk_gb # the first one holds the model while it is pushed
    }
    shards = {
      hosts   = { for index, node in local.nodes : node => { subnet_id = local.subnet[index], instance_type = try(local.fitting[node][0], "") } }
      disk_gb = local.shard_disk_gb
    }
    monitoring = {
      hosts   = { monitoring-1 = { subnet_id = local.subnet[0], instance_type = var.monitoring_instance_type } }
      disk_gb = 50
    }
  }
}

resource "terraform_data" "fits" {
  lifecycle {
    precondition {
      condition     = alltrue([for node in local.nodes : length(local.fitting[node]) > 0])
      error_message = "No type of instance_types has the memory of ${join(", ", [for node in local.nodes : format("%s (%.1f GiB)", node, local.needed_gib[node]) if length(local.fitting[node]) == 0])}: add a larger type, or plan with more nodes (`mesh plan --nodes`)."
    }
    precondition {
      condition     = length(local.nodes) <= 60
      error_message = "The plan has more than 60 nodes."
    }
  }
}

module "hosts" {
  for_each          = local.kinds
  source            = "../../modules/hosts"
  name              = var.name
  hosts             = each.value.hosts
  ami               = local.ami
  security_group_id = module.network.security_group_ids[each.key]
  instance_profile  = aws_iam_instance_profile.host.name
  key_name          = aws_key_pair.this.key_name
  disk_gb           = each.value.disk_gb
  kms_key_id        = aws_kms_key.this.arn
  depends_on        = [terraform_data.fits]
}

module "load_balancer" {
  source              = "../../modules/load_balancer"
  name                = var.name
  vpc_id              = module.network.vpc_id
  subnet_ids          = var.internal ? module.network.private_subnet_ids : module.network.public_subnet_ids
  internal            = var.internal
  security_group_id   = module.network.security_group_ids["load_balancer"]
  instance_ids        = { for name, host in module.hosts["coordinators"].hosts : name => host.id }
  port                = local.ports.https
  target_port         = local.ports.http
  deletion_protection = !var.destroy_models
}
