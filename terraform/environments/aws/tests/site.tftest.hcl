# Without AWS: what is planned for a placement. `terraform test`

mock_provider "aws" {
  mock_data "aws_availability_zones" {
    defaults = { names = ["eu-central-1a", "eu-central-1b", "eu-central-1c"] }
  }
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_region" {
    defaults = { name = "eu-central-1" }
  }
  mock_data "aws_ami" {
    defaults = { id = "ami-0123456789abcdef0" }
  }
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{\"Version\":\"2012-10-17\",\"Statement\":[]}" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:eu-central-1:123456789012:key/11111111-2222-3333-4444-555555555555" }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::123456789012:role/a-role" }
  }
  mock_resource "aws_iam_instance_profile" {
    defaults = { arn = "arn:aws:iam::123456789012:instance-profile/a-profile" }
  }
  mock_resource "aws_lb" {
    defaults = { arn = "arn:aws:elasticloadbalancing:eu-central-1:123456789012:loadbalancer/net/mesh/0123456789abcdef", dns_name = "mesh.example.org" }
  }
  mock_resource "aws_lb_target_group" {
    defaults = { arn = "arn:aws:elasticloadbalancing:eu-central-1:123456789012:targetgroup/mesh/0123456789abcdef" }
  }
  mock_resource "aws_secretsmanager_secret" {
    defaults = { arn = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:mesh-spot-identity" }
  }
  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::models", bucket = "models" }
  }
}

variables {
  region         = "eu-central-1"
  ssh_public_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0ZJ1nQ0m1zq3s8b8x3cW5m8wq7o0Q2m5b3lqJqgJq5 test"
  models_bucket  = "models"
  client_cidrs   = ["203.0.113.0/24"]
  placement = {
    model               = "a-model"
    replication_factor  = 2
    overlap_layers      = 0
    batch_size          = 8
    max_sequence_length = 2048
    enable_kv_cache     = true
    shards = [
      { shard_id = 1, node = "node-1", layers_start = 0, layers_end = 10, memory_bytes = 5368709120, weights_bytes = 4000000000 },
      { shard_id = 2, node = "node-2", layers_start = 10, layers_end = 20, memory_bytes = 21474836480, weights_bytes = 9000000000 },
      { shard_id = 3, node = "node-3", layers_start = 0, layers_end = 10, memory_bytes = 5368709120, weights_bytes = 4000000000 },
      { shard_id = 4, node = "node-3", layers_start = 10, layers_end = 20, memory_bytes = 21474836480, weights_bytes = 9000000000 },
    ]
  }
}

run "machines_have_the_memory_of_the_plan" {
  command = plan

  assert {
    condition     = jsonencode(output.instance_types) == jsonencode({ node-1 = "m7i.large", node-2 = "r7i.xlarge", node-3 = "r7i.xlarge" })
    error_message = "5 GiB and 1.5 for the system and the process fit into 8; 20 and 1.5, 25 and 2 fit into 32: ${jsonencode(output.instance_types)}"
  }
}

run "hosts_are_closed_and_encrypted" {
  command = apply

  assert {
    condition     = alltrue([for host in concat(values(module.hosts["nats"].hosts), values(module.hosts["shards"].hosts)) : host.id != null])
    error_message = "every host has an id, by which Session Manager reaches it"
  }
  assert {
    condition     = length(module.hosts["nats"].hosts) == 3 && length(module.hosts["coordinators"].hosts) == 2 && length(module.hosts["shards"].hosts) == 3
    error_message = "three NATS servers, two coordinators, a host for each node of the plan"
  }
  assert {
    condition     = strcontains(yamldecode(output.inventory).all.children.mesh.vars.ansible_ssh_common_args, "aws ssm start-session")
    error_message = "Ansible reaches the hosts through Session Manager"
  }
}

run "spot_replicas_are_beside_the_plan" {
  command = plan

  variables {
    spot_replicas = 2
  }

  assert {
    condition     = length(module.spot) == 1
    error_message = "there is a group of spot replicas for each range"
  }
}

run "a_type_must_be_large_enough" {
  command = plan

  variables {
    instance_types = [{ name = "small", memory_gib = 8 }]
  }

  expect_failures = [terraform_data.fits]
}

run "an_even_cluster_is_refused" {
  command = plan

  variables {
    nats_servers = 2
  }

  expect_failures = [var.nats_servers]
}

run "a_private_key_is_refused" {
  command = plan

  variables {
    ssh_public_key = "-----BEGIN OPENSSH PRIVATE KEY-----"
  }

  expect_failures = [var.ssh_public_key]
}
