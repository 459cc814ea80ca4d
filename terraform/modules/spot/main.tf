# Further replicas of each layer range on spot instances. AWS gives two minutes' notice; the instance then drains its shard (sessions move to
# the other replicas and lose nothing) and says that its termination may go on. Losing all of them loses no range: those of the plan stay.

resource "aws_launch_template" "this" {
  for_each               = var.ranges
  name                   = "${var.name}-spot-${each.key}"
  image_id               = var.ami
  key_name               = var.key_name
  update_default_version = true
  ebs_optimized          = true
  vpc_security_group_ids = [var.security_group_id]

  iam_instance_profile {
    arn = var.instance_profile_arn
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    instance_metadata_tags      = "enabled"
  }

  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_size           = var.disk_gb
      volume_type           = "gp3"
      encrypted             = true
      kms_key_id            = var.kms_key_arn
      delete_on_termination = true
    }
  }

  user_data = base64encode(templatefile("${path.module}/files/user_data.sh.tftpl", {
    group        = "${var.name}-spot-${each.key}"
    hook         = "drain"
    region       = var.region
    bucket       = var.bucket
    secret_arn   = var.secret_arn
    nats_urls    = join(",", var.nats_urls)
    model        = var.model
    layers       = each.key
    mesh_version = var.mesh_version
    drain        = file("${path.module}/files/spot_drain.py")
    agent        = templatefile("${path.module}/../hosts/files/user_data.sh.tftpl", { region = var.region })
  }))
}

resource "aws_autoscaling_group" "this" {
  for_each            = var.ranges
  name                = "${var.name}-spot-${each.key}"
  min_size            = 0
  desired_capacity    = var.replicas
  max_size            = var.replicas + 1 # a replacement starts before the one that is taken back ends
  vpc_zone_identifier = var.subnet_ids
  capacity_rebalance  = true
  health_check_type   = "EC2"

  mixed_instances_policy {
    instances_distribution {
      on_demand_percentage_above_base_capacity = 0
      spot_allocation_strategy                 = "price-capacity-optimized"
    }
    launch_template {
      launch_template_specification {
        launch_template_id = aws_launch_template.this[each.key].id
        version            = aws_launch_template.this[each.key].latest_version
      }
      dynamic "override" {
        for_each = var.instance_types
        content {
          instance_type = override.value
        }
      }
    }
  }

  tag {
    key                 = "Name"
    value               = "${var.name}-spot-${each.key}"
    propagate_at_launch = true
  }
}

# an instance that is to end waits until it has drained, for two minutes at most
resource "aws_autoscaling_lifecycle_hook" "drain" {
  for_each               = var.ranges
  name                   = "drain"
  autoscaling_group_name = aws_autoscaling_group.this[each.key].name
  lifecycle_transition   = "autoscaling:EC2_INSTANCE_TERMINATING"
  heartbeat_timeout      = 120
  default_result         = "CONTINUE"
}
