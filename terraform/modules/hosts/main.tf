# Hosts with encrypted disks, without public addresses, whose metadata answers only to sessions (IMDSv2).

data "aws_region" "here" {}

resource "aws_instance" "this" {
  for_each               = var.hosts
  ami                    = var.ami
  instance_type          = each.value.instance_type
  subnet_id              = each.value.subnet_id
  vpc_security_group_ids = [var.security_group_id]
  iam_instance_profile   = var.instance_profile
  key_name               = var.key_name
  ebs_optimized          = true
  user_data              = templatefile("${path.module}/files/user_data.sh.tftpl", { region = data.aws_region.here.name })

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_size = var.disk_gb
    volume_type = "gp3"
    encrypted   = true
    kms_key_id  = var.kms_key_id
  }

  tags = { Name = "${var.name}-${each.key}" }

  lifecycle {
    ignore_changes = [ami, user_data] # a newer image replaces no host by itself, and nothing restarts one
  }
}
