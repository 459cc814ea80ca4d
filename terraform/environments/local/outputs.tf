output "inventory" {
  description = "The inventory for ansible-playbook: `terraform output -raw inventory > inventory.yml`."
  value       = module.inventory.inventory
}

output "placement" {
  description = "Which host serves which layers."
  value       = module.inventory.placement
}

output "addresses" {
  description = "The address of each host."
  value       = { for name, host in local.hosts : name => host.address }
}

output "enter" {
  description = "What to put in front of a command that is to reach the hosts, such as curl."
  value       = "ip netns exec ${var.network}"
}
