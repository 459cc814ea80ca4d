module "inventory" {
  source       = "../../modules/inventory"
  placement    = var.placement
  extra_shards = var.extra_shards
  hosts = merge([
    for kind, made in module.hosts : {
      for name, host in made.hosts : name => { ansible_host = host.id, address = host.address, groups = [kind], node = kind == "shards" ? name : null }
    }
  ]...)
  vars = {
    ansible_user            = "admin"
    ansible_ssh_common_args = "-o StrictHostKeyChecking=accept-new -o ProxyCommand=\"aws ssm start-session --region ${var.region} --target %h --document-name AWS-StartSSHSession --parameters portNumber=%p\""
    mesh_network            = var.cidr
    mesh_client_networks    = distinct(concat(var.client_cidrs, [var.cidr])) # the load balancer keeps the addresses of clients
    mesh_joiner             = var.spot_replicas > 0                          # spot replicas share a user, which may serve any range
    mesh_load_balancer      = module.load_balancer.dns_name
  }
}

output "inventory" {
  description = "The inventory for ansible-playbook: `terraform output -raw inventory > inventory.yml`."
  value       = module.inventory.inventory
}

output "placement" {
  description = "Which host serves which layers."
  value       = module.inventory.placement
}

output "instance_types" {
  description = "The type that each node of the plan got."
  value       = { for name, host in local.kinds.shards.hosts : name => host.instance_type }
}

output "endpoint" {
  description = "Where clients send HTTPS requests. The inventory has this name, so that the coordinators' certificates have it."
  value       = "https://${module.load_balancer.dns_name}"
}

output "models_bucket" {
  description = "The bucket of models."
  value       = module.storage.bucket
}
