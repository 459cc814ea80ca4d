# Four kinds of hosts, each spread over the zones.

locals {
  nats_hosts        = { for index in range(var.nats_servers) : "nats-${index + 1}" => { subnet_id = local.subnet[index], instance_type = var.nats_instance_type } }
  coordinator_hosts = { for index in range(var.coordinators) : "coordinator-${index + 1}" => { subnet_id = local.subnet[index], instance_type = var.coordinator_instance_type } }
  monitoring_hosts  = { monitoring-1 = { subnet_id = local.subnet[0], instance_type = var.monitoring_instance_type } }
  shard_hosts       = { for index, node in local.nodes : node => { subnet_id = local.subnet[index], instance_type = try(local.fitting[node][0], "") } }

  common = {
    name             = var.name
    ami              = local.ami
    instance_profile = aws_iam_instance_profile.host.name
    key_name         = aws_key_pair.this.key_name
    kms_key_id       = aws_kms_key.this.arn
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

module "nats" {
  source            = "../../modules/hosts"
  name              = local.common.name
  ami               = local.common.ami
  instance_profile  = local.common.instance_profile
  key_name          = local.common.key_name
  kms_key_id        = local.common.kms_key_id
  hosts             = local.nats_hosts
  disk_gb           = local.nats_disk_gb
  security_group_id = module.network.security_group_ids["nats"]
}

module "coordinators" {
  source            = "../../modules/hosts"
  name              = local.common.name
  ami               = local.common.ami
  instance_profile  = local.common.instance_profile
  key_name          = local.common.key_name
  kms_key_id        = local.common.kms_key_id
  hosts             = local.coordinator_hosts
  disk_gb           = local.nats_disk_gb # the first one holds the model while it is pushed
  security_group_id = module.network.security_group_ids["coordinators"]
}

module "shards" {
  source            = "../../modules/hosts"
  name              = local.common.name
  ami               = local.common.ami
  instance_profile  = local.common.instance_profile
  key_name          = local.common.key_name
  kms_key_id        = local.common.kms_key_id
  hosts             = local.shard_hosts
  disk_gb           = local.shard_disk_gb
  security_group_id = module.network.security_group_ids["shards"]
  depends_on        = [terraform_data.fits]
}

module "observability" {
  source            = "../../modules/hosts"
  name              = local.common.name
  ami               = local.common.ami
  instance_profile  = local.common.instance_profile
  key_name          = local.common.key_name
  kms_key_id        = local.common.kms_key_id
  hosts             = local.monitoring_hosts
  disk_gb           = 50
  security_group_id = module.network.security_group_ids["monitoring"]
}

module "load_balancer" {
  source              = "../../modules/load_balancer"
  name                = var.name
  vpc_id              = module.network.vpc_id
  subnet_ids          = var.internal ? module.network.private_subnet_ids : module.network.public_subnet_ids
  internal            = var.internal
  security_group_id   = module.network.security_group_ids["load_balancer"]
  instance_ids        = { for name, host in module.coordinators.hosts : name => host.id }
  port                = local.ports.https
  target_port         = local.ports.http
  deletion_protection = !var.destroy_models
}
