# The firewall: a group for each kind of host, and one rule for each thing that one of them may ask of another.

locals {
  groups = {
    endpoints     = "AWS endpoints inside the network"
    load_balancer = "The load balancer in front of the coordinators"
    nats          = "NATS servers"
    coordinators  = "Coordinators"
    shards        = "Shards: closed but to monitoring"
    monitoring    = "Prometheus"
  }
  hosts = ["nats", "coordinators", "shards", "monitoring"]

  rules = merge(
    { for group in local.hosts : "${group}-to-endpoints" => { to = "endpoints", from = group, ports = [443, 443] } },
    { for group in ["coordinators", "shards"] : "${group}-to-nats" => { to = "nats", from = group, ports = [var.ports.nats, var.ports.nats] } },
    {
      nats-to-nats                  = { to = "nats", from = "nats", ports = [var.ports.routes, var.ports.routes] }
      load-balancer-to-coordinators = { to = "coordinators", from = "load_balancer", ports = [var.ports.http, var.ports.http] }
      monitoring-to-coordinators    = { to = "coordinators", from = "monitoring", ports = [var.ports.metrics, var.ports.metrics] }
      monitoring-to-shards          = { to = "shards", from = "monitoring", ports = [var.ports.shard_metrics_from, var.ports.shard_metrics_to] }
    },
    { for group in local.hosts : "monitoring-to-node-of-${group}" => { to = group, from = "monitoring", ports = [9100, 9100] } },
  )
}

resource "aws_security_group" "this" {
  for_each    = local.groups
  name        = "${var.name}-${replace(each.key, "_", "-")}"
  description = each.value
  vpc_id      = aws_vpc.this.id
  tags        = { Name = "${var.name}-${replace(each.key, "_", "-")}" }

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_ingress_rule" "between" {
  for_each                     = local.rules
  security_group_id            = aws_security_group.this[each.value.to].id
  referenced_security_group_id = aws_security_group.this[each.value.from].id
  description                  = each.key
  tags                         = { Name = each.key }
  ip_protocol                  = "tcp"
  from_port                    = each.value.ports[0]
  to_port                      = each.value.ports[1]
}

resource "aws_vpc_security_group_ingress_rule" "clients" {
  for_each          = toset(var.client_cidrs)
  security_group_id = aws_security_group.this["load_balancer"].id
  description       = "clients"
  cidr_ipv4         = each.key
  ip_protocol       = "tcp"
  from_port         = var.ports.https
  to_port           = var.ports.https
}

# hosts may ask each other and AWS; the internet only where there is a NAT gateway, and then by HTTP(S) for packages
resource "aws_vpc_security_group_egress_rule" "inside" {
  for_each          = local.groups
  security_group_id = aws_security_group.this[each.key].id
  description       = "inside the network"
  cidr_ipv4         = var.cidr
  ip_protocol       = "tcp"
  from_port         = 0
  to_port           = 65535
}

resource "aws_vpc_security_group_egress_rule" "packages" {
  for_each          = var.nat == "none" ? toset([]) : toset(flatten([for group in local.hosts : [for port in ["80", "443"] : "${group}:${port}"]]))
  security_group_id = aws_security_group.this[split(":", each.key)[0]].id
  description       = "packages"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = tonumber(split(":", each.key)[1])
  to_port           = tonumber(split(":", each.key)[1])
}

resource "aws_vpc_security_group_egress_rule" "s3" {
  for_each          = var.nat == "none" ? toset(local.hosts) : toset([])
  security_group_id = aws_security_group.this[each.key].id
  description       = "models, by the endpoint of S3"
  prefix_list_id    = aws_vpc_endpoint.s3.prefix_list_id
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}
