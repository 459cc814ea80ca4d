data "aws_availability_zones" "available" {
  state = "available"

  filter {
    name   = "opt-in-status"
    values = ["opt-in-not-required"] # no local zones
  }
}

data "aws_caller_identity" "me" {}

data "aws_ami" "debian" {
  count       = var.ami == "" ? 1 : 0
  most_recent = true
  owners      = ["136693071363"] # Debian

  filter {
    name   = "name"
    values = ["debian-12-amd64-*"]
  }
}

locals {
  zones = length(var.availability_zones) > 0 ? var.availability_zones : slice(data.aws_availability_zones.available.names, 0, var.zones)
  ami   = var.ami == "" ? data.aws_ami.debian[0].id : var.ami
  ports = { nats = 4222, routes = 6222, http = 8080, https = 443, metrics = 9091, shard_metrics_from = 9201, shard_metrics_to = 9499 }

  subnet = { for index in range(60) : index => module.network.private_subnet_ids[index % length(local.zones)] }
}

module "network" {
  source             = "../../modules/network"
  name               = var.name
  cidr               = var.cidr
  availability_zones = local.zones
  nat                = var.nat
  client_cidrs       = var.internal ? distinct(concat(var.client_cidrs, [var.cidr])) : var.client_cidrs
  ports              = local.ports
}

resource "aws_key_pair" "this" {
  key_name   = var.name
  public_key = var.ssh_public_key
}

data "aws_iam_policy_document" "key" {
  statement {
    sid       = "Account"
    actions   = ["kms:*"]
    resources = ["*"]
    principals {
      type        = "AWS"
      identifiers = ["arn:aws:iam::${data.aws_caller_identity.me.account_id}:root"]
    }
  }
}

resource "aws_kms_key" "this" {
  description             = "Disks and models of ${var.name}"
  enable_key_rotation     = true
  deletion_window_in_days = 7
  policy                  = data.aws_iam_policy_document.key.json
}

module "storage" {
  source        = "../../modules/storage"
  name          = var.models_bucket
  kms_key_arn   = aws_kms_key.this.arn
  force_destroy = var.destroy_models
}
